"""From archives of captioned clips to the store: the library behind preprocess.py.

Each archive becomes one shard. Worker processes read, decode and tokenize; finished clips go to a
journal, and when the archive is through the shard appears whole, its index last. So a run that was
killed continues at the clip where it was with the same command, and nothing half-written is ever
read. All that is left out is listed with its cause, per shard in index/<shard>.json and together in
manifest.json. Inputs are only read.
"""

from __future__ import annotations

import errno
import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_video.data.atomic import lock, write_json
from dalle2_video.data.config import CATEGORIES, DataConfig, StoreSettings
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.encode import encode_window
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.preprocess.journal import Journal
from dalle2_video.data.preprocess.manifest import Summary, relative_name, write_manifest
from dalle2_video.data.preprocess.pool import WorkerLost, WorkerPool
from dalle2_video.data.sources.archives import Catalogue, Source, find_sources
from dalle2_video.data.sources.captions import CaptionError, Line, read_text, split_line, to_line
from dalle2_video.data.sources.member import ArchiveError, Member
from dalle2_video.data.store.shard import (
    FORMAT,
    TIMESTAMPS,
    ShardWriter,
    StoreError,
    index_paths,
    is_whole_index,
    read_index,
    shard_paths,
)
from dalle2_video.data.store.texts import write_texts

PRELOAD = (__name__, "open_clip.tokenizer")  # the second takes seconds: once, not per worker


def preprocess(
    config: DataConfig, log: Callable[[str], None] = print, part: int = 1, parts: int = 1
) -> Summary:
    """Makes the shards that are not there yet, or every `parts`-th archive of them.

    part: 1 .. parts; each part may run on its own machine, and the last one writes a manifest of
    all shards. Raises ArchiveError or StoreError, with names.
    """
    if not 1 <= part <= parts:
        raise StoreError(f"part={part} parts={parts}: part must be 1 to {parts}")
    begun = time.monotonic()
    out = config.store
    if not Path(config.root).exists():
        raise ArchiveError(f"data.root={config.root} does not exist")
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out, part, parts), _disk(out):
        catalogue = _catalogue(config)
        mine = catalogue.sources[part - 1 :: parts]
        todo = [source for source in mine if not _is_there(config, source, log)]
        again = catalogue.sources if config.overwrite else todo
        elsewhere = {source.name for source in catalogue.sources} - {source.name for source in mine}
        known = _known_clips(config, {source.name for source in again}, elsewhere)
        if parts > 1:
            known |= _owners(config, catalogue.sources, known)
        made = 0
        with (
            _bar(sum(len(source.videos) for source in todo)) as bar,
            WorkerPool(_make_clip, config.workers, PRELOAD, config.seconds_per_clip) as pool,
        ):
            for source in todo:
                bar.set_postfix_str(source.name)
                made += _make_shard(config, source, known, pool, bar)
        return write_manifest(config, catalogue.problems, made, len(todo), begun)


# ---------------------------------------------------------------- what there is to do


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
    if StoreSettings(**index["settings"]) != config.settings:
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


def _known_clips(config: DataConfig, todo: set[str], elsewhere: set[str]) -> dict[str, str]:
    """clip id -> shard, of the shards that stay; StoreError where one has other settings.

    elsewhere: shards of other parts, which make theirs again where it is damaged or of old format.
    """
    known = {}
    for path in index_paths(config.store):
        if path.stem in todo or (path.stem in elsewhere and not is_whole_index(path)):
            continue
        index = read_index(path)
        if StoreSettings(**index["settings"]) != config.settings:
            raise StoreError(
                f"{path} was made with {index['settings']} and its archive is not here: choose "
                "another data.out, or delete that index file, its shard and its texts"
            )
        known.update((c["clip"], path.stem) for c in index["clips"] if c["status"] == "kept")
    return known


def _owners(
    config: DataConfig, sources: Sequence[Source], known: Mapping[str, str]
) -> dict[str, str]:
    """clip id -> the first archive that holds it, of those without a shard: parts must agree."""
    owners: dict[str, str] = {}
    for source in sources:
        if config.overwrite or not is_whole_index(shard_paths(config.store, source.name)[2]):
            for clip in source.videos:
                if clip not in known:
                    owners.setdefault(clip, source.name)
    return owners


# ---------------------------------------------------------------- one shard


def _make_shard(
    config: DataConfig, source: Source, known: dict[str, str], pool: WorkerPool, bar: tqdm
) -> int:
    """Writes frames, texts, then the index; returns the number of clips kept."""
    out, settings = config.store, config.settings
    frame_path, text_path, index_path = shard_paths(out, source.name)
    index_path.unlink(missing_ok=True)  # from here until the end this shard does not exist
    made_from = {"format": FORMAT, "settings": asdict(settings), "clips": source.fingerprint()}
    with Journal(frame_path.parent, source.name, made_from, config.overwrite) as journal:
        have = {clip["clip"] for clip in journal.clips}
        bar.update(len(have))
        for clip, future in pool.map(_tasks(source, settings, known, have)):
            try:
                made = future.result()
            except WorkerLost as error:
                made = {"cause": str(error), "lost": True}, None
            if made is None:
                made = {"cause": f"a second copy: shard {known[clip]} holds this clip"}, None
            entry, windows = made
            if windows is None:
                file = source.videos[clip].name
                journal.append({"clip": clip, "status": "skipped", "file": file, **entry})
            else:
                journal.append({"clip": clip, "status": "kept", **entry}, windows)
                known[clip] = source.name
            bar.update()
        kept = [clip for clip in journal.clips if clip["status"] == "kept"]
        with ShardWriter(out, source.name, settings, journal.rows, journal.num_bytes) as shard:
            for clip, windows in zip(kept, journal.windows(), strict=True):
                for window, timestamps in zip(windows, clip[TIMESTAMPS], strict=True):
                    shard.append(window, np.array(timestamps))
        write_texts(text_path, [_lines(clip) for clip in kept])
        write_json(
            index_path,
            {
                "format": FORMAT,
                "archive": relative_name(source.archive, config.root),
                "fingerprint": source.fingerprint(),
                "settings": asdict(settings),
                "clips": [_index_row(clip) for clip in journal.clips],
                "texts_left_out": [n for clip in journal.clips for n in clip.get("notes", ())],
                "lines_split": sum(clip["lines_split"] for clip in kept),
            },
        )
        journal.remove()
    return len(kept)


