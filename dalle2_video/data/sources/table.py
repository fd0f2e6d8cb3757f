"""The layout `table`: metadata.csv, .tsv or .jsonl with a file name, captions and a group per row.

    file_name,text,emotion,group
    a.mp4,"A man talks, then nods.",He is calm.,person 1

Each column of captions is a category named by its header. Several rows of one file, and several
lines of one cell, are several captions. File names are relative to the table's folder, or to the
root. Hugging Face's `videofolder` and `imagefolder` have this layout.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dalle2_video.data.sources.listing import File, Listing
from dalle2_video.data.sources.member import ArchiveError, Member, Problem
from dalle2_video.data.sources.pairs import split_suffix
from dalle2_video.data.sources.source import Clips
from dalle2_video.data.sources.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from dalle2_video.errors import UserError

FILE_COLUMNS = (
    *("file_name", "file", "filename", "path", "file_path", "filepath"),
    *("video", "video_path", "video_file", "image", "image_path", "image_file"),
)
GROUP_COLUMNS = ("group",)
# Notes of downloaders: never captions.
BOOKKEEPING = frozenset(
    {
        *(
            "key",
            "id",
            "url",
            "status",
            "error_message",
            "sha256",
            "md5",
            "hash",
            "exif",
            "license",
        ),
        *("__key__", "__url__", "split", "date", "timestamp", "mime", "format", "extension"),
    }
)
TABLE_HEADER = 1 << 16  # bytes in which the first line ends
csv.field_size_limit(1 << 20)


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, as the user says; None: found by their names."""

    file: str | None = None
    group: str | None = None
    captions: tuple[str, ...] | None = None


class TableError(ArchiveError):
    """A table that cannot be read; the message is the cause."""


class ColumnError(UserError):
    """A column that the configuration names and a table lacks."""


def captions_of(row: Mapping[str, Any], columns: Sequence[str] | None) -> dict[str, list[str]]:
    """Category -> captions of a row, or of a JSON text. columns: None takes every value with words
    but those of BOOKKEEPING.
    """
    found = {}
    for name in [name for name in row if name not in BOOKKEEPING] if columns is None else columns:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str) and text.strip()]
        if columns is None:
            texts = [text for text in texts if not _is_number(text)]
        if texts:
            found[name] = texts
    return found


def is_table(file: File) -> bool:
    """Whether a file is a table by its name."""
    return posixpath.basename(file.path).lower() in (
        *("metadata.csv", "metadata.tsv", "metadata.jsonl"),
    )


