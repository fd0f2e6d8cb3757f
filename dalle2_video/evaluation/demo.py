"""`make demo`: every stage as its own script, timed, then a table, a report and a page."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle2_video.data.atomic import write_json
from dalle2_video.evaluation.page import write_page
from dalle2_video.provenance import provenance

# Of the minutes that are left for training.
SHARES = {"clip": 0.14, "prior": 0.09, "base": 0.64, "tsr": 0.05, "ssr": 0.08}
CASCADE = ("base", "tsr", "ssr")
# Minutes of a script's start, and of sampling and judging: a + b / (GFLOP/s of float32 products).
# Measured on an EPYC without AVX-512 (150 GFLOP/s: 0.45 and 2.5) and a Xeon with it (350).
RESERVE = {"script": (0.1, 50.0), "evaluation": (0.2, 340.0)}
SAMPLES = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: a stage, its minutes of wall clock, its figure, and chance."""

    stage: str
    minutes: float
    figure: str
    chance: str


@dataclass
class Demo:
    """The demo of one budget of minutes in one folder; a finished stage is not run again."""

    minutes: float
    run_dir: str
    data: str
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.folder = Path(self.run_dir)
        self.state_path = self.folder / "demo.json"
        self.state: dict[str, Any] = {"minutes": self.minutes, "stages": {}, **provenance()}
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text())
            if self.state.get("budget", SHARES).keys() != SHARES.keys():
                raise SystemExit(f"{self.folder} holds a demo of other stages: remove it")
            if self.state["minutes"] != self.minutes:
                raise SystemExit(
                    f"{self.folder} holds a demo of {self.state['minutes']:g} minutes: remove it, "
                    f"or choose another --run-dir for one of {self.minutes:g}"
                )
        if "precision" not in self.state:
            self.state["precision"], self.state["gigaflops"] = faster_precision()

    @property
    def elapsed(self) -> float:
        """Minutes spent, earlier starts of the same demo and broken-off stages included."""
        return sum(stage["minutes"] for stage in self.state["stages"].values())

    def run(self) -> None:
        """All stages, then the page and the table."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.script("preprocess", "preprocess.py")
        if "budget" not in self.state:
            script, evaluation = (a + b / self.state["gigaflops"] for a, b in RESERVE.values())
            left = self.minutes - self.elapsed - evaluation - len(SHARES) * script
            if left <= 0:
                raise SystemExit(f"{self.minutes:g} minutes leave nothing to train in; try 20")
            self.state["budget"] = {stage: left * share for stage, share in SHARES.items()}
        for stage in ("clip", "prior"):
            minutes = f"{stage}.train.minutes={self.state['budget'][stage]:.3f}"
            self.script(stage, f"train_{stage}.py", minutes)
        for unet in CASCADE:
            minutes = f"unets.{unet}.train.minutes={self.state['budget'][unet]:.3f}"
            self.script(unet, "train_decoder.py", f"unet={unet}", minutes)
        self.script("evaluation", "evaluate.py", f"evaluate.clips={SAMPLES}", f"out={self.folder}")
        self.finish()

    def script(self, name: str, script: str, *arguments: str) -> None:
        """Run one script as a user would; note its minutes and its peak memory."""
        stage = self.state["stages"].setdefault(name, {"minutes": 0.0, "done": False})
        if stage["done"]:
            print(f"-- {name}: done already", flush=True)
            return
        command = [
            script,
            f"run_dir={self.folder}",
            f"train_name={self.folder.name}",
            f"faces.root={self.data}",
            f"mixed_precision={self.state['precision']}",
            *arguments,
            *self.overrides,
        ]
        print(f"-- {name}: python {' '.join(command)}", flush=True)
        begun = time.monotonic()
        try:
            subprocess.run([sys.executable, *command], check=True)
            stage["done"] = True
        finally:
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            stage["peak_gigabytes_so_far"] = usage.ru_maxrss / 1e6  # kB, of any child
            stage["minutes"] += (time.monotonic() - begun) / 60
            self.save()

    def save(self) -> None:
        """demo.json, whole or not at all."""
        write_json(self.state_path, self.state)

    def finish(self) -> None:
        """report.json, the page, and the table on the terminal."""
        judged = json.loads((self.folder / "report.json").read_text())
        trained = {
            f"{name}_{figure}": value
            for name in SHARES
            for figure, value in last_validation(self.folder / name / "metrics.jsonl").items()
        }
        stages = self.state["stages"]
        figures = {
            "minutes_total": self.elapsed,
            "minutes_budget": self.minutes,
            "peak_memory_gigabytes": max(s["peak_gigabytes_so_far"] for s in stages.values()),
            **{f"minutes_{name}": stage["minutes"] for name, stage in stages.items()},
            **trained,
            **judged,
            "mixed_precision": self.state["precision"],
            # of the start: a finished demo that is called again shows its own commit
            **{name: self.state[name] for name in ("commit", "hardware", "versions")},
        }
        write_json(self.folder / "report.json", figures)
        captions = json.loads((self.folder / "captions.json").read_text())
        rows = self.rows(figures)
        write_page(self.folder, captions, rows, figures, CASCADE)
        print_table(rows)
        print(f"look at {self.folder}/index.html, sheet.png and samples.mp4")

    def rows(self, f: dict[str, Any]) -> list[Row]:
        """The table."""
        ways = ("text_to_video", "video_to_text")
        both = " / ".join(f"{100 * f[f'clip_recall_at_1_{way}']:.1f} %" for way in ways)
        accuracy = (
            f"attribute accuracy {100 * f['attribute_accuracy']:.1f} % "
            f"({100 * f['attribute_accuracy_low']:.1f} to "
            f"{100 * f['attribute_accuracy_high']:.1f})"
        )
        minutes = {name: stage["minutes"] for name, stage in self.state["stages"].items()}
        return [
            Row("preprocess", minutes["preprocess"], "", ""),
            Row(
                "video CLIP",
                minutes["clip"],
                f"recall@1 on val {both}",
                f"{100 * f['clip_recall_at_1_chance']:.1f} %",
            ),
            Row(
                "prior",
                minutes["prior"],
                f"cosine to the clip's embedding, val {f['prior_cosine_to_video']:.2f}",
                f"{f['prior_cosine_to_another_video']:.2f}",
            ),
            *(
                Row(
                    name,
                    minutes[unet],
                    f"loss on val {f[f'{unet}_loss']:.4f} after {f[f'{unet}_clips']:,.0f} clips",
                    "",
                )
                for unet, name in zip(CASCADE, ("decoder", "frames", "pixels"), strict=True)
            ),
            Row(
                "sampling", minutes["evaluation"], accuracy, f"{100 * f['attribute_chance']:.1f} %"
            ),
            Row("  base alone", 0.0, f"{100 * f['accuracy_of_base']:.1f} %", ""),
            Row(
                "  shuffled captions",
                0.0,
                f"{100 * f['attribute_accuracy_shuffled']:.1f} %",
                f"{100 * f['attribute_chance_shuffled']:.1f} %",
            ),
            Row("  real clips", 0.0, f"{100 * f['ceiling_accuracy']:.1f} %", ""),
            Row("total", f["minutes_total"], f"peak {f['peak_memory_gigabytes']:.1f} GB", ""),
        ]


def faster_precision() -> tuple[str, float]:
    """ "bf16", or "no" on a CPU that has no arithmetic for it (there it is five times slower), and
    the GFLOP/s of float32.

    By the best time of a matrix product in either type.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, seconds = 512, {}
    for name, dtype in {"bf16": torch.bfloat16, "no": torch.float32}.items():
        matrix = torch.randn(size, size, device=device).to(dtype)
        torch.mm(matrix, matrix)  # not the first call, which sets up
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            torch.mm(matrix, matrix).flatten()[0].item()
            times.append(time.perf_counter() - begun)
        seconds[name] = min(times)
    return min(seconds, key=lambda name: seconds[name]), 2e-9 * size**3 / seconds["no"]


def print_table(rows: Sequence[Row]) -> None:
    """The rows in columns."""
    print(f"\n{'stage':22}{'minutes':>8}  {'figure':48}chance")
    for row in rows:
        minutes = f"{row.minutes:.1f}" if row.minutes else ""
        print(f"{row.stage:22}{minutes:>8}  {row.figure:48}{row.chance}")


def last_validation(path: Path) -> dict[str, float]:
    """The figures of the newest validation in a metrics.jsonl, without their `val/`, and its
    `clips`.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = [line for line in lines if any(key.startswith("val/") for key in line)][-1]
    return {key.removeprefix("val/"): value for key, value in last.items()}
