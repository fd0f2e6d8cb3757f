"""The data path at the size of CelebV-Text: preprocess against the decoder's own speed, reading.

    python examples/real_clips.py --out data/real
    pip install opencv-python-headless               # for the straightforward way alone
    python -m benchmarks.data preprocess --real data/real
    python -m benchmarks.data read
    python -m benchmarks.data index
    python -m benchmarks.data memory
    python -m benchmarks.data storage --real data/real
    python -m benchmarks.data skipping --real data/real

`preprocess` makes clips like CelebV-Text's from the real ones (512 px, 25 fps, 14 s, 5.7 Mbit/s,
which is 700 GB over 70,000 clips), a few that are repeated under new ids, and times in turn, in the
same number of processes: decoding the frames that are needed and nothing else; our preprocess; and
the straightforward way (OpenCV reads 150 frames, PIL resizes each to 224 px, float32 into HDF5).
`read` times collate on a file of more than 4 GB, from a warm page cache and a cold one. `index`
opens 70,000 clips over 70 shards and shuffles an epoch. `memory` takes the peak of each process
while 1,000 and 10,000 clips (archives of 1,000, small ones) are preprocessed and read. `storage`
stores the real clips raw and as h264 at 64, 128 and 256 px, and takes bytes, PSNR between the two
and the time to read. `skipping` times `decode_clip` of clips of 512 px, 25 fps, 14 s with and
without leaving out the H.264 frames that are not needed and that no other refers to, in turn, in
processor seconds of one process; at x264's default quality and at CelebV-Text's rate. Each writes
benchmarks/results/data_<name>.json; the ratios are of one run.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import h5py
import numpy as np
import psutil
from av.video.reformatter import Interpolation
from PIL import Image

from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import CATEGORIES, CaptionPolicy, DataConfig, StoreSettings
from dalle2_video.data.media import stream as media_stream
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.preprocess.pool import WorkerPool
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import TrainingCaptions, to_line
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.sources.member import Member
from dalle2_video.data.store.dataset import CelebVTextDataset
from dalle2_video.data.store.order import ClipOrder
from dalle2_video.data.store.shard import FORMAT, ShardWriter, shard_paths
from dalle2_video.data.store.store import ClipStore, open_store
from dalle2_video.data.store.texts import write_texts
from dalle2_video.faces.config import FaceFormat
from dalle2_video.faces.plan import plan
from dalle2_video.faces.writer import draw_clip
from dalle2_video.provenance import provenance

SETTINGS = StoreSettings(8.0, 16, 64)
RATE, SECONDS, SIDE, BITS = 25, 14, 512, 5_700_000
STRAIGHT_FRAMES, STRAIGHT_SIDE = 150, 224
SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}


# ---------------------------------------------------------------- clips


def like_celebvtext(video: bytes, bits: int | None = BITS) -> bytes:
    """A real clip, enlarged and played to and fro until it lasts SECONDS, at CelebV-Text's rate.

    bits: per second; None = x264's default, which is a quality (crf 23).
    """
    with av.open(io.BytesIO(video)) as container:
        frames = [frame for frame in container.decode(video=0)]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE))
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "medium"}
        if bits is None:
            stream.options = {**stream.options, "crf": "23"}
        else:
            stream.bit_rate = bits
        for k in range(RATE * SECONDS):
            place = k % (2 * len(frames) - 2)
            source = frames[min(place, 2 * len(frames) - 2 - place)]
            frame = source.reformat(SIDE, SIDE, "yuv420p", interpolation=Interpolation.LANCZOS)
            frame.pts, frame.time_base = k, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def real_videos(real: Path, kinds: int) -> list[bytes]:
    """`kinds` of the real clips, evenly chosen."""
    videos: list[bytes] = []
    for archive in sorted(real.glob("*.zip")):
        with zipfile.ZipFile(archive) as file:
            videos += [file.read(name) for name in file.namelist() if name.endswith(".mp4")]
    return videos[:: max(1, len(videos) // kinds)][:kinds]


def write_archive(real: Path, path: Path, kinds: int, clips: int) -> float:
    """A zip of `clips` clips, `kinds` different ones; returns megabytes per clip."""
    chosen = [like_celebvtext(video) for video in real_videos(real, kinds)]
    with zipfile.ZipFile(path, "w") as file:
        for k in range(clips):
            name = f"bench_{k:05d}_0_0"
            file.writestr(f"videos/celebvtext_6/{name}.mp4", chosen[k % len(chosen)])
            for category in CATEGORIES:
                text = f"This is line one of {category}.\nAnd a second one, a little longer.\n" * 2
                file.writestr(f"texts/{category}/{name}.txt", text)
    return statistics.mean(map(len, chosen)) / 1e6


# ---------------------------------------------------------------- three ways


def decode_only(member: Member) -> int:
    """The frames up to the last one that preprocess needs, decoded and thrown away."""
    last = (SETTINGS.num_frames - 1) / SETTINGS.fps
    count = 0
    with av.open(io.BytesIO(member.read())) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            count += 1
            if frame.time is not None and frame.time > last:
                break
    return count


def straightforward(member: Member) -> np.ndarray:
    """OpenCV, PIL and float32: what a first version looks like."""
    import cv2  # type: ignore[import-not-found]

    cv2.setNumThreads(1)
    frames = []
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(member.read())
        file.flush()
        capture = cv2.VideoCapture(file.name)
        while len(frames) < STRAIGHT_FRAMES:
            good, image = capture.read()
            if not good:
                break
            rgb = Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            small = rgb.resize((STRAIGHT_SIDE, STRAIGHT_SIDE), Image.Resampling.BILINEAR)
            frames.append(np.asarray(small, np.float32) / 127.5 - 1)
        capture.release()
    return np.stack(frames)


def rate_of_decoding(archive: Path, workers: int) -> float:
    """Clips per second of `decode_only` in the same kind of processes."""
    (source,) = find_sources(archive).sources
    tasks = ((clip, (member,)) for clip, member in sorted(source.videos.items()))
    return _rate(decode_only, tasks, len(source.videos), workers, lambda _: None)


def rate_of_straightforward(archive: Path, workers: int, clips: int, out: Path) -> float:
    """Clips per second of the straightforward way, into one HDF5 file."""
    (source,) = find_sources(archive).sources
    some = sorted(source.videos.items())[:clips]
    with h5py.File(out / "straightforward.h5", "w") as file:
        count = iter(range(clips))
        rate = _rate(
            straightforward,
            ((clip, (member,)) for clip, member in some),
            len(some),
            workers,
            lambda frames: file.create_dataset(str(next(count)), data=frames),
        )
    (out / "straightforward.h5").unlink()
    return rate


def _rate(
    function: Callable[[Member], Any],
    tasks: Iterable[tuple[str, tuple]],
    clips: int,
    workers: int,
    take: Callable[[Any], object],
) -> float:
    with WorkerPool(function, workers, ["benchmarks.data"]) as pool:
        begun = None
        for _, future in pool.map(tasks):
            take(future.result())
            begun = begun or time.perf_counter()  # the first result pays for the workers' start
        assert begun is not None
        return (clips - 1) / (time.perf_counter() - begun)


def rate_of_preprocess(archive: Path, workers: int, out: Path) -> float:
    """Clips per second of our preprocess, from the start of its workers to the manifest."""
    shutil.rmtree(out / "store", ignore_errors=True)
    config = config_of(str(archive), str(out / "store"), workers)
    begun = time.perf_counter()
    summary = preprocess(config)
    return summary.clips / (time.perf_counter() - begun)


def bench_preprocess(real: Path, out: Path, workers: int, clips: int, rounds: int) -> dict:
    """The figures of `preprocess`: the median of ratios of neighbouring runs."""
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "bench.zip"
    figures = {"megabytes_per_clip": write_archive(real, archive, 4, clips)}
    decode, ours, straight = [], [], []
    for _ in range(rounds):
        decode.append(rate_of_decoding(archive, workers))
        ours.append(rate_of_preprocess(archive, workers, out))
        straight.append(rate_of_straightforward(archive, workers, max(8, clips // 20), out))
        print(f"clips/s: decode {decode[-1]:.1f}, ours {ours[-1]:.1f}, other {straight[-1]:.2f}")
    figures |= {
        "workers": workers,
        "clips": clips,
        "decode_only_clips_per_second": statistics.median(decode),
        "preprocess_clips_per_second": statistics.median(ours),
        "straightforward_clips_per_second": statistics.median(straight),
        "preprocess_over_decode_limit": _ratio(ours, decode),
        "preprocess_over_straightforward": _ratio(ours, straight),
        "hours_for_70000_clips": 70_000 / statistics.median(ours) / 3600,
    }
    return figures


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- reading


def write_big_store(root: Path, shards: int, per_shard: int, settings: StoreSettings) -> None:
    """A store of noise with short texts."""
    noise = np.random.default_rng(0).integers(0, 256, (64, *settings.shape), dtype=np.uint8)
    timestamps = np.arange(settings.num_frames) / settings.fps
    for shard in range(shards):
        name = f"big_{shard:03d}"
        ids = [f"b{shard:03d}{k:06d}x_0_0" for k in range(per_shard)]
        with ShardWriter(root, name, settings, per_shard) as writer:
            for k in range(per_shard):
                writer.append(noise[k % len(noise)], timestamps)
        texts = [to_line("One line."), to_line("And another one.")]
        lines = {category: texts for category in CATEGORIES}
        write_texts(shard_paths(root, name)[1], [lines] * per_shard)
        rows = [{"clip": c, "status": "kept", "row": k, "windows": 1} for k, c in enumerate(ids)]
        index = {"format": FORMAT, "settings": asdict(settings), "clips": rows}
        write_json(shard_paths(root, name)[2], index)


def bench_read(out: Path, batch: int, rounds: int) -> dict:
    """Collate in one process, on one file of 4.2 GB; cold against a plain sequential read."""
    root = out / "big"
    if not root.exists():
        write_big_store(root, 1, 21_500, SETTINGS)
    store = ClipStore.open(root, {"train": 1.0})
    data = CelebVTextDataset(store, "train", 0, TrainingCaptions(CaptionPolicy()))
    path = shard_paths(root, "big_000")[0]
    warm, cold, plain, both = [], [], [], []
    for k in range(rounds):
        _read(path)
        sample_ids = range(k * 10_000, k * 10_000 + 8_000, batch)
        batches = [[data.pointer(c) for c in range(n, n + batch)] for n in sample_ids]
        begun = time.perf_counter()
        for pointers in batches:
            data.collate(pointers)
        warm.append(8_000 / (time.perf_counter() - begun))
        size = path.stat().st_size
        _forget(path)
        begun = time.perf_counter()
        _read(path)
        plain.append(size / (time.perf_counter() - begun))
        _forget(path)
        begun = time.perf_counter()
        positions = list(range(len(data)))
        for n in range(0, len(positions), batch):
            data.collate([data.eval_pointer(i) for i in positions[n : n + batch]])
        cold.append(size / (time.perf_counter() - begun))
        both.append(cold[-1] / plain[-1])
        print(
            f"warm {warm[-1]:.0f} clips/s; cold {cold[-1] / 1e9:.2f} of {plain[-1] / 1e9:.2f} GB/s"
        )
    return {
        "gigabytes": path.stat().st_size / 1e9,
        "collate_warm_clips_per_second": statistics.median(warm),
        "collate_cold_gigabytes_per_second": statistics.median(cold) / 1e9,
        "sequential_read_gigabytes_per_second": statistics.median(plain) / 1e9,
        "collate_cold_over_sequential_read": statistics.median(both),
    }


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 23)
        while file.readinto(buffer):
            pass


def _forget(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_index(out: Path) -> dict:
    """70,000 clips of 2 x 2 px over 70 shards."""
    root = out / "index70"
    if not root.exists():
        write_big_store(root, 70, 1_000, StoreSettings(8.0, 2, 2))
    begun = time.perf_counter()
    store = ClipStore.open(root, SPLITS)
    opened = time.perf_counter()
    data = CelebVTextDataset(store, "train", 0, TrainingCaptions(CaptionPolicy()))
    split = time.perf_counter()
    order = ClipOrder(len(data), 0, store.shard_numbers(data.clips))
    order(random.Random(0).randrange(len(data)))
    shuffled = time.perf_counter()
    return {
        "clips": len(store),
        "open_seconds": opened - begun,
        "split_seconds": split - opened,
        "shuffle_seconds": shuffled - split,
    }


# ---------------------------------------------------------------- storage


def bench_storage(real: Path, out: Path, rounds: int) -> dict:
    """Bytes and seconds per clip of each encoding, one process, warm page cache."""
    figures: dict[str, float] = {}
    for size in (64, 128, 256):
        frames = {}
        for encoding in ("raw", "h264"):
            store = out / f"storage_{size}_{encoding}"
            config = replace(config_of(str(real), str(store), 2), size=size, encoding=encoding)
            shutil.rmtree(store, ignore_errors=True)
            preprocess(config, log=lambda _: None)
            clips = open_store(config)
            order = list(range(len(clips)))
            frames[encoding] = clips.frames(order)
            begun = time.perf_counter()
            for _ in range(rounds):
                for clip in order:
                    clips.frames([clip])
            spent = (time.perf_counter() - begun) / rounds / len(order)
            stored = sum(clips.stored(clip).size for clip in order) / len(order)
            name = f"{encoding}_16_frames_{size}_px"
            figures |= {
                f"{name}_kilobytes_per_clip": stored / 1e3,
                f"{name}_gigabytes_for_70000_clips": stored * 70_000 / 1e9,
                f"{name}_read_milliseconds": spent * 1e3,
            }
        error = frames["raw"].astype(np.float32) - frames["h264"]
        psnr = 10 * np.log10(255**2 / np.square(error).mean((1, 2, 3, 4)))
        figures[f"h264_16_frames_{size}_px_lowest_psnr_decibels"] = float(psnr.min())
        figures[f"h264_16_frames_{size}_px_mean_psnr_decibels"] = float(psnr.mean())
        figures["clips"] = len(psnr)
    return figures


# ---------------------------------------------------------------- skipping


def bench_skipping(real: Path, rounds: int) -> dict:
    """Median over clips and rounds of seconds without skipping over seconds with it."""
    figures: dict[str, float] = {}
    videos = real_videos(real, 4)
    for kind, bits in (("default_quality", None), ("5.7_megabits", BITS)):
        clips = [like_celebvtext(video, bits) for video in videos]
        for windows in ("one", "all"):
            ratios, spent = [], []
            for _ in range(rounds):
                for clip in clips:
                    with mock.patch.object(media_stream, "_is_unreferenced", lambda *_: False):
                        without = _decode_seconds(clip, windows)
                    spent.append(_decode_seconds(clip, windows))
                    ratios.append(without / spent[-1])
            name = f"{kind}_windows_{windows}"
            figures |= {
                f"{name}_without_over_with": statistics.median(ratios),
                f"{name}_lowest_ratio": min(ratios),
                f"{name}_highest_ratio": max(ratios),
                f"{name}_milliseconds_with": 1e3 * statistics.median(spent),
            }
        figures[f"{kind}_megabytes_per_clip"] = statistics.mean(map(len, clips)) / 1e6
    return figures


def _decode_seconds(clip: bytes, windows: str) -> float:
    """Processor seconds of the decoding that preprocess does."""
    begun = time.process_time()
    decode_clip(clip, SETTINGS.fps, SETTINGS.num_frames, SETTINGS.size, windows=windows)
    return time.process_time() - begun


# ---------------------------------------------------------------- memory

PREPROCESS = """
import sys
from benchmarks.data import config_of
from dalle2_video.data.preprocess.run import preprocess
if __name__ == "__main__":
    preprocess(config_of(sys.argv[1], sys.argv[2], 2))
