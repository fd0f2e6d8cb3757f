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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dalle2_video.data.sources.captions import Line
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.sources.source import Catalogue, Source
from dalle2_video.data.sources.table import Columns
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

PRELOAD = (
    make_clip.__module__,
    "open_clip.tokenizer",
)  # the second takes seconds: once, not per worker


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
        catalogue = _catalogue(config, scratch)
        if config.layout is None and catalogue.sources:
            log(f"{config.root}: {catalogue.found}, read as data.layout={catalogue.layout}")
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
            WorkerPool(make_clip, config.workers, PRELOAD, config.seconds_per_clip) as pool,
        ):
            for source in todo:
                bar.set_postfix_str(source.name)
                made += _make_shard(config, source, known, pool, bar)
        return write_manifest(config, catalogue, made, len(todo), begun)


# ---------------------------------------------------------------- what there is to do


def _catalogue(config: DataConfig, scratch: Path) -> Catalogue:
    """The sources; none where the archives were deleted after their shards were made."""
    captions = None if config.caption_columns is None else tuple(config.caption_columns)
    columns = Columns(config.file_column, config.group_column, captions)
    try:
        return find_sources(config.root, config.layout, columns, scratch, config.store)
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
    if index["fingerprint"] != source.fingerprint() or _has_other_content(index, source, path):
        log(f"{source.archive} has changed since its shard {source.name} was made: made again")
        return False
    return True


def _has_other_content(index: dict[str, Any], source: Source, path: Path) -> bool:
    """Whether files of the same sizes hold something else than when the shard was made.

    Files are only read where their stamps differ; where the content is the same, as after a copy,
    the new stamps are noted. A shard of older code knows no content: it is taken as it is.
    """
    stamp = source.stamp()
    if index.get("stamp") == stamp:
        return False
    content = source.content()
    if index.get("content", content) != content:
        return True
    write_json(path, {**index, "stamp": stamp, "content": content})
    return False


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
