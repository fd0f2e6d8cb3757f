"""What preprocess has to do: which shards stand, which are made again, which clips are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import DataConfig, StoreSettings
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.sources.member import NoClipsError
from dalle2_video.data.sources.source import Catalogue, Source
from dalle2_video.data.sources.table import Columns
from dalle2_video.data.store.shard import (
    StoreError,
    index_paths,
    is_whole_index,
    read_index,
    shard_paths,
)

PART = r"(.+)-\d\d"  # the name of a shard of a large folder, see `Clips.sources`


def catalogue(config: DataConfig, scratch: Path) -> Catalogue:
    """The sources; none where the archives were deleted after their shards were made."""
    captions = None if config.caption_columns is None else tuple(config.caption_columns)
    columns = Columns(config.file_column, config.group_column, captions)
    try:
        return find_sources(config.root, config.layout, columns, scratch, config.store)
    except NoClipsError:
        if any(index_paths(config.store)):
            return Catalogue()
        raise


def is_there(config: DataConfig, source: Source, layout: str, log: Callable[[str], None]) -> bool:
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
    if index.get("layout", "celebvtext") != layout:
        log(f"{source.archive} was read by another data.layout: made again")
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


def known_clips(
    config: DataConfig, todo: set[str], elsewhere: set[str], layout: str
) -> dict[str, str]:
    """clip id -> shard, of the shards that stay; StoreError where one has other settings, or ids of
    another layout.

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
        read_as = index.get("layout", "celebvtext")
        if layout and read_as != layout:
            raise StoreError(
                f"{path} was read as data.layout={read_as}, now it is {layout}, whose clips have "
                "other ids: choose another data.out, set data.layout, or delete that index file"
            )
        known.update((c["clip"], path.stem) for c in index["clips"] if c["status"] == "kept")
    return known


def owners(
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


def remove_superseded(
    config: DataConfig, sources: Sequence[Source], log: Callable[[str], None]
) -> None:
    """Removes the shard of a folder that is 64 shards now, or the other way round: their clips are
    made again, and must not be known twice.
    """
    root = str(Path(config.root))
    names = {source.name for source in sources if source.archive == root}
    wholes = {part[1] for name in names if (part := re.fullmatch(PART, name))}
    for path in index_paths(config.store):
        part = re.fullmatch(PART, path.stem)
        if path.stem in names or not (path.stem in wholes or (part and part[1] in names)):
            continue
        if is_whole_index(path) and read_index(path)["archive"] == Path(root).name:
            log(f"{path.stem}: the folder has another number of shards now; it is made again")
            for file in reversed(shard_paths(config.store, path.stem)):
                file.unlink(missing_ok=True)
