"""How long it takes to find the clips of large folders and tables, and how much memory.

    python -m benchmarks.scan

100,000 files (a text beside each video) in 100 folders; a table of 1,000,000 rows over 100,000
videos; a table of 1,000,000 rows whose files are not there. Each is scanned by a process of its
own; files hold one byte, since a scan reads none of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dalle2_video.data.atomic import write_json
from dalle2_video.data.sources.find import find_sources

FILES, ROWS, FOLDERS = 100_000, 1_000_000, 100
CAPTION = "A man, number {}, talks to the camera, then smiles."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", help="scan this folder and print the figures")
    parser.add_argument("--out", default="benchmarks/results/data_scan.json")
    given = parser.parse_args()
    if given.scan:
        print(json.dumps(scan(Path(given.scan))))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "folder", FILES // 2)
        write_table(root / "table", FILES)
        write_table(root / "missing", 1, named=ROWS)
        for name in ("folder", "table", "missing"):
            command = [sys.executable, "-m", "benchmarks.scan", "--scan", str(root / name)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            print(f"{name}: {found}")
            figures |= {f"{name}_{key}": value for key, value in found.items()}
    # Imports torch, and a process begins with the peak of the one that started it.
    from dalle2_video.provenance import provenance

    write_json(Path(given.out), figures | provenance())


def scan(root: Path) -> dict[str, float]:
    """Clips and problems found, seconds, and the largest memory of the process in GB."""
    begun = time.monotonic()
    catalogue = find_sources(root)
    for source in catalogue.sources:
        source.stamp()
    return {
        "seconds": time.monotonic() - begun,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "clips": sum(len(source.videos) for source in catalogue.sources),
        "problems": len(catalogue.problems),
    }


def write_folder(root: Path, clips: int) -> None:
    """Videos with texts beside them."""
    for path in paths(root, clips):
        path.with_suffix(".mp4").write_bytes(b"x")
        path.with_suffix(".txt").write_text(CAPTION.format(path.stem))


def write_table(root: Path, clips: int, named: int = FILES) -> None:
    """`clips` videos and a table of ROWS rows over `named` of their names."""
    for path in paths(root, clips):
        path.with_suffix(".mp4").write_bytes(b"x")
    with open(root / "metadata.csv", "w") as table:
        table.write("file_name,text,emotion,group\n")
        for row in range(ROWS):
            name = f"{row % named % FOLDERS:03d}/{row % named // FOLDERS:04d}.mp4"
            table.write(f'{name},"{CAPTION.format(row)}",He is calm.,{row % FOLDERS}\n')


def paths(root: Path, number: int) -> list[Path]:
    """Names without suffix, dealt to FOLDERS folders."""
    for k in range(min(number, FOLDERS)):
        (root / f"{k:03d}").mkdir(parents=True)
    return [root / f"{k % FOLDERS:03d}" / f"{k // FOLDERS:04d}" for k in range(number)]


if __name__ == "__main__":
    main()
