"""A run of all stages in one flat dictionary of metrics, and those that matter as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dalle2_video.errors import UserError


@dataclass(frozen=True)
class Row:
    """One line of the table: a stage, its minutes (0: not shown), its metric, and chance."""

    stage: str
    minutes: float
    metric: str
    chance: str = ""


def last_validation(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest validation among the lines of a metrics.jsonl, without its `val/`, with `clips`.

    Raises ValueError where there was none.
    """
    for line in reversed(lines):
        if any(key.startswith("val/") for key in line):
            return {key.removeprefix("val/"): value for key, value in line.items()}
    raise UserError("no validation was logged: the training ended before its first one")


def summary_of(
    state: Mapping[str, Any],
    trained: Mapping[str, Sequence[Mapping[str, Any]]],
    judged: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known of a run of all stages, flat.

    state: demo.json. trained: stage -> lines of its metrics.jsonl, of which the last validation
    stands as <stage>_<metric>. judged: what evaluate.py wrote. commit, hardware and versions are
    those of the start.
    """
    stages = state["stages"]
    return {
        "minutes_total": sum(stage["minutes"] for stage in stages.values()),
        "minutes_budget": state["minutes"],
        "peak_memory_gigabytes": max(s["peak_gigabytes_so_far"] for s in stages.values()),
        **{f"minutes_{name}": stage["minutes"] for name, stage in stages.items()},
        **{
            f"{name}_{metric}": value
            for name, lines in trained.items()
            for metric, value in last_validation(lines).items()
        },
        **judged,
        "mixed_precision": state["precision"],
        **{name: state[name] for name in ("commit", "hardware", "versions")},
    }


def percent(share: float) -> str:
    """A share of 1 in percent, with one digit."""
    return f"{100 * share:.1f} %"


def table(metrics: Mapping[str, Any], unets: Sequence[str]) -> list[Row]:
    """The rows of a `summary_of`; unets: those of the cascade, first to last, at least two."""
    m = metrics
    both = " / ".join(
        percent(m[f"clip_recall_at_1_{way}"]) for way in ("text_to_video", "video_to_text")
    )
    interval = (
        f"{100 * m['attribute_accuracy_low']:.1f} to {100 * m['attribute_accuracy_high']:.1f}"
    )
    trained = [
        Row(
            f"U-Net {unet}",
            m[f"minutes_{unet}"],
            f"loss on val {m[f'{unet}_loss']:.4f} after {m[f'{unet}_clips']:,.0f} clips",
        )
        for unet in unets
    ]
    return [
        Row("preprocess", m["minutes_preprocess"], ""),
        Row(
            "video CLIP",
            m["minutes_clip"],
            f"recall@1 on val {both}",
            percent(m["clip_recall_at_1_chance"]),
        ),
        Row(
            "prior",
            m["minutes_prior"],
            f"cosine to the clip's embedding, val {m['prior_cosine_to_video']:.2f}",
            f"{m['prior_cosine_to_another_video']:.2f}",
        ),
        *trained,
        Row(
            "sampling",
            m["minutes_evaluation"],
            f"attribute accuracy {percent(m['attribute_accuracy'])} ({interval})",
            percent(m["attribute_chance"]),
        ),
        Row(f"  {unets[0]} alone", 0.0, percent(m[f"accuracy_of_{unets[0]}"])),
        Row(
            "  shuffled captions",
            0.0,
            percent(m["attribute_accuracy_shuffled"]),
            percent(m["attribute_chance_shuffled"]),
        ),
        Row("  real clips", 0.0, percent(m["ceiling_accuracy"])),
        Row("total", m["minutes_total"], f"peak {m['peak_memory_gigabytes']:.1f} GB"),
    ]


def print_table(rows: Sequence[Row]) -> None:
    """The rows in columns."""
    print(f"\n{'stage':22}{'minutes':>8}  {'metric':48}chance")
    for row in rows:
        minutes = f"{row.minutes:.1f}" if row.minutes else ""
        print(f"{row.stage:22}{minutes:>8}  {row.metric:48}{row.chance}".rstrip())
