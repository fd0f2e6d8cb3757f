"""Folders and archives of any files, for the tests of what people's disks hold."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def write_files(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Each file under its path below root; returns root."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def pack(name: str, files: Mapping[str, bytes]) -> bytes:
    """The bytes of a zip or tar, by its name."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for path, data in files.items():
                packed.writestr(path, data)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w" if name.endswith(".tar") else "w:gz") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    """A tar; mode: as `tarfile.open` takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