def table_clips(listing: Listing, tables: Sequence[File], columns: Columns) -> Clips:
    """The clips that rows name. Rows without their file, files without a row, and tables that
    cannot be read are listed as problems.
    """
    clips = Clips(listing.root.resolve().name, listing.problems)
    media = _Media(listing)
    for table in tables:
        try:
            _read_table(table, columns, media, clips)
        except ColumnError:
            raise
        except (ArchiveError, csv.Error, ValueError) as error:
            cause = f"the rest of the table is not read: {error}"
            clips.leave_out(table.member, cause)
    for file in media.files.values():
        clip = split_suffix(file.path)[0]
        if media.named.get(clip) is file:
            clips.add(file.container, clip, file.member)
        else:
            clips.leave_out(file.member, "no row of a table names it")
    others = [file for file in listing.files if file not in tables]
    suffixes = (split_suffix(file.path)[1] for file in others)
    listing.ignored.update(s for s in suffixes if s not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
    return clips


@dataclass
class _Media:
    """Videos and images by their paths; names are compared in Unicode's composed form."""

    listing: Listing
    files: dict[str, File] = field(default_factory=dict)
    stems: dict[str, File] = field(default_factory=dict)  # a video before an image
    named: dict[str, File] = field(default_factory=dict)  # clip id -> the file of its first row

    def __post_init__(self) -> None:
        self.root = self.listing.root.resolve().as_posix() + "/"
        for file in self.listing.files:
            stem, suffix = split_suffix(file.path)
            if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES:
                self.files[_composed(file.path)] = file
                first = self.stems.setdefault(_composed(stem), file)
                if suffix in VIDEO_SUFFIXES and split_suffix(first.path)[1] in IMAGE_SUFFIXES:
                    self.stems[_composed(stem)] = file

    def find(self, name: str, folder: str) -> File | None:
        """The file that a row of a table in `folder` names, with or without suffix."""
        name = _composed(name.strip().replace("\\", "/")).removeprefix(self.root)
        for base in (folder, ""):
            path = posixpath.normpath(posixpath.join(base, name))
            if path in self.files:
                return self.files[path]
            if path in self.stems:
                return self.stems[path]
        return None


def _read_table(table: File, wanted: Columns, media: _Media, clips: Clips) -> None:
    """Adds the captions and groups of every row; TableError where it has no fitting columns."""
    folder, name = posixpath.split(table.path)
    data = _checked(table.member)
    columns = _columns(data, name, wanted)
    archive = table.member.shown_archive
    for number, row in _rows(data, name):
        where = f"{table.member.name}:{number}"
        file_name = row.get(columns.file) if columns.file else None
        if None in row:
            cause = "has more cells than the header: put texts with commas into double quotes"
        elif not isinstance(file_name, str) or not file_name.strip():
            cause = f"names no file in its column {columns.file}"
        elif (file := media.find(file_name, folder)) is None:
            cause = f"{file_name} is not there"
        elif (first := media.named.setdefault(split_suffix(file.path)[0], file)) is not file:
            cause = f"{file_name} and {first.path} have one id: rename one of them"
        else:
            _add_row(row, columns, where, split_suffix(file.path)[0], table.member, clips)
            continue
        clips.problems.append(Problem(archive, where, cause))


def _add_row(
    row: Mapping[str, Any], columns: Columns, where: str, clip: str, table: Member, clips: Clips
) -> None:
    group = str(row.get(columns.group) or "").strip() if columns.group else ""
    first = clips.groups.setdefault(clip, group or clip)
    if group and group != first:
        cause = f"puts {clip} into group {group}, a row before it into {first}"
        clips.problems.append(Problem(table.shown_archive, where, cause))
    for category, texts in captions_of(row, columns.captions).items():
        found = clips.texts.setdefault(clip, {}).setdefault(category, [])
        before = [found[0].data] if found and found[0].data else []
        data = b"\n".join([*before, *(text.encode() for text in texts)])
        place = found[0].name if found else where
        found[:] = [
            Member(table.archive, "cell", place, len(data), 0, data, zlib.crc32(data), table.origin)
        ]


# ---------------------------------------------------------------- reading


def _checked(member: Member) -> bytes:
    """The bytes of a table, which are UTF-8."""
    data = member.read()
    try:
        data.decode("utf-8")
        return data
    except UnicodeDecodeError as error:
        raise TableError(
            f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


def _rows(data: bytes, name: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    """(line number, row) of a table; the key None holds cells that the header does not name."""
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    if name.lower().endswith(".jsonl"):
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, _json_row(line, number)
        return
    first = 0
    header = data[:TABLE_HEADER].decode("utf-8-sig", "ignore").split("\n", 1)[0]
    delimiter = "\t" if name.lower().endswith(".tsv") else _delimiter(header)
    if hint := re.fullmatch(r"sep=(.)\r?", header, re.I):  # of Excel, for itself
        delimiter, first = hint[1], 1
        text.readline()
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if len(set(names)) != len(names):
        raise TableError(f"two columns have one name: {', '.join(names)}")
    reader.fieldnames = names
    try:
        for row in reader:
            yield first + reader.line_num, row
    except csv.Error as error:
        raise TableError(f"line {first + reader.reader.line_num}: {error}") from error


def _json_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TableError(f"line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise TableError(f"line {number} is no JSON object")
    return row


def _delimiter(header: str) -> str:
    """A comma, or what spreadsheets of other countries write instead."""
    return "," if "," in header else ";" if ";" in header else "\t" if "\t" in header else ","


def _columns(data: bytes, name: str, wanted: Columns) -> Columns:
    """The columns of a table: file, group or None, and those of captions."""
    seen: dict[str, bool] = {}  # column -> whether it has words
    for _, row in _rows(data, name):
        for column, value in row.items():
            if column is not None and not seen.get(column):
                seen[column] = not isinstance(value, str | int | float) or not _is_number(value)
    asked = [("file_column", wanted.file), ("group_column", wanted.group)]
    for key, column in [*asked, *(("caption_columns", one) for one in wanted.captions or ())]:
        if column is not None and _one_of(seen, (column,)) is None:
            raise ColumnError(f"data.{key}: no column {column} in {name}, it has {', '.join(seen)}")
    file = _one_of(seen, FILE_COLUMNS if wanted.file is None else (wanted.file,))
    if file is None:
        raise TableError(
            f"no column names the files: the first line must be a header such as file_name,text, "
            f"or data.file_column one of {', '.join(map(str, seen)) or 'none'}"
        )
    group = _one_of(seen, GROUP_COLUMNS if wanted.group is None else (wanted.group,))
    captions = wanted.captions
    if captions is None:
        others = {file, group, *BOOKKEEPING}
        captions = tuple(c for c, words in seen.items() if words and c not in others)
    else:
        captions = tuple(found for one in captions if (found := _one_of(seen, (one,))))
    return Columns(file, group, captions)


def _one_of(seen: Mapping[str, bool], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column, whatever its case."""
    lower = {column.lower(): column for column in seen}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return not str(value).strip() if value is not None else True
    return True


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
