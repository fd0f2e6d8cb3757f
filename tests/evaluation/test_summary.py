"""The metrics of a run of all stages, and the table that shows those that matter."""

import pytest

from dalle2_video.errors import UserError
from dalle2_video.evaluation.summary import last_validation, print_table, summary_of, table

UNETS = ("base", "tsr", "ssr")
JUDGED = {
    "samples": 3.0, "attribute_accuracy": 0.7, "attribute_accuracy_low": 0.65,
    "attribute_accuracy_high": 0.75, "attribute_chance": 0.4, "attribute_accuracy_shuffled": 0.35,
    "attribute_chance_shuffled": 0.33, "ceiling_accuracy": 0.99, "accuracy_of_base": 0.71,
    "commit": "of the last start",
}  # fmt: skip
VALIDATION = {
    "clip": {"recall_at_1_chance": 1 / 295, "recall_at_1_text_to_video": 0.7,
             "recall_at_1_video_to_text": 0.6},
    "prior": {"loss": 0.1, "cosine_to_video": 0.9, "cosine_to_another_video": 0.4},
    "base": {"loss": 0.0123}, "tsr": {"loss": 0.0456}, "ssr": {"loss": 0.0789},
}  # fmt: skip
STATE = {
    "minutes": 20.0,
    "precision": "bf16",
    "commit": "of the first start",
    "hardware": "2 cores",
    "versions": "torch",
    "stages": {
        name: {"minutes": minutes, "peak_gigabytes_so_far": peak}
        for name, minutes, peak in (
            ("preprocess", 1.0, 0.5), ("clip", 2.0, 2.5), ("prior", 1.5, 2.5), ("base", 10.0, 3.25),
            ("tsr", 1.0, 3.25), ("ssr", 1.25, 3.25), ("evaluation", 1.0, 3.25),
        )
    },
}  # fmt: skip


def lines_of(stage: str) -> list[dict]:
    """A metrics.jsonl: two validations with training metrics around them."""
    validation = {f"val/{name}": value for name, value in VALIDATION[stage].items()}
    early = {name: 9.0 for name in validation}
    return [{"clips": 1, **early}, {"clips": 1234, **validation}, {"clips": 1300, "loss": 5.0}]


@pytest.fixture(scope="module")
def metrics() -> dict:
    return summary_of(STATE, {stage: lines_of(stage) for stage in VALIDATION}, JUDGED)


def test_last_validation_is_the_newest_with_its_clips() -> None:
    assert last_validation(lines_of("base")) == {"clips": 1234, "loss": 0.0123}
    with pytest.raises(UserError, match="no validation"):
        last_validation([{"clips": 8, "loss": 1.0}])


def test_the_summary_holds_every_stage_and_the_commit_of_the_start(metrics) -> None:
    assert metrics["minutes_total"] == pytest.approx(17.75) and metrics["minutes_budget"] == 20
    assert metrics["minutes_base"] == 10 and metrics["minutes_evaluation"] == 1
    assert metrics["peak_memory_gigabytes"] == 3.25
    assert metrics["base_loss"] == 0.0123 and metrics["base_clips"] == 1234
    assert metrics["clip_recall_at_1_video_to_text"] == 0.6
    assert metrics["attribute_accuracy"] == 0.7 and metrics["mixed_precision"] == "bf16"
    assert metrics["commit"] == "of the first start"


def test_the_table_shows_each_stage_with_its_metric_and_chance(metrics) -> None:
    rows = {row.stage: (row.minutes, row.metric, row.chance) for row in table(metrics, UNETS)}
    assert rows == {
        "preprocess": (1.0, "", ""),
        "video CLIP": (2.0, "recall@1 on val 70.0 % / 60.0 %", "0.3 %"),
        "prior": (1.5, "cosine to the clip's embedding, val 0.90", "0.40"),
        "U-Net base": (10.0, "loss on val 0.0123 after 1,234 clips", ""),
        "U-Net tsr": (1.0, "loss on val 0.0456 after 1,234 clips", ""),
        "U-Net ssr": (1.25, "loss on val 0.0789 after 1,234 clips", ""),
        "sampling": (1.0, "attribute accuracy 70.0 % (65.0 to 75.0)", "40.0 %"),
        "  base alone": (0.0, "71.0 %", ""),
        "  shuffled captions": (0.0, "35.0 %", "33.0 %"),
        "  real clips": (0.0, "99.0 %", ""),
        "total": (pytest.approx(17.75), "peak 3.2 GB", ""),
    }


def test_the_printed_columns_line_up(metrics, capsys) -> None:
    print_table(table(metrics, UNETS))
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 11
    place = head.index("metric")
    for line, row in zip(lines, table(metrics, UNETS), strict=True):
        assert line[place:].startswith(row.metric) and line.endswith(row.chance or row.metric)
        minutes = line[:place].split()[-1]
        assert minutes == f"{row.minutes:.1f}" or not row.minutes
