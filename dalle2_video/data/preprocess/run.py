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
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_video.data.atomic import lock, write_json
from dalle2_video.data.config import DataConfig, StoreSettings
from dalle2_video.data.preprocess.clip import TextRules, make_clip
from dalle2_video.data.preprocess.journal import Journal
from dalle2_video.data.preprocess.manifest import Summary, relative_name, write_manifest
from dalle2_video.data.preprocess.pool import WorkerLost, WorkerPool
from dalle2_video.data.preprocess.todo import (
    catalogue,
    is_there,
    known_clips,
    owners,
    remove_superseded,
)
from dalle2_video.data.sources.captions import Line
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.sources.source import Source
from dalle2_video.data.store.shard import (
    FORMAT,
    TIMESTAMPS,
    ShardWriter,
    StoreError,
    shard_paths,
)
from dalle2_video.data.store.texts import write_texts

# The second takes seconds to import: once, not per worker.
PRELOAD = (make_clip.__module__, "open_clip.tokenizer")


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
    with _lock(out, part, parts), _disk(out), _scratch(out, part) as scratch:
        found = catalogue(config, scratch)
        if config.layout is None and found.sources:
            log(f"{config.root}: {found.found}, read as data.layout={found.layout}")
        remove_superseded(config, found.sources, log)
        mine = found.sources[part - 1 :: parts]
        todo = [source for source in mine if not is_there(config, source, found.layout, log)]
        again = found.sources if config.overwrite else todo
        elsewhere = {source.name for source in found.sources} - {source.name for source in mine}
        known = known_clips(config, {source.name for source in again}, elsewhere, found.layout)
        if parts > 1:
            known |= owners(config, found.sources, known)
        made = 0
        with (
            _bar(sum(len(source.videos) for source in todo)) as bar,
            WorkerPool(make_clip, config.workers, PRELOAD, config.seconds_per_clip) as pool,
        ):
            for source in todo:
                bar.set_postfix_str(source.name)
                made += _make_shard(config, source, found.layout, known, pool, bar)
        return write_manifest(config, found, made, len(todo), begun)


# ---------------------------------------------------------------- one shard


def _make_shard(
    config: DataConfig,
    source: Source,
    layout: str,
    known: dict[str, str],
    pool: WorkerPool,
    bar: tqdm,
) -> int:
    """Writes frames, texts, then the index; returns the number of clips kept."""
    out, settings = config.store, config.settings
    frame_path, text_path, index_path = shard_paths(out, source.name)
    index_path.unlink(missing_ok=True)  # from here until the end this shard does not exist
    stamp = source.stamp()
    content = source.content()  # before the clips are read: a later change is noticed next time
    made_from = {"format": FORMAT, "settings": asdict(settings), "clips": stamp}
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
                group = {"group": source.groups[clip]} if clip in source.groups else {}
                journal.append({"clip": clip, "status": "kept", **group, **entry}, windows)
                known[clip] = source.name
            bar.update()
        kept = [clip for clip in journal.clips if clip["status"] == "kept"]
        num_bytes = journal.num_bytes - journal.still_bytes
        made = ShardWriter(out, source.name, settings, journal.rows, num_bytes, journal.stills)
        with made as shard:
            for clip, windows in zip(kept, journal.windows(), strict=True):
                if clip.get("image"):
                    shard.append_still(windows[0])
                    continue
                for window, timestamps in zip(windows, clip[TIMESTAMPS], strict=True):
                    shard.append(window, np.array(timestamps))
        write_texts(text_path, [_lines(clip) for clip in kept])
        write_json(
            index_path,
            {
                "format": FORMAT,
                "layout": layout,
                "archive": relative_name(source.archive, config.root),
                "fingerprint": source.fingerprint(),
                "stamp": stamp,
                "content": content,
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
    """(clip, arguments of `make_clip`); None for a second copy of a clip of another shard."""
    rules = TextRules(source.categories, source.columns)
    for clip, member, data in source.stream():
        if clip not in have:
            task = (clip, member, data, source.texts[clip], rules, settings)
            yield clip, None if known.get(clip, source.name) != source.name else task


def _lines(clip: Mapping[str, Any]) -> dict[str, list[Line]]:
    """The lines of a journal's clip, whose tokens a worker has found."""
    return {
        category: [Line(text, tuple(tokens)) for text, tokens in lines]
        for category, lines in clip["lines"].items()
    }


def _index_row(clip: dict[str, Any]) -> dict[str, Any]:
    """A journal's clip as the index lists it: what is needed to find it, or why it is not there."""
    names = (
        "clip",
        "status",
        "group",
        "image",
        "row",
        "seconds",
        "converted",
        "hash",
        "file",
        "cause",
    )
    number = 0 if clip.get("image") else len(clip.get("bytes", ()))
    windows = {"windows": number} if "row" in clip else {}
    return {name: clip[name] for name in names if name in clip} | windows


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
def _scratch(out: Path, part: int) -> Iterator[Path]:
    """A folder for archives that lie inside others, gone at the end, and at the next start."""
    folder = out / f".nested.{part}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