def _tasks(
    source: Source, settings: StoreSettings, known: dict[str, str], have: set[str]
) -> Iterator[tuple[str, tuple | None]]:
    """(clip, arguments of `_make_clip`); None for a second copy of a clip of another shard."""
    for clip, member, data in source.stream():
        if clip not in have:
            task = (clip, member, data, source.texts[clip], settings)
            yield clip, None if known.get(clip, source.name) != source.name else task


def _lines(clip: Mapping[str, Any]) -> dict[str, list[Line]]:
    """The lines of a journal's clip, whose tokens a worker has found."""
    return {
        category: [Line(text, tuple(tokens)) for text, tokens in lines]
        for category, lines in clip["lines"].items()
    }


def _index_row(clip: dict[str, Any]) -> dict[str, Any]:
    """A journal's clip as the index lists it: what is needed to find it, or why it is not there."""
    names = ("clip", "status", "row", "seconds", "hash", "file", "cause")
    windows = {"windows": len(clip["bytes"])} if "row" in clip else {}
    return {name: clip[name] for name in names if name in clip} | windows


def _make_clip(
    clip: str,
    member: Member,
    data: bytes | None,
    texts: Mapping[str, Member],
    settings: StoreSettings,
) -> tuple[dict[str, Any], list[np.ndarray] | None]:
    """What the journal lists of a clip, and its windows as stored, or None. Runs in a worker."""
    lines, notes, lines_split = _read_texts(texts, clip)
    entry: dict[str, Any] = {"notes": notes} if notes else {}
    if not lines:
        return {**entry, "cause": "without text: no category has a usable file"}, None
    try:
        if member.kind == "folder":
            file: bytes | Path = Path(member.archive) / member.name
        else:
            file = member.read() if data is None else data
        s = settings
        decoded = decode_clip(file, s.fps, s.num_frames, s.size, 0.0, s.span, s.windows)
        frames = decoded.frames.reshape(-1, *s.shape)
        if s.encoding == "h264":
            windows = [encode_window(window, s.fps) for window in frames]
        else:
            windows = list(frames)
    except (ClipError, ArchiveError) as error:
        return {**entry, "cause": str(error)}, None
    except Exception as error:  # whatever a damaged file sets off: it must not end a run of 70,000
        return {**entry, "cause": f"unreadable: {type(error).__name__}: {error}"}, None
    seconds = decoded.timestamps.round(6).tolist()
    entry |= {"lines": lines, "lines_split": lines_split, "seconds": [seconds[0], seconds[-1]]}
    return {**entry, TIMESTAMPS: decoded.timestamps.reshape(-1, s.num_frames).tolist()}, windows


def _read_texts(
    texts: Mapping[str, Member], clip: str
) -> tuple[dict[str, list[tuple[str, tuple[int, ...]]]], list[dict[str, str]], int]:
    """(lines with their tokens by category, files left out and why, lines that were split)."""
    lines: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    notes = []
    lines_split = 0
    for category in CATEGORIES:
        member = texts.get(category)
        cause = "missing"
        if member is not None:
            try:
                whole = read_text(member.read())
                pieces = [split_line(line) for line in whole]
                found = [to_line(piece) for line in pieces for piece in line]
                lines[category] = [(line.text, line.tokens) for line in found]
                lines_split += sum(len(line) > 1 for line in pieces)
                continue
            except (CaptionError, ArchiveError) as error:
                cause = str(error)
        file = member.name if member is not None else f"{category}/{clip}.txt"
        notes.append({"clip": clip, "category": category, "file": file, "cause": cause})
    return lines, notes, lines_split


def _bar(total: int) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit="clip", desc="preprocess", mininterval=interval, disable=not total
    )


@contextmanager
def _lock(out: Path, part: int, parts: int) -> Iterator[None]:
    """One preprocess per store, or one per part; the locks go with the process, however it ends."""
    with ExitStack() as files:
        try:
            whole = files.enter_context(open(out / ".preprocess.lock", "w"))
            lock(whole, (fcntl.LOCK_EX if parts == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if parts > 1:
                own = files.enter_context(open(out / f".preprocess.{part}of{parts}.lock", "w"))
                lock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another preprocess is writing into {out}") from error
        yield


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turns the error of a full disk into a StoreError that names the remedy."""
    try:
        yield
    except OSError as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.errno in full or "No space left" in str(error):
            raise StoreError(
                f"the disk of {out} is full ({error.strerror or error}): finished shards are whole;"
                " make room and run the same command, it goes on where it stopped"
            ) from error
        raise
