"""Figures and pictures of what benchmarks/learned_variance.py has run.

    python -m benchmarks.learned_variance_figures

Writes benchmarks/results/learned_variance.json and the pictures of docs/learned_variance.md. Cells
of which nothing is in runs/learned_variance keep the figures that they had; pictures that need one
of them stay as they are. "values" are figures of an earlier recipe, which learned the fraction of
each value (commit b981604).
"""

import itertools
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from benchmarks.learned_variance import (
    FOLDER,
    RESULTS,
    ROOT,
    STEPS,
    Divergence,
    cells,
    embedded,
    network,
    same_cell,
    sample,
)
from dalle2_video.data.atomic import write_json
from dalle2_video.evaluation.likelihood import FIXED
from dalle2_video.provenance import provenance

IMAGES = ROOT / "docs" / "images"
STUDENT = (  # by degrees of freedom, 95 %
    math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
    2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
SAMPLED = {
    "x0, 600 steps": ("worth_x0", "fresh_x0"),
    "x0, 2,000 steps": ("long_x0",),
    "v, 600 steps": ("worth_v", "fresh_v"),
}
SHOWN = {"naive": "C1", "fixed": "C0", "ours": "C2"}


def read() -> dict[str, list[dict]]:
    """The runs of each cell."""
    found: dict[str, list[dict]] = {}
    for name, cell in cells().items():
        paths = [FOLDER / f"{name}_{seed}.json" for seed in cell.all_seeds]
        if runs := [json.loads(path.read_text()) for path in paths if same_cell(path, cell)]:
            found[name] = runs
    return found


def summary(runs: list[dict]) -> dict[str, float]:
    """Figures of one cell: means over its seeds, quantiles over all their steps."""
    trunk, head = (
        np.concatenate([run["curves"][f"{part}_norm"] for run in runs])
        for part in ("trunk", "head")
    )
    share = np.concatenate([run["curves"]["share_of_term"] for run in runs])
    figures: dict[str, float] = {
        "runs": len(runs),
        "diverged": sum(run["diverged_at"] is not None for run in runs),
        "diverged_by_simple": sum(
            any(map(Divergence().add, run["curves"]["simple"])) for run in runs
        ),
        "gradient_not_finite": sum(run["gradient_not_finite_at"] is not None for run in runs),
        "outside": float(np.mean([x for r in runs for x in r["curves"].get("outside", ())] or 0)),
        "simple_at_the_end": float(np.mean([np.mean(r["curves"]["simple"][-50:]) for r in runs])),
    }
    for name, values in (("trunk", trunk), ("head", head), ("both", np.hypot(trunk, head))):
        finite = values[np.isfinite(values)]  # the others are counted above
        figures[f"norm_{name}_median"] = float(np.median(finite))
        figures[f"norm_{name}_999"] = float(np.quantile(finite, 0.999))
    clip = runs[0]["clip"]
    if clip is not None:  # what the head's gradient takes from the trunk's step
        shrunk = np.minimum(1, clip / np.hypot(trunk, head)) / np.minimum(1, clip / trunk)
        figures["shrunk_by_head_mean"] = float(shrunk.mean())
        figures["shrunk_by_head_least"] = float(shrunk.min())
    if len(share):
        figures["share_of_term_median"] = float(np.median(share))
        figures["share_of_term_95"] = float(np.quantile(share, 0.95))
    judged = [run for run in runs if "val_simple" in run]
    for name in judged[0] if judged else ():
        if name.startswith(("val_", "bits_", "frechet_")):
            values = np.array([run[name] for run in judged if name in run])
            if len(values) < len(judged):
                continue  # samples of some runs are still to come
            figures[name] = values.mean()
            figures[f"{name}_half_width"] = half_width(values)
            if name.endswith("_learned"):
                kind = name.removesuffix("learned")
                for other in FIXED:
                    if kind + other not in judged[0]:
                        continue
                    base = [run[kind + other] for run in judged]
                    less = np.array(base) - values
                    figures[f"{name}_less_than_{other}"] = less.mean()
                    figures[f"{name}_less_than_{other}_half_width"] = half_width(less)
    figures["judged"] = len(judged)
    return {name: round(float(v), 6) for name, v in figures.items() if math.isfinite(v)}


def against(runs: list[dict], fixed: list[dict]) -> dict[str, float]:
    """L_simple on val over that of fixed variance, in pairs of runs of one seed that were both
    judged, and the quantile of the gradient norm over its, of the same seeds.
    """

    def norm_999(these: list[dict], those: list[dict]) -> float:
        seeds = {run["seed"] for run in those}
        return summary([run for run in these if run["seed"] in seeds])["norm_both_999"]

    base = {run["seed"]: run["val_simple"] for run in fixed if "val_simple" in run}
    pairs = [
        run["val_simple"] / base[run["seed"]]
        for run in runs
        if "val_simple" in run and run["seed"] in base
    ]
    ratio = np.array(pairs)
    figures = {
        "pairs": len(ratio),
        "val_simple_over_fixed": ratio.mean() if len(ratio) else math.nan,
        "val_simple_over_fixed_half_width": half_width(ratio) if len(ratio) else math.nan,
        "norm_999_over_fixed": norm_999(runs, fixed) / norm_999(fixed, runs),
    }
    return {name: round(float(v), 6) for name, v in figures.items() if math.isfinite(v)}


def draw_anatomy(found: dict) -> None:
    """The median norms, by step."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for colour, name in enumerate(("x0", "v", "eps")):
        for recipe, style in (("naive", "-"), ("ours", ":")):
            values = found[f"{name}_{recipe}"]["median"]
            axis.loglog(
                found["steps"], values, style, color=f"C{colour}", label=f"{name}, {recipe}"
            )
    axis.set(xlabel="step of 1,000 (1 ends at the clip)", ylabel="norm, median of 64 clips")
    axis.set_title("gradient of one clip's term at the raw fraction")
    axis.legend(ncol=3, loc="lower left")
    save(figure, IMAGES / "learned_variance_anatomy.png")


def draw(found: dict[str, list[dict]]) -> None:
    """benchmarks/results/learned_variance.json, and the pictures of docs/learned_variance.md."""
    figures: dict[str, dict[str, float]] = {}
    for name, runs in found.items():
        figures[name] = summary(runs)
        fixed = name.rpartition("_")[0] + "_fixed"
        if fixed in found and fixed != name:
            figures[name] |= against(runs, found[fixed])
        print(f"{name:40}", figures[name])
    path = RESULTS / "learned_variance.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: value for name, value in before.items() if name in (*cells(), "values")}
    commits = {name: sorted({run["commit"] for run in runs}) for name, runs in found.items()}
    commits = {name: of for name, of in before.get("commits", {}).items() if name in kept} | commits
    write_json(path, kept | figures | provenance() | {"commits": commits})
    stress = {name.removeprefix("stress_"): runs for name, runs in found.items()}
    stress = {name: runs for name, runs in stress.items() if name.startswith(("usual", "hard"))}
    if all(f"{where}_fp32_{name}" in stress for where in ("usual", "hard") for name in SHOWN):
        draw_recipes(stress)
        draw_gradients(stress)
    if (path := RESULTS / "learned_variance_anatomy.json").exists():
        draw_anatomy(json.loads(path.read_text()))
    if all(name in found for names in SAMPLED.values() for name in names):
        draw_worth(
            {title: [r for n in names for r in found[n]] for title, names in SAMPLED.items()}
        )


def draw_recipes(stress: dict[str, list[dict]]) -> None:
    """Of each cell how many runs diverge, the spikes, and the loss against fixed variance."""
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 5.5), sharey=True, gridspec_kw={"width_ratios": (1, 3, 3)}
    )
    names = sorted(stress, key=lambda name: name.rsplit("_", 1)[0])
    for row, name in enumerate(names):
        runs, where = stress[name], name.rsplit("_", 1)[0]
        base = {run["seed"]: run for run in stress[f"{where}_fixed"]}
        colour = {"hard_fp32": "C1", "hard_bf16": "C3", "usual_fp32": "C0"}[where]
        pairs = [run for run in runs if "val_simple" in run and run["seed"] in base]
        ratio = [run["val_simple"] / base[run["seed"]]["val_simple"] for run in pairs]
        diverged = sum(run["diverged_at"] is not None for run in runs)
        axes[0].barh(row, diverged / len(runs), color=colour)
        axes[0].text(0.05, row, f"{diverged} of {len(runs)}", va="center", fontsize=8)
        norms = [summary([run])["norm_both_999"] for run in runs]
        axes[1].scatter(norms, [row] * len(runs), 8, colour)
        axes[2].scatter(ratio, [row] * len(ratio), 8, colour)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0].invert_yaxis()
    axes[0].set(xlim=(0, 1), xlabel="runs that diverge")
    axes[1].set(xscale="log", xlabel="99.9th percentile of the gradient norm, by run")
    axes[2].set(xscale="log", xlabel="L_simple on val / that of fixed, by seed")
    axes[2].axvline(1, color="grey", linewidth=0.5)
    save(figure, IMAGES / "learned_variance_recipes.png")


def draw_gradients(stress: dict[str, list[dict]]) -> None:
    """Norms over time: median, 10th to 90th percentile and largest, over seeds and 15 steps."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.5), sharex=True, sharey=True)
    places = itertools.product(enumerate(("usual", "hard")), enumerate(("trunk", "head")))
    for (row, setting), (column, part) in places:
        axis = axes[row, column]
        for name, colour in SHOWN.items():
            curves = [run["curves"][f"{part}_norm"] for run in stress[f"{setting}_fp32_{name}"]]
            length = min(map(len, curves)) // 15 * 15
            values = np.array([curve[:length] for curve in curves]).reshape(len(curves), -1, 15)
            if not values.any():
                continue
            values = values.transpose(1, 0, 2).reshape(length // 15, -1)
            low, middle, high, top = np.quantile(values, (0.1, 0.5, 0.9, 1), axis=1)
            time = np.arange(length // 15) * 15 + 7
            axis.plot(time, middle, label=name, linewidth=1, color=colour)
            axis.fill_between(time, low, high, alpha=0.2, linewidth=0, color=colour)
            axis.plot(time, top, ":", linewidth=1, color=colour)
        axis.set(yscale="log", title=f"{setting}: gradient norm, {part} (dotted: largest)")
        axis.legend(loc="lower left", ncol=3)
    axes[1, 0].set_xlabel("step")
    axes[1, 1].set_xlabel("step")
    save(figure, IMAGES / "learned_variance_gradients.png")


def draw_worth(sampled: dict[str, list[dict]]) -> None:
    """Bits per dimension, and Frechet distance over the number of steps, both minus those of beta~
    with the same seed; bars are 95 % intervals over the seeds that were sampled with that number.
    """
    figure, axes = plt.subplots(2, len(sampled), figsize=(4 * len(sampled), 6), squeeze=False)
    colours = {"middle": "C1", "upper": "C2", "learned": "C3"}
    labels = ["middle", "beta", "learned"]
    for column, (title, runs) in enumerate(sampled.items()):
        above, below = axes[:, column]
        for i, (name, colour) in enumerate(colours.items()):
            less = [run[f"bits_{name}"] - run["bits_lower"] for run in runs]
            above.scatter(less, [i] * len(runs), color=colour)
            steps, values = [], []
            for n in STEPS:
                some = [run for run in runs if f"frechet_{n}_{name}" in run]
                if some:
                    steps.append(n * (0.96 + 0.04 * i))
                    kind = f"frechet_{n}_"
                    values.append(
                        np.array([run[kind + name] - run[kind + "lower"] for run in some])
                    )
            if steps:
                below.errorbar(
                    steps,
                    [less.mean() for less in values],
                    [half_width(less) for less in values],
                    label=labels[i],
                    capsize=3,
                    color=colour,
                )
        above.set_yticks(range(len(colours)), labels)
        above.locator_params(axis="x", nbins=5)
        above.set_xlabel("bits per dimension less those of beta~, by seed")
        above.set_title(f"prediction {title}")
        below.axhline(0, color="grey", linewidth=0.5)
        below.set(xscale="log", xlabel="ancestral steps", ylabel="Frechet distance less beta~'s")
        below.set_xticks(STEPS, STEPS)
        below.minorticks_off()
        below.legend(loc="lower right")
    save(figure, IMAGES / "learned_variance_worth.png")


def draw_samples(data_root: Path) -> None:
    """Clips of val, and what the first network of long_x0 makes in 25 steps."""
    cell = cells()["long_x0"]
    net = network(cell.recipe)
    average = load_file(FOLDER / "long_x0_0.safetensors")
    net.load_state_dict(net.state_dict() | average)
    _, held_out = embedded(data_root)
    rows = [held_out[:6]]
    for name in ("lower", "upper", "learned"):
        rows.append(sample(net, cell, name, 25, 0, "cpu", len(rows[0])))
    path = IMAGES / "learned_variance_small_samples.png"
    draw_clips(rows, ["clips of val", "beta~", "beta", "learned"], path)


def draw_clips(rows: list[torch.Tensor], names: list[str], path: Path) -> None:
    """A picture of uint8 clips (N, F, H, W, 3), a row of each name: three frames of each clip."""
    sheet = np.concatenate(
        [np.concatenate([clip[f].numpy() for clip in row for f in (0, 4, 7)], 1) for row in rows]
    )
    figure, axis = plt.subplots(figsize=(12, 3))
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks(rows[0].shape[2] * (np.arange(len(rows)) + 0.5), names)
    axis.set_xticks([])
    save(figure, path)


def half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval of the mean of values (seeds, ...), by Student's t."""
    if len(values) < 2:
        return np.full(values.shape[1:], math.nan)
    return STUDENT[len(values) - 1] * values.std(0, ddof=1) / len(values) ** 0.5


def save(figure: Figure, path: Path) -> None:
    """As PNG, and closed."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(read())
    if (FOLDER / "long_x0_0.safetensors").exists():
        draw_samples(Path("data/faces"))
