"""Which frames of a clip are stored and how: spans, windows, encodings, through to the batch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest

from dalle2_video.data.config import CaptionPolicy, StoreSettings
from dalle2_video.data.media.decode import decode_clip, decode_window
from dalle2_video.data.media.encode import encode_window
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.shown import MOST_WINDOWS
from dalle2_video.data.preprocess.check import check_store
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, embedding_keys, train_loader
from dalle2_video.data.store.shard import ShardWriter, StoreError, read_index, shard_paths
from dalle2_video.data.store.store import open_store
from dalle2_video.faces.config import FaceFormat
from dalle2_video.faces.plan import plan
from dalle2_video.faces.writer import draw_clip
from tests.helpers.media import clip_id, grey_steps, index_first, numbers, write_video, write_zip
from tests.helpers.stores import config, skipped

STEP = 4  # so that 60 frames have their own grey


def long(frames: int, **more) -> bytes:
    return write_video(grey_steps(frames, step=STEP), **more)


# ---------------------------------------------------------------- decode_clip


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_full_span_spreads_the_frames_over_the_clip(form: str) -> None:
    clip = decode_clip(long(40, form=form), 8.0, 5, 32, span="full")
    assert numbers(clip.frames, STEP) == [0, 8, 16, 24, 32]
    assert np.allclose(clip.timestamps, [0.0, 0.8, 1.6, 2.4, 3.2], atol=1e-3)
    short = decode_clip(long(3), 8.0, 6, 32, span="full")
    assert numbers(short.frames, STEP) == [0, 0, 1, 1, 2, 2], "a clip of 0.3 s has its three frames"


def test_a_full_span_counts_from_the_first_frame() -> None:
    video = write_video(grey_steps(20, step=STEP), timestamps=[1.4 + k / 10 for k in range(20)])
    clip = decode_clip(video, 8.0, 4, 32, span="full")
    assert numbers(clip.frames, STEP) == [0, 5, 10, 15] and clip.timestamps[0] == 0


def test_all_windows_lie_end_to_end_and_a_rest_is_left_over() -> None:
    clip = decode_clip(long(45), 5.0, 6, 32, windows="all")
    assert numbers(clip.frames, STEP) == list(range(0, 36, 2))
    assert np.allclose(clip.timestamps, np.arange(18) / 5, atol=1e-3)
    one = decode_clip(long(45), 5.0, 6, 32)
    assert np.array_equal(clip.frames[:6], one.frames)
    exact = decode_clip(long(48), 5.0, 6, 32, windows="all")
    assert len(exact.frames) == 24, "48 frames at 10 fps hold four windows of 1.2 s"
    with pytest.raises(ClipError, match=r"too short: has 0\.9 s, needs 1\.2 s"):
        decode_clip(long(9), 5.0, 6, 32, windows="all")


@pytest.mark.parametrize("how", [{"span": "full"}, {"windows": "all"}])
def test_a_truncated_clip_is_refused_where_all_of_it_is_wanted(how: dict) -> None:
    video = index_first(write_video(grey_steps(60, step=STEP), codec_options={"g": "10"}))
    whole = decode_clip(video, 10.0, 10, 32, **how)
    assert len(whole.frames) in (10, 60)
    with pytest.raises(ClipError, match="truncated"):
        decode_clip(video[: int(len(video) * 0.7)], 10.0, 10, 32, **how)


def test_time_stamps_that_jump_do_not_fill_the_memory() -> None:
    timestamps = [0.0, 0.1, 0.2, 50_000.0, 50_000.1]
    video = write_video(grey_steps(5), timestamps=timestamps)
    with pytest.raises(ClipError, match=f"too long: makes more than {MOST_WINDOWS} windows"):
        decode_clip(video, 10.0, 2, 32, windows="all")


# ---------------------------------------------------------------- encoded windows


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """A rendered face at 128 px, uint8 (16, 128, 128, 3)."""
    video, _ = draw_clip(plan(1, seed=3)[0], FaceFormat(256, 8.0, 2.0))
    return decode_clip(video, 8.0, 16, 128).frames


def test_an_encoded_window_is_visually_lossless_and_small(face: np.ndarray) -> None:
    data = encode_window(face, 8.0)
    frames = np.empty_like(face)
    decode_window(data, frames)
    error = ((frames.astype(float) - face) ** 2).mean((1, 2, 3))
    assert (10 * np.log10(255**2 / error)).min() > 42
    assert data.size < face.size / 8
    assert np.array_equal(data, encode_window(face, 8.0)), "the same bytes for the same frames"


def test_odd_sides_and_red_edges_survive_encoding() -> None:
    """4:4:4: no chroma is averaged, no even sides are needed."""
    frames = np.zeros((3, 15, 17, 3), np.uint8)
    frames[:, :, ::2, 0] = 255
    out = np.empty_like(frames)
    decode_window(encode_window(frames, 8.0), out)
    assert np.abs(out.astype(int) - frames).mean() < 4


def test_a_damaged_window_is_an_error(face: np.ndarray) -> None:
    data = encode_window(face, 8.0)
    with pytest.raises(ClipError, match="damaged"):
        decode_window(data[:-3000], np.empty_like(face))
    with pytest.raises(ClipError, match="damaged"):
        decode_window(np.zeros(500, np.uint8), np.empty_like(face))
    with pytest.raises(ClipError, match="ends after 16 of 17"):
        decode_window(data, np.empty((17, 128, 128, 3), np.uint8))
    for shape in [(15, 128, 128, 3), (16, 64, 64, 3)]:
        with pytest.raises(ClipError, match="other frames"):
            decode_window(data, np.empty(shape, np.uint8))


# ---------------------------------------------------------------- the store


def archive(root: Path, **lengths: int) -> None:
    """Clips of the given numbers of frames at 10 fps."""
    write_zip(root / "a.zip", {clip_id(int(k[1:])): long(n) for k, n in lengths.items()})


@pytest.mark.parametrize("encoding", ["raw", "h264"])
def test_windows_have_keys_texts_times_and_a_split_of_their_own_clip(
    tmp_path: Path, encoding: str
) -> None:
    archive(tmp_path, c1=25, c2=8, c3=39, c4=12)
    made = replace(config(tmp_path), windows="all", encoding=encoding)
    summary = preprocess(made)
    assert summary.clips == 3 and next(iter(skipped(tmp_path).values())).startswith("too short")
    store = open_store(made)
    names = [(clip_id(1), 2), (clip_id(3), 3), (clip_id(4), 1)]
    keys = [f"{name}:{window}" for name, count in names for window in range(count)]
    assert [store.key(k) for k in range(len(store))] == keys
    frames = store.frames([5, 1, 0])
    for found, first in zip(frames, [0, 12, 0], strict=True):
        assert numbers(found, STEP) == list(range(first, first + 12, 2))
    assert np.allclose(store.timestamps(1), 1.2 + np.arange(6) / 5)
    for place, key in enumerate(keys):
        (action, *_) = store.lines(place)["action_dur"]
        assert action.text == f"{key.split(':')[0]} nods.", "all windows of a clip share its texts"
    for name in store.splits:
        ids = {store.clip_ids[k] for k in store.split(name)}
        assert sum(key.split(":")[0] in ids for key in keys) == len(store.split(name))
    report = check_store(made)
    assert report.problems == [] and (report.clips, report.windows) == (3, 6)
    assert report.lines_per_clip == 9.0 and "3 clips (6 windows) in 1 shards" in str(report)


def test_evaluation_meets_each_clip_once(tmp_path: Path) -> None:
    archive(tmp_path, c1=25, c3=39, c4=12)
    made = replace(config(tmp_path), windows="all", splits={"train": 1.0})
    preprocess(made)
    store = open_store(made)
    assert (
        len(embedding_keys(store))
        == len(CelebVTextDataset(store, "train", 0, TrainingCaptions(CaptionPolicy())))
        == 6
    )
    policy = EvaluationCaptions()
    first = CelebVTextDataset(store, "train", 0, policy, first_windows=True)
    assert first.keys() == [f"{clip_id(person)}:0" for person in (1, 3, 4)]


def test_random_windows_are_one_per_clip_and_epoch(tmp_path: Path) -> None:
    """By the sample id alone, so any rank, worker and resumed run draws the same ones."""
    archive(tmp_path, c1=25, c3=39, c4=12)
    made = replace(config(tmp_path), windows="random", splits={"train": 1.0})
    preprocess(made)
    preprocess(replace(made, windows="all"), log=pytest.fail)
    store = open_store(made)
    policy = TrainingCaptions(CaptionPolicy())
    data = CelebVTextDataset(store, "train", 3, policy)
    epochs = 600
    keys = [data.pointer(sample_id).key for sample_id in range(3 * epochs)]
    for epoch in range(0, len(keys), 3):
        clips = {key.split(":")[0] for key in keys[epoch : epoch + 3]}
        assert clips == {clip_id(1), clip_id(3), clip_id(4)}, "every clip once"
    counts = Counter(keys)
    assert set(counts) == {store.key(place) for place in range(6)}
    for clip, windows in ((clip_id(1), 2), (clip_id(3), 3), (clip_id(4), 1)):
        for window in range(windows):
            share, spread = 1 / windows, (epochs * (windows - 1)) ** 0.5 / windows
            assert abs(counts[f"{clip}:{window}"] - epochs * share) <= 4 * spread
    resumed = CelebVTextDataset(store, "train", 3, policy)
    assert [resumed.pointer(k).key for k in range(100, 120)] == keys[100:120]
    whole = list(islice(train_loader(data, 4), 3))
    ranks = [list(islice(train_loader(data, 2, rank, 2), 3)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch.keys == [key for rank in ranks for key in rank[step].keys]
    assert len(embedding_keys(store)) == 6, "every window has its embedding"


def test_a_killed_run_with_windows_goes_on_at_the_clip(tmp_path: Path, monkeypatch) -> None:
    archive(tmp_path, c1=25, c3=39, c4=12)
    made = replace(config(tmp_path), windows="all", encoding="h264")
    import dalle2_video.data.preprocess.clip as module

    real, seen = module.decode_clip, []

    def stop(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "decode_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        preprocess(made)
    assert preprocess(made).clips == 3 and len(seen) == 4, "the third clip alone is decoded again"
    other = replace(made, out=str(tmp_path / "other"))
    preprocess(other)
    one, two = (shard_paths(c.store, "a")[0] for c in (made, other))
    assert one.read_bytes() == two.read_bytes()


def test_a_full_span_reaches_the_store(tmp_path: Path) -> None:
    archive(tmp_path, c1=24, c2=60)
    made = replace(config(tmp_path), span="full")
    preprocess(made)
    store = open_store(made)
    assert numbers(store.frames([0])[0], STEP) == list(range(0, 24, 4))
    assert numbers(store.frames([1])[0], STEP) == list(range(0, 60, 10))
    assert np.allclose(store.timestamps(1), np.arange(6.0), atol=1e-3)


def test_encoded_frames_are_those_of_the_raw_store(tmp_path: Path) -> None:
    archive(tmp_path, c1=25, c3=39)
    for encoding in ("raw", "h264"):
        preprocess(replace(config(tmp_path), out=str(tmp_path / encoding), encoding=encoding))
    raw, small = (
        open_store(replace(config(tmp_path), out=str(tmp_path / e), encoding=e))
        for e in ("raw", "h264")
    )
    difference = np.abs(raw.frames([1, 0]).astype(int) - small.frames([1, 0]))
    assert difference.max() <= 3
    with pytest.raises(StoreError, match="data asks for"):
        open_store(replace(config(tmp_path), out=str(tmp_path / "raw"), encoding="h264"))


def test_a_damaged_encoded_store_is_named(tmp_path: Path) -> None:
    archive(tmp_path, c1=25, c3=39)
    made = replace(config(tmp_path), encoding="h264")
    preprocess(made)
    video, _, index = shard_paths(tmp_path, "a")
    with h5py.File(video, "r+") as file:
        end = file["end"][:]
        file["video"][end[0] : end[1]] = 0
    with pytest.raises(StoreError, match=rf"a: {clip_id(3)}:0: a stored video is damaged"):
        open_store(made).frames([0, 1])
    named = "\n".join(check_store(made).problems)
    assert f"a: clip {clip_id(3)}: its frames have changed on disk" in named
    rows = read_index(index)
    rows["clips"][0]["windows"] = 2
    index.write_text(json.dumps(rows))
    with pytest.raises(StoreError, match=r"a\.h5 holds \(2, .* says 3 windows"):
        open_store(made)


def test_settings_that_contradict_each_other_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="windows must be one"):
        StoreSettings(8.0, 2, 8, span="full", windows="all")
    with pytest.raises(ValueError, match="Input should be 'raw' or 'h264'"):
        replace(config(tmp_path), encoding="png")
    with pytest.raises(ValueError, match="Input should be greater than 0"):
        StoreSettings(0.0, 2, 8)


def test_a_store_of_an_older_format_is_made_again(tmp_path: Path, capsys) -> None:
    archive(tmp_path, c1=25, c3=39)
    preprocess(config(tmp_path))
    index = shard_paths(tmp_path, "a")[2]
    index.write_text(json.dumps({**read_index(index), "format": 1}))
    with pytest.raises(StoreError, match="format 1, this code reads 3: run preprocess"):
        open_store(config(tmp_path))
    assert preprocess(config(tmp_path)).made == 2 and "it is made again" in capsys.readouterr().out
    assert len(open_store(config(tmp_path))) == 2


def test_parts_make_a_store_of_an_older_format_again(tmp_path: Path) -> None:
    archive(tmp_path, c1=25, c3=39)
    (tmp_path / "a.zip").rename(tmp_path / "b.zip")
    archive(tmp_path, c4=25, c5=39)
    made = config(tmp_path)
    preprocess(made)
    for name in ("a", "b"):
        index = shard_paths(tmp_path, name)[2]
        index.write_text(json.dumps({**read_index(index), "format": 1}))
    for part in (2, 1):
        preprocess(made, part=part, parts=2)
    assert len(open_store(made)) == 4


def test_the_writer_needs_the_number_of_bytes(tmp_path: Path) -> None:
    settings = StoreSettings(8.0, 2, 8, encoding="h264")
    with (
        pytest.raises(ValueError, match="4 bytes is full"),
        ShardWriter(tmp_path, "s", settings, 1, 4) as writer,
    ):
        writer.append(np.zeros(5, np.uint8), np.zeros(2))
    assert not shard_paths(tmp_path, "s")[0].exists()
