"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dalle2_video.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, flushed to disk, if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a user's file, without a byte order mark. UserError, with the place, where it is
    not UTF-8.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file; UserError, with the place, where it is damaged."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; UserError, with `where` it stands and the place, where damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); restore or remove it") from error


def lock(file: IO[Any], how: int) -> None:
    """`fcntl.flock`; on a file system without locks a warning, and no lock."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn(
            f"{file.name}: its file system has no locks; start nothing else that writes there",
            stacklevel=2,
        )
