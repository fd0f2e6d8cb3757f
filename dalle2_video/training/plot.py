"""Draw the curves of a run's stages.

    python -m dalle2_video.training.plot runs/run1

Reads runs/run1/<stage>/metrics.jsonl and writes <stage>/plot.png: training and validation metrics
over the clips seen, and a line per stage on the terminal. A run that is still going may be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dalle2_video.data.atomic import whole
from dalle2_video.errors import UserError
from dalle2_video.failures import one_line_errors
from dalle2_video.training.log import clock, read_metrics

LOGARITHMIC = ("loss", "grad_norm")
SHARES = ("data_wait",)
LEFT_OUT = ("clips", "seconds")
COLUMNS = 3


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{metric: {"train" or "val": [(clips, value), ...]}}; what was not finite is left out."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            if name in LEFT_OUT or value is None:
                continue
            kind = "val" if name.startswith("val/") else "train"
            series = found.setdefault(name.removeprefix("val/"), {}).setdefault(kind, [])
            series.append((line["clips"], value))
    return found


def draw(path: Path, title: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """One panel per metric, as PNG."""
    panels = curves(lines)
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, kinds) in zip(axes.flat, panels.items(), strict=False):
        for kind, series in kinds.items():
            clips, values = zip(*series, strict=True)
            axis.plot(clips, values, label=kind, marker="o" if len(clips) < 40 else None, ms=3)
            if len(clips) == 1:
                axis.annotate(f"{values[0]:.4g}", (clips[0], values[0]), fontsize=12)
            if name in LOGARITHMIC and min(values) > 0 and max(values) > 10 * min(values):
                axis.set_yscale("log")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("clips seen", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(kinds) > 1:
            axis.legend(fontsize=8)
        if name in SHARES:
            axis.set_ylim(bottom=0)
    figure.suptitle(title)
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def plot(folder: Path) -> list[str]:
    """Draw every stage of a run's folder (or the one stage that it is) -> a line for each.

    Raises SystemExit where no stage has metrics.
    """
    stages = [folder] if (folder / "metrics.jsonl").exists() else sorted(folder.iterdir())
    summary = []
    for stage in stages:
        lines = read_metrics(stage / "metrics.jsonl")
        if not lines:
            continue
        path = stage / "plot.png"
        draw(path, f"{stage.parent.name}/{stage.name}", lines)
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        summary.append(f"{path}: {lines[-1]['clips']:,} clips in {clock(max(seconds, default=0))}")
    if not summary:
        raise UserError(f"{folder}: no stage with a metrics.jsonl here")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="runs/<train_name>, or one of its stages")
    folder = parser.parse_args().run_dir
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for line in plot(folder):
        print(line)


if __name__ == "__main__":
    with one_line_errors():
        main()
