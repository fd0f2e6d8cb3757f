"""From a root to the clips in it: the layout is found or given, and says what belongs together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from dalle2_video.data.config import Layout
from dalle2_video.data.sources.celebvtext import CLIP_NAME, category_of, celebvtext_clips
from dalle2_video.data.sources.listing import File, Listing, list_files
from dalle2_video.data.sources.member import NoClipsError
from dalle2_video.data.sources.pairs import pair_clips, split_suffix
from dalle2_video.data.sources.source import Catalogue, Clips
from dalle2_video.data.sources.suffixes import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
)
from dalle2_video.data.sources.table import Columns, is_table, table_clips

EXPECTED = (
    "expected videos with a text of the same name beside each (a.mp4, a.txt), a metadata.csv with "
    "file_name and text, tars of a webdataset, or the archives of CelebV-Text"
)


def find_sources(
    root: str | os.PathLike[str],
    layout: Layout | None = None,
    columns: Columns | None = None,
    scratch: Path | None = None,
    store: Path | None = None,
) -> Catalogue:
    """Looks through a folder (or one archive) for clips and texts.

    layout: None finds it. columns: of tables and JSON texts. scratch, store: as in `list_files`.
    What is left out is among the problems. ArchiveError where there is nothing at all.
    """
    listing = list_files(root, scratch, store)
    tables = _tables(listing)
    layout = layout or _detect(listing, tables)
    columns = columns or Columns()
    make: dict[str, Callable[[], Clips]] = {
        "celebvtext": lambda: celebvtext_clips(listing),
        "folder": lambda: pair_clips(listing, False, columns.captions),
        "webdataset": lambda: pair_clips(listing, True, columns.captions),
        "table": lambda: table_clips(listing, tables, columns),
    }
    clips = make[layout]()
    catalogue = Catalogue(clips.sources(), listing.problems, layout, ignored=listing.ignored)
    if not catalogue.sources and not catalogue.problems:
        raise NoClipsError(f"{root} holds no clips: {EXPECTED}")
    number = sum(len(source.videos) for source in catalogue.sources)
    texts = sum(bool(texts) for source in catalogue.sources for texts in source.texts.values())
    catalogue.found = f"{number} videos and images, {texts} of them with texts"
    return catalogue


def _tables(listing: Listing) -> list[File]:
    """The tables of the layout `table`: every metadata.csv, .tsv and .jsonl, else all of them."""
    tables = [file for file in listing.files if file.path.lower().endswith(TABLE_SUFFIXES)]
    return [file for file in tables if is_table(file)] or tables


def _detect(listing: Listing, tables: list[File]) -> Layout:
    """The layout that the names of the files speak for."""
    media, texts = [], []
    for file in listing.files:
        lower = file.path.lower()
        if lower.endswith((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)):
            media.append(file)
        elif lower.endswith(TEXT_SUFFIXES):
            texts.append(file)
    if any(is_table(file) for file in tables):
        return "table"
    if any(_is_of_celebvtext(file) for file in texts):
        return "celebvtext"
    stems = {split_suffix(file.path)[0] for file in texts}
    beside = [file for file in media if split_suffix(file.path)[0] in stems]
    if beside and all(file.member.kind in ("tar", "stream") for file in media):
        return "webdataset"
    if not beside and tables and media:
        return "table"
    if not beside and all(CLIP_NAME.fullmatch(PurePosixPath(f.path).stem) for f in media):
        return "celebvtext"
    return "folder"


def _is_of_celebvtext(file: File) -> bool:
    path = PurePosixPath(file.path)
    return bool(CLIP_NAME.fullmatch(path.stem)) and category_of(path) is not None