"""
READ = """
import sys
from itertools import islice
from benchmarks.data import SPLITS
from dalle2_video.data.config import CaptionPolicy
from dalle2_video.data.sources.captions import TrainingCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, train_loader
from dalle2_video.data.store.store import ClipStore
captions = TrainingCaptions(CaptionPolicy())
data = CelebVTextDataset(ClipStore.open(sys.argv[2], SPLITS), "train", 0, captions)
for _ in islice(train_loader(data, 50, workers=1), len(data) // 50):
    pass
"""


def bench_memory(out: Path) -> dict:
    """Peak megabytes of the first process and of the largest worker: private memory that the system
    could not take back (pages of mapped files are none: it may drop them, processes share them).
    """
    figures = {}
    clips = [draw_clip(clip, FaceFormat()) for clip in plan(8, seed=0)]
    for number in (1_000, 10_000):
        root, store = out / f"memory_{number}", out / f"memory_{number}_store"
        shutil.rmtree(store, ignore_errors=True)
        for archive in range(number // 1000):
            root.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(root / f"a_{archive:02d}.zip", "w") as file:
                for k in range(1000):
                    name = f"m{archive:04d}{k:06d}_0_0"
                    video, texts = clips[k % len(clips)]
                    file.writestr(f"videos/celebvtext_6/{name}.mp4", video)
                    for folder, text in texts.items():
                        file.writestr(f"texts/{folder}/{name}.txt", text)
        for what, code in (("preprocess", PREPROCESS), ("loader", READ)):
            first, worker = peak_of([sys.executable, "-c", code, str(root), str(store)])
            figures[f"{what}_{number}_clips_first_process_megabytes"] = first
            figures[f"{what}_{number}_clips_worker_megabytes"] = worker
    return figures


def peak_of(command: list[str]) -> tuple[float, float]:
    """Peak private memory in megabytes of a command's process, and of the largest child."""
    process = psutil.Popen(command)
    first = worker = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            first = max(first, private(process))
            for child in process.children(recursive=True):
                worker = max(worker, private(child))
        time.sleep(0.2)
    assert process.returncode == 0, command
    return first / 1e6, worker / 1e6


def private(process: psutil.Process) -> int:
    """Bytes that are this process's own and written to."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def config_of(root: str, store: str, workers: int) -> DataConfig:
    """The store of these benchmarks."""
    return DataConfig(
        name="bench",
        root=root,
        out=store,
        **asdict(SETTINGS),
        split_seed=0,
        splits=SPLITS,
        workers=workers,
        seconds_per_clip=60,
        overwrite=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["preprocess", "read", "index", "memory", "storage", "skipping"]
    )
    parser.add_argument("--real", type=Path, default=Path("data/real"), help="of real_clips.py")
    parser.add_argument("--out", type=Path, default=Path("data/bench"), help="scratch space")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    if a.what == "preprocess":
        figures = bench_preprocess(a.real, a.out, a.workers, a.clips, a.rounds)
    elif a.what == "read":
        figures = bench_read(a.out, a.batch, a.rounds)
    elif a.what == "index":
        figures = bench_index(a.out)
    elif a.what == "memory":
        figures = bench_memory(a.out)
    elif a.what == "skipping":
        figures = bench_skipping(a.real, a.rounds)
    else:
        figures = bench_storage(a.real, a.out, a.rounds)
    figures |= provenance()
    write_json(Path(__file__).parent / "results" / f"data_{a.what}.json", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
