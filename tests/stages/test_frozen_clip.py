"""What the prior and the U-Nets share in training: embeddings, times, dropped conditions."""

import shutil

import pytest
import torch

from dalle2_video import keyed
from dalle2_video.data.config import CaptionPolicy
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError, write_embeddings
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import (
    TextEncoder,
    draw_t,
    keep_masks,
    load_conditions,
    shared_coin,
)
from dalle2_video.stages.wiring import store_of
from dalle2_video.training.stage import StepInfo


def test_embeddings_are_those_of_the_frames_that_the_decoder_sees(configure, run_dir) -> None:
    """By key, from the same frames, axis order and range."""
    clip, loaded = load_clip(run_dir / "clip" / "model.safetensors")
    conditions = load_conditions(
        run_dir, store_of(settings_of(configure())), 0, CaptionPolicy(), True
    )
    dataset = conditions.train_set
    batch = dataset.collate([dataset.pointer(sample_id) for sample_id in (5, 0, 11)])
    video = to_float(batch.frames)
    assert video.shape[1:] == (3, 8, 32, 32) and video.min() >= -1 and video.max() <= 1
    torch.testing.assert_close(clip.encode_video(video), batch.embeddings, atol=1e-4, rtol=0)
    assert conditions.clip_hash == loaded.hash


def test_times_cover_the_interval_evenly_and_are_keyed() -> None:
    times = draw_t(3, torch.arange(1000, 2000), "base")
    counts = torch.histc(times, 50, 0, 1)
    assert counts.min() >= 17 and counts.max() <= 23  # independent draws would give 20 +- 13
    torch.testing.assert_close(times[500:], draw_t(3, torch.arange(1500, 2000), "base"))
    assert (draw_t(4, torch.arange(5), "base") - draw_t(3, torch.arange(5), "base")).any()


def test_condition_dropout_has_the_stated_rates() -> None:
    drop = {"all": 0.1, "embedding": 0.3, "text": 0.2}
    embedding, text = keep_masks(drop, 0, torch.arange(20_000), "drop")
    assert (~embedding & ~text).float().mean() == pytest.approx(0.1 + 0.9 * 0.06, abs=0.01)
    assert (~embedding).float().mean() == pytest.approx(0.1 + 0.9 * 0.3, abs=0.01)
    assert (~text).float().mean() == pytest.approx(0.1 + 0.9 * 0.2, abs=0.01)


GOLDEN = (5**0.5 - 1) / 2


@pytest.mark.parametrize("number", [3, 13, 50, 377, 2000])
def test_any_run_of_times_leaves_no_gap_beyond_twice_the_mean(number: int) -> None:
    """The bound of the golden ratio, the least of all: (1 + 2 / sqrt 5) times the mean gap."""
    for first in (0, 1_000_001, 123_456_789):
        times = draw_t(3, torch.arange(first, first + number), "base").sort().values.double()
        assert times[0] >= 0 and times[-1] < 1
        gaps = torch.cat([times.diff(), times[:1] + 1 - times[-1:]])
        assert gaps.max() * number < 1 + 2 / 5**0.5 + 1e-3


def test_times_begin_at_an_offset_of_their_seed_and_stream_and_go_on_by_the_golden_ratio() -> None:
    for seed, stream in ((0, "base"), (1, "base"), (0, "prior")):
        start = keyed.key(seed, "offset", stream) / 2**63
        found = draw_t(seed, torch.tensor([0, 1, 2]), stream).tolist()
        assert found == pytest.approx([(start + k * GOLDEN) % 1 for k in range(3)], abs=1e-6)
    far = draw_t(0, torch.arange(2) + 10**9, "base").double()
    assert float(far.diff() % 1) == pytest.approx(GOLDEN, abs=1e-6)


def test_coins_have_their_probability_and_are_keyed_by_step_seed_and_stream() -> None:
    def sides(seed: int, stream: str) -> list[bool]:
        steps = [StepInfo(torch.arange(2), seed, torch.device("cpu"), None, k) for k in range(400)]  # type: ignore[arg-type]
        return [shared_coin(0.3, step, stream) for step in steps]

    one = sides(0, "a")
    assert sum(one) == pytest.approx(120, abs=30) and one == sides(0, "a")
    for other in (sides(1, "a"), sides(0, "b")):  # independent: alike at 0.58
        assert sum(x == y for x, y in zip(one, other, strict=True)) < 300
    step = StepInfo(torch.arange(1), 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    assert shared_coin(1.0, step, "a") and not shared_coin(0.0, step, "a")


def test_whitening_is_fitted_to_the_texts_met_first_without_padding(configure, run_dir) -> None:
    conditions = load_conditions(
        run_dir, store_of(settings_of(configure())), 0, CaptionPolicy(), False, "heldout"
    )
    assert conditions.val_set.name == "heldout" and conditions.train_set.name == "train"
    found, data = conditions.examples(), conditions.train_set
    assert data.embeddings is not None
    assert torch.equal(found.video, data.embeddings.rows(data.keys()))
    # 8 texts per dimension, but no more than four times the clips, in batches of 64
    number = -(-min(8 * 32, 4 * len(data)) // 64) * 64
    assert found.text.shape == (number, 32)
    encode = TextEncoder(conditions.video_clip)
    for first in (0, number - 5):
        texts = encode(data.collate([data.pointer(first + i) for i in range(5)]))
        torch.testing.assert_close(found.text[first : first + 5], texts.embedding)
    torch.testing.assert_close(
        found.states[-int(texts.mask[-1].sum()) :], texts.states[-1][texts.mask[-1]]
    )
    assert found.states.abs().amax(1).min() > 0


def test_a_cache_in_another_order_than_the_store_is_refused(configure, run_dir, tmp_path) -> None:
    store = store_of(settings_of(configure()))
    shutil.copytree(run_dir / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "embeddings.safetensors"
    cache = EmbeddingCache.load(path, None)
    loaded = load_clip(tmp_path / "clip" / "model.safetensors")[1]
    write_embeddings(path, [*cache.keys[1:], cache.keys[0]], cache.embeddings, loaded.hash)
    with pytest.raises(EmbeddingError, match=r"row 0 is clip .* expected"):
        load_conditions(tmp_path, store, 0, CaptionPolicy(), False)
