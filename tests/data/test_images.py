"""Images with captions beside videos: through preprocess, the store, and into batches."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from dalle2_video.data.config import CaptionPolicy, DataConfig
from dalle2_video.data.preprocess.check import check_store
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, embedding_keys
from dalle2_video.data.store.shard import StoreError, shard_paths
from dalle2_video.data.store.store import open_store
from tests.helpers.files import write_files
from tests.helpers.media import grey_steps, write_video
from tests.helpers.stores import config, skipped

VIDEOS = ("b", "f")
IMAGES = {"a": ("jpg", 60), "c": ("png", 120), "d/e": ("webp", 180), "g": ("jpeg", 240)}
EVERY = TrainingCaptions(CaptionPolicy(all_probability=1.0, join_probability=0.0))


def image(kind: str, grey: int) -> bytes:
    file = io.BytesIO()
    name = {"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper())
    Image.new("RGB", (40, 24), (grey,) * 3).save(file, name, quality=95)
    return file.getvalue()


@pytest.fixture(params=["raw", "h264"])
def made(tmp_path: Path, request) -> DataConfig:
    files = {f"{name}.mp4": write_video(grey_steps(30)) for name in VIDEOS}
    files |= {f"{name}.{kind}": image(kind, grey) for name, (kind, grey) in IMAGES.items()}
    files |= {f"{name}.txt": f"About {name}.".encode() for name in (*VIDEOS, *IMAGES)}
    root = write_files(tmp_path / "data", files)
    out = str(tmp_path / "store")
    return config(root, layout=None, out=out, encoding=request.param, splits={"train": 1.0})


def test_images_reach_the_store(made: DataConfig) -> None:
    assert preprocess(made, log=lambda text: None).clips == 6 and skipped(made.store) == {}
    store = open_store(made)
    assert (len(store), store.num_images) == (2, 4)
    assert store.clip_ids == ["b", "f", "a", "c", "d/e", "g"], "videos first"
    assert store.split("train") == [0, 1] and store.images("train") == [2, 3, 4, 5]
    assert [store.key(place) for place in range(6)] == [f"{clip}:0" for clip in store.clip_ids]
    for place, (_, grey) in enumerate(IMAGES.values(), 2):
        (still,) = store.stills([place], [3])
        assert still.shape == (16, 16, 3) and abs(still.astype(int) - grey).max() <= 2
        assert (store.frames([place])[0] == still).all(), "as a clip it is a still video"
        assert store.timestamps(place).tolist() == [0.0] * 6
        (line,) = store.lines(place)["text"]
        assert line.text == f"About {store.clip_ids[place]}."
    mixed = store.frames([5, 0, 2])
    assert mixed[0].mean() > 235 and mixed[2].mean() < 65 and mixed[1][0].max() == 0
    report = check_store(made)
    assert report.problems == [] and (report.clips, report.images) == (6, 4)
    assert "(2 windows, 4 images)" in str(report)


def test_a_changed_image_is_found(made: DataConfig) -> None:
    preprocess(made, log=lambda text: None)
    with h5py.File(shard_paths(made.store, "data")[0], "r+") as file:
        file["stills"][1, 0, 0] ^= 1
    (problem,) = check_store(made).problems
    assert problem == "data: clip c: its frames have changed on disk"
    with h5py.File(shard_paths(made.store, "data")[0], "r+") as file:
        del file["stills"]
    with pytest.raises(StoreError, match=r"holds 0 images, index/data\.json says 4"):
        open_store(made)


def test_a_stopped_run_goes_on_among_images(made: DataConfig, monkeypatch) -> None:
    import dalle2_video.data.preprocess.clip as module

    real, seen = module.decode_image, []

    def stop(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "decode_image", stop)
    with pytest.raises(KeyboardInterrupt):
        preprocess(made, log=lambda text: None)
    preprocess(made, log=lambda text: None)
    assert len(seen) == 5, "two images were kept"
    other = replace(made, out=f"{made.out}2")
    preprocess(other, log=lambda text: None)
    paths = [shard_paths(each.store, "data")[0].read_bytes() for each in (made, other)]
    assert paths[0] == paths[1]


def test_joint_training_draws_from_frames_and_images(made: DataConfig) -> None:
    preprocess(made, log=lambda text: None)
    data = CelebVTextDataset(open_store(made), "train", 0, EVERY, num_images=3)
    assert len(data) == 2, "images are no clips"
    epoch = [data.image_pointer(sample_id).key for sample_id in range(6)]
    assert sorted(epoch) == sorted(f"{name}:0" for name in (*VIDEOS, *IMAGES)), "each once"
    batch = data.collate([data.pointer(0), data.pointer(1)])
    assert batch.images is not None and batch.images.frames is not None
    assert batch.images.keys == epoch
    for key, frame, caption in zip(
        batch.images.keys, batch.images.frames, batch.images.captions, strict=True
    ):
        clip = key.removesuffix(":0")
        assert caption == [f"About {clip}."] and frame.shape == (1, 16, 16, 3)
        if clip in IMAGES:
            assert abs(frame.float() - IMAGES[clip][1]).max() <= 2


def test_clip_and_prior_may_take_images_as_still_videos(made: DataConfig) -> None:
    preprocess(made, log=lambda text: None)
    store = open_store(made)
    data = CelebVTextDataset(store, "train", 0, EVERY, include_images=True)
    epoch = {data.pointer(sample_id).key for sample_id in range(6)}
    assert epoch == set(embedding_keys(store)) and len(epoch) == 6
    batch = data.collate([data.pointer(sample_id) for sample_id in range(6)])
    assert batch.frames is not None
    for key, frames in zip(batch.keys, batch.frames.numpy(), strict=True):
        assert (frames == frames[0]).all() == (key[:-2] in IMAGES)


def test_images_alone(made: DataConfig) -> None:
    for name in VIDEOS:
        (Path(made.root) / f"{name}.mp4").unlink()
    preprocess(made, log=lambda text: None)
    store = open_store(made)
    assert store.warnings == ["there are images only: a U-Net trains on videos"]
    with pytest.raises(StoreError, match="has images only, and needs videos here"):
        CelebVTextDataset(store, "train", 0, EvaluationCaptions())
    assert len(CelebVTextDataset(store, "train", 0, EVERY, include_images=True)) == 4


def test_every_split_gets_a_video(made: DataConfig) -> None:
    """Images alone in `val` would be no validation; whatever the seed."""
    preprocess(made, log=lambda text: None)
    for seed in range(20):
        store = open_store(replace(made, splits={"train": 0.5, "val": 0.5}, split_seed=seed))
        assert len(store.split("train")) == len(store.split("val")) == 1
        assert len(store.images("train")) + len(store.images("val")) == 4
    assert store.describe("val").startswith("val 1")


def test_groups_stay_with_their_clips(made: DataConfig) -> None:
    """Images come after videos in a store, and so must their groups."""
    preprocess(made, log=lambda text: None)
    store = open_store(made)
    assert store.groups == store.clip_ids == ["b", "f", "a", "c", "d/e", "g"]


def test_an_animated_image_is_a_video(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in grey_steps(15)]
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True
    )
    root = write_files(tmp_path / "data", {"a.webp": file.getvalue(), "a.txt": "It moves."})
    made = config(root, layout=None)
    preprocess(made, log=lambda text: None)
    store = open_store(made)
    assert (len(store), store.num_images) == (1, 0)
    assert np.rint(store.frames([0])[0].mean((1, 2, 3)) / 8).tolist() == [0, 2, 4, 6, 8, 10]
