"""From archives of captioned clips to the store: the library behind preprocess.py.

Each archive becomes one shard. Decoding runs in worker processes, texts are read and tokenized
meanwhile; the shard appears whole, its index last. So a run that was killed continues with the same
command, and nothing half-written is ever read. All that is left out is listed with its cause, per
shard in index/<shard>.json and together in manifest.json. Inputs are only read.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_video.data.archives import ArchiveError, Catalogue, Member, Source, find_sources
from dalle2_video.data.atomic import write_json
from dalle2_video.data.captions import CATEGORIES, CaptionError, read_text, split_line
from dalle2_video.data.config import DataConfig, FacesConfig, open_store
from dalle2_video.data.manifest import Summary, relative_name, write_manifest
from dalle2_video.data.pool import WorkerPool, ahead
from dalle2_video.data.store import (
    FORMAT,
    Settings,
    ShardWriter,
    StoreError,
    index_paths,
    read_index,
    shard_paths,
)
from dalle2_video.data.texts import write_texts
from dalle2_video.data.video import ClipError, decode_clip

__all__ = ["DataConfig", "FacesConfig", "Summary", "open_store", "preprocess"]


def preprocess(config: DataConfig, log: Callable[[str], None] = print) -> Summary:
    """Makes the shards that are not there yet. Raises ArchiveError or StoreError, with names."""
    begun = time.monotonic()
    out = config.store
    _render_faces(config)
    if not Path(config.root).exists():
        raise ArchiveError(f"data.root={config.root} does not exist")
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        catalogue = _catalogue(config)
        todo = [source for source in catalogue.sources if not _is_there(config, source, log)]
        known = _known_clips(config, {source.name for source in todo})
        made = 0
        with (
            _bar(sum(len(source.videos) for source in todo)) as bar,
            WorkerPool(config.workers, __name__) as pool,
        ):
            for source in todo:
                bar.set_postfix_str(source.name)
                made += _make_shard(config, source, known, pool, bar)
        return write_manifest(config, catalogue.problems, made, len(todo), begun)


# ---------------------------------------------------------------- what there is to do


def _render_faces(config: DataConfig) -> None:
    """The embedded data set, where it was begun or where there is nothing else to read."""
    root, faces = Path(config.root), config.faces
    if faces is None:
        return
    begun = (root / "faces.json").exists()
    if not begun and root.exists() and (any(index_paths(config.store)) or _has_archives(root)):
        return
    from dalle2_video.data.faces import write_dataset

    write_dataset(
        root,
        faces.clips,
        faces.size,
        faces.fps,
        faces.seconds,
        faces.seed,
        config.splits,
        config.workers,
        split_seed=config.split_seed,
    )


def _has_archives(root: Path) -> bool:
    try:
        return bool(find_sources(root))
    except ArchiveError:
        return False


def _catalogue(config: DataConfig) -> Catalogue:
    """The sources; none where the archives were deleted after their shards were made."""
    try:
        return find_sources(config.root)
    except ArchiveError:
        if any(index_paths(config.store)):
            return Catalogue()
        raise


def _is_there(config: DataConfig, source: Source, log: Callable[[str], None]) -> bool:
    """Whether the shard stands whole with these settings; StoreError where with other ones."""
    path = config.store / "index" / f"{source.name}.json"
    if config.overwrite or not path.exists():
        return False
    try:
        index = read_index(path)
    except StoreError as error:
        log(f"{error}; it is made again")
        return False
    if Settings(**index["settings"]) != config.settings:
        raise StoreError(
            f"{path} was made with {index['settings']}, data asks for {asdict(config.settings)}: "
            "choose another data.out or set data.overwrite=true"
        )
    for file in shard_paths(config.store, source.name)[:2]:
        if not file.exists():
            log(f"{file} is missing; it is made again")
            return False
    if index["fingerprint"] != source.fingerprint():
        log(f"{source.archive} has changed since its shard {source.name} was made: made again")
        return False
    return True


def _known_clips(config: DataConfig, todo: set[str]) -> dict[str, str]:
    """clip id -> shard, of the shards that stay; StoreError where one has other settings."""
    known = {}
    for path in index_paths(config.store):
        if path.stem in todo:
            continue
        index = read_index(path)
        if Settings(**index["settings"]) != config.settings:
            raise StoreError(
                f"{path} was made with {index['settings']} and its archive is not here: choose "
                "another data.out, or delete that index file, its shard and its texts"
            )
        known.update((c["clip"], path.stem) for c in index["clips"] if c["status"] == "kept")
    return known


# ---------------------------------------------------------------- one shard


def _make_shard(
    config: DataConfig, source: Source, known: dict[str, str], pool: WorkerPool, bar: tqdm
) -> int:
    """Writes frames, texts, then the index; returns the number of clips kept."""
    out, settings = config.store, config.settings
    _, text_path, index_path = shard_paths(out, source.name)
    index_path.unlink(missing_ok=True)  # from here until the end this shard does not exist
    clips: list[dict[str, Any]] = []
    notes: list[dict[str, str]] = []
    texts: list[Mapping[str, list[str]]] = []
    lines_split = 0

    def tasks() -> Iterator[tuple[_Job, Future | None]]:
        for clip, member, data in source.stream():
            job = _Job(clip, member, *_read_texts(source, clip))
            if clip in known:
                job.cause = f"a second copy: shard {known[clip]} holds this clip"
            elif not job.lines:
                job.cause = "without text: no category has a usable file"
            yield job, None if job.cause else pool.submit(_decode, member, data, settings)

    with ShardWriter(out, source.name, settings) as shard:
        for job, future in ahead(tasks(), 4 * max(config.workers, 1)):
            try:
                result = job.cause if future is None else future.result()
            except BrokenProcessPool as error:
                raise ArchiveError(
                    f"a worker died, out of memory or in the decoder, at or soon after clip "
                    f"{job.clip} of {source.archive}: use fewer data.workers, or remove that clip"
                ) from error
            bar.update()
            notes += job.notes
            if isinstance(result, str):
                clips.append(
                    {
                        "clip": job.clip,
                        "status": "skipped",
                        "file": job.member.name,
                        "cause": result,
                    }
                )
                continue
            frames, times = result
            row = shard.append(frames, times)
            texts.append(job.lines)
            lines_split += job.lines_split
            known[job.clip] = source.name
            ends = [round(float(times[0]), 6), round(float(times[-1]), 6)]
            clips.append({"clip": job.clip, "status": "kept", "row": row, "seconds": ends})
        write_texts(text_path, texts)
    write_json(
        index_path,
        {
            "format": FORMAT,
            "archive": relative_name(source.archive, config.root),
            "fingerprint": source.fingerprint(),
            "settings": asdict(settings),
            "clips": clips,
            "texts_left_out": notes,
            "lines_split": lines_split,
        },
    )
    return len(texts)


@dataclass
class _Job:
    """A clip on its way: its usable lines by category, text files left out, why it is skipped."""

    clip: str
    member: Member
    lines: dict[str, list[str]]
    notes: list[dict[str, str]]
    lines_split: int
    cause: str = ""


def _read_texts(
    source: Source, clip: str
) -> tuple[dict[str, list[str]], list[dict[str, str]], int]:
    """(lines of at most 77 tokens by category, files left out and why, lines that were split)."""
    lines: dict[str, list[str]] = {}
    notes = []
    lines_split = 0
    for category in CATEGORIES:
        member = source.texts[clip].get(category)
        cause = "missing"
        if member is not None:
            try:
                whole = read_text(member.read())
                pieces = [split_line(line) for line in whole]
                lines[category] = [piece for line in pieces for piece in line]
                lines_split += sum(len(line) > 1 for line in pieces)
                continue
            except (CaptionError, ArchiveError) as error:
                cause = str(error)
        file = member.name if member is not None else f"{category}/{clip}.txt"
        notes.append({"clip": clip, "category": category, "file": file, "cause": cause})
    return lines, notes, lines_split


def _decode(
    member: Member, data: bytes | None, settings: Settings
) -> tuple[np.ndarray, np.ndarray] | str:
    """(frames, times), or the cause why there are none. Runs in a worker."""
    try:
        if member.kind == "folder":
            source: bytes | Path = Path(member.archive) / member.name
        else:
            source = member.read() if data is None else data
        clip = decode_clip(source, settings.fps, settings.num_frames, settings.size)
    except (ClipError, ArchiveError) as error:
        return str(error)
    return clip.frames, clip.times


def _bar(total: int) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit="clip", desc="preprocess", mininterval=interval, disable=not total
    )


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One preprocess per store at a time; the lock goes with the process, however it ends."""
    with open(out / ".preprocess.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another preprocess is writing into {out}") from error
        yield
