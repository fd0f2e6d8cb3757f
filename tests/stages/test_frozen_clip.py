"""What the prior and the U-Nets share in training: embeddings, times, dropped conditions."""

import pytest
import torch

from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import CaptionPolicy
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import draw_t, keep_masks, load_conditions
from dalle2_video.stages.wiring import store_of


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
