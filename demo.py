"""The whole path on the embedded data set, by the same scripts that a user runs: `make demo`.

    python demo.py --minutes 20

Renders and preprocesses the faces, trains the video CLIP, the prior and the U-Nets within the
budget of minutes, samples captions of `heldout` (attribute combinations that training never saw)
and judges the samples by the probe. Writes report.json, samples.mp4, sheet.png and index.html into
its folder. Started again it continues: finished stages are not run again.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dalle2_video.data.atomic import read_json, write_json
from dalle2_video.errors import UserError
from dalle2_video.evaluation.page import write_page
from dalle2_video.evaluation.summary import print_table, summary_of, table
from dalle2_video.failures import one_line_errors
from dalle2_video.provenance import provenance
from dalle2_video.training.log import read_metrics

UNETS = ("base", "tsr", "ssr")  # the cascade
SAMPLES = 64
# Of the minutes that are left for training.
SHARES = {"clip": 0.14, "prior": 0.09, "base": 0.64, "tsr": 0.05, "ssr": 0.08}
# Minutes of a script's start, and of sampling and judging: a + b / (GFLOP/s of float32 products).
# Measured on an EPYC without AVX-512 (150 GFLOP/s: 0.45 and 2.5) and a Xeon with it (350).
RESERVE = {"script": (0.1, 50.0), "evaluation": (0.2, 340.0)}
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}
PRODUCT_SIZE = 512  # of the square matrices whose product is timed

State = dict[str, Any]  # demo.json, see read_state


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    folder = Path(given.run_dir)
    state = read_state(folder, given.minutes)
    common = [
        f"run_dir={folder}",
        f"train_name={folder.name}",
        f"faces.root={given.data}",
        f"mixed_precision={state['precision']}",
    ]
    run = partial(run_script, folder, state, common, given.overrides)

    run("preprocess", "preprocess.py")
    if "budget" not in state:
        state["budget"] = training_minutes(given.minutes, spent(state), state["gigaflops"])
    minutes = {stage: f"{value:.3f}" for stage, value in state["budget"].items()}
    run("clip", "train_clip.py", f"clip.train.minutes={minutes['clip']}")
    run("prior", "train_prior.py", f"prior.train.minutes={minutes['prior']}")
    for unet in UNETS:
        length = f"unets.{unet}.train.minutes={minutes[unet]}"
        run(unet, "train_decoder.py", f"unet={unet}", length)
    run("evaluation", "evaluate.py", f"evaluate.clips={SAMPLES}", f"out={folder}")

    trained = {stage: read_metrics(folder / stage / "metrics.jsonl") for stage in SHARES}
    metrics = summary_of(state, trained, read_json(folder / "report.json"))
    write_json(folder / "report.json", metrics)
    rows = table(metrics, UNETS)
    captions = read_json(folder / "captions.json")
    write_page(folder, captions, rows, metrics, UNETS)
    print_table(rows)
    print(f"look at {folder}/index.html, sheet.png and samples.mp4")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="budget for everything (20)")
    parser.add_argument("--run-dir", help="runs/demo, or runs/demo<minutes> for another budget")
    parser.add_argument("--data", default="data/faces", help="where the faces lie or go")
    parser.add_argument("overrides", nargs="*", help="key=value for all scripts, as in configs/")
    given = parser.parse_args(arguments)
    name = "demo" if given.minutes == 20 else f"demo{given.minutes:g}"
    given.run_dir = given.run_dir or f"runs/{name}"
    return given


def read_state(folder: Path, minutes: float) -> State:
    """The state of a demo that was begun in the folder, or that of a new one.

    stages: name -> minutes, done, peak memory. budget: stage -> minutes of training. Raises
    UserError where the folder holds a demo of another budget or of other stages.
    """
    path = folder / "demo.json"
    state: State = {"minutes": minutes, "stages": {}, **provenance()}
    if path.exists():
        state = read_json(path)
        if state.get("budget", SHARES).keys() != SHARES.keys():
            raise UserError(f"{folder} holds a demo of other stages: remove it")
        if state["minutes"] != minutes:
            raise UserError(
                f"{folder} holds a demo of {state['minutes']:g} minutes: remove it, "
                f"or choose another --run-dir for one of {minutes:g}"
            )
    if "precision" not in state:
        seconds = {name: product_seconds(name) for name in DTYPES}
        state["precision"] = faster_precision(seconds)
        state["gigaflops"] = 2e-9 * PRODUCT_SIZE**3 / seconds["no"]
    return state


def run_script(
    folder: Path,
    state: State,
    common: list[str],
    overrides: list[str],
    name: str,
    script: str,
    *arguments: str,
) -> None:
    """Run one script as a user would, unless it is done; note its minutes and its peak memory.

    Raises CalledProcessError where it fails; its minutes count all the same.
    """
    stage = state["stages"].setdefault(name, {"minutes": 0.0, "done": False})
    if stage["done"]:
        print(f"-- {name}: done already", flush=True)
        return
    command = [script, *common, *arguments, *overrides]
    print(f"-- {name}: python {' '.join(command)}", flush=True)
    begun = time.monotonic()
    try:
        subprocess.run([sys.executable, *command], check=True)
        stage["done"] = True
    finally:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        stage["peak_gigabytes_so_far"] = usage.ru_maxrss / 1e6  # kB, of any child
        stage["minutes"] += (time.monotonic() - begun) / 60
        write_json(folder / "demo.json", state)


def spent(state: State) -> float:
    """Minutes so far, earlier starts of the same demo and broken-off stages included."""
    return sum(stage["minutes"] for stage in state["stages"].values())


def training_minutes(minutes: float, gone: float, gigaflops: float) -> dict[str, float]:
    """Minutes of training of each stage, out of a budget of which `gone` minutes are spent.

    gigaflops: GFLOP/s, from which the time of the rest follows. Raises UserError where nothing is
    left.
    """
    script, evaluation = (a + b / gigaflops for a, b in RESERVE.values())
    left = minutes - gone - evaluation - len(SHARES) * script
    if left <= 0:
        raise UserError(f"{minutes:g} minutes leave nothing to train in; try 20")
    return {stage: left * share for stage, share in SHARES.items()}


def product_seconds(precision: str) -> float:
    """The best time of ten products of two square matrices in this precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(DTYPES[precision])
    torch.mm(matrix, matrix)  # not the first call, which sets up
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(matrix, matrix).flatten()[0].item()
        times.append(time.perf_counter() - begun)
    return min(times)


def faster_precision(seconds: Mapping[str, float]) -> str:
    """bf16, or `no` on a CPU that has no arithmetic for it (there it is five times slower)."""
    return min(seconds, key=lambda name: seconds[name])


if __name__ == "__main__":
    with one_line_errors():
        main()
