"""Errors as users meet them: one line, exit status 2, and the table of docs/usage.md."""

import errno
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_video import failures
from dalle2_video.data.atomic import read_text
from dalle2_video.data.preprocess.manifest import Summary
from dalle2_video.data.store.splits import split_of
from dalle2_video.errors import UserError
from dalle2_video.faces.writer import read_attributes
from dalle2_video.failures import line_of, one_line_errors
from dalle2_video.training.accelerator import chosen_precision, make_accelerator
from dalle2_video.training.config import RunConfig, TrainConfig
from dalle2_video.training.config_guard import config_of
from dalle2_video.training.log import read_metrics
from tests.helpers.launching import ENVIRONMENT, ROOT, launch_command

ROW = re.compile(r"^\| `python (\S+\.py) (.*)` \| (.*) \|$", re.M)
ROWS = [match.groups() for match in ROW.finditer((ROOT / "docs/usage.md").read_text())]


def test_the_table_is_there() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize(("script", "typed", "printed"), ROWS, ids=lambda part: str(part)[:40])
def test_the_table_of_mistakes_is_true(
    script, typed, printed, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(typed)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert (capsys.readouterr().err.splitlines()[-1], ended.value.code) == (printed, 2)


def error_of(function, *arguments) -> Exception:
    """What the call raises."""
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("raises nothing")


def no_space(name: str | None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([name] if name else []))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a: b\n  c"), "a: b; c"),
        (no_space("/x/y"), "/x/y: no space left; make room, then run the same command again"),
        (
            RuntimeError("unable to write, errno = 28, error message = 'No space left on device'"),
            "the disk is full: no space left; make room, then run the same command again",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied"),
        (subprocess.CalledProcessError(3, ["python", "a b"]), "python 'a b': ended with status 3"),
        (ValueError("some bug"), None),
        (KeyError("some bug"), None),
        (OSError("without a file"), None),
    ],
)
def test_the_line_of_an_error(error, line) -> None:
    found = line_of(error)
    assert found is None if line is None else found is not None and found.startswith(line)


def test_a_check_of_ours_is_a_line_and_a_bug_is_none() -> None:
    checked = error_of(split_of, "x" * 11, 0, {"train": 0.5})
    assert line_of(checked) == "split fractions must be at least 0 and sum to 1: {'train': 0.5}"
    bug = error_of(split_of, None, 0, {"train": "1"})
    assert line_of(bug) is None


def test_a_damaged_file_is_named_with_the_place(tmp_path, monkeypatch) -> None:
    """Metrics, a run's configuration and the launch's DeepSpeed file."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"clips": 1}\n{"clips": \n{"cut short')
    run = tmp_path / "config.yaml"
    run.write_text("a: [1\n")
    launch = tmp_path / "deepspeed.json"
    launch.write_text("{")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(launch))
    settings = TrainConfig(), RunConfig(str(tmp_path))
    for error, start in (
        (error_of(read_metrics, metrics), f"{metrics}, line 2: not JSON ("),
        (error_of(config_of, tmp_path), f"{run}: not YAML ("),
        (error_of(make_accelerator, *settings), f"{launch}: not JSON ("),
    ):
        line = line_of(error)
        assert line is not None and line.startswith(start) and "\n" not in line
    for path in (metrics, run, launch):
        path.write_bytes(b"caf\xe9")
        with pytest.raises(UserError, match=re.escape(f"{path}: not UTF-8 at byte 3 (0xe9)")):
            read_text(path)


def test_out_of_memory_says_what_to_make_smaller() -> None:
    import torch

    line = line_of(error_of(torch.empty, 1 << 60))
    assert line is not None and "smaller micro_batch_size" in line and "\n" not in line


OUTCOME = re.compile(r"^\| ([^|]+) \| ([^|]+) \|$", re.M)


def test_the_table_of_outcomes_is_true(tmp_path, monkeypatch, capsys) -> None:
    """Each line of the second table, as the code prints it; "..." is what varies."""
    import torch

    page = (ROOT / "docs/usage.md").read_text().split("| what happened |")[1].split("\n\n")[0]
    rows = {match[1]: match[2] for match in OUTCOME.finditer(page) if "---" not in match[0]}
    cause = "no whole archive: File is not a zip file"
    empty = Summary(0, 0, 1, 0, {"no whole archive": 1}, 0, {}, 0, 0.0, 0.0, {}, cause, "store")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    sections = error_of(chosen_precision, "no")
    launch = tmp_path / "deepspeed.json"
    launch.write_text('{"optimizer": {"type": "Adam"}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(launch))
    with pytest.raises(SystemExit), one_line_errors():
        raise KeyboardInterrupt
    printed = {
        "the disk is full": line_of(no_space("/x/y")),
        "`evaluate.py` on clips": line_of(error_of(read_attributes, tmp_path / "attributes.jsonl")),
        "no clip is usable": line_of(error_of(empty.raise_if_empty)),
        "`--mixed_precision bf16`": line_of(sections),
        "a DeepSpeed file": line_of(error_of(make_accelerator, TrainConfig(), RunConfig("x"))),
        "Ctrl-C": capsys.readouterr().err.strip(),
        "memory runs out": line_of(error_of(torch.empty, 1 << 60)),
    }
    assert len(rows) == len(printed)
    for what, line in printed.items():
        (cell,) = (cell for row, cell in rows.items() if row.startswith(what))
        quoted = re.findall(r"`([^`]+)`", cell)[0]
        pattern = re.escape(quoted).replace(r"\.\.\.", ".*")
        assert line is not None and re.search(pattern, line), f"{what}: {line}"


def test_a_text_that_is_not_utf8_names_its_file_and_byte(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa man")
    assert read_text(path) == "a man"
    for data, place in ((b"caf\xe9", "byte 3 (0xe9)"), (b"\xff\xfea\0", "byte 0 (0xff)")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(f"{path}: not UTF-8 at {place}")):
            read_text(path)


def test_an_interruption_and_a_closed_pipe_end_quietly(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    command = f"{sys.executable} preprocess.py --help | head -1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.startswith("Turn archives")


def test_all_of_it_is_shown_on_demand(monkeypatch) -> None:
    monkeypatch.setattr(failures, "WANTS_TRACEBACK", True)
    with pytest.raises(UserError), one_line_errors():
        raise UserError("a")


RANKS = """
import os
from dalle2_video.errors import UserError
from dalle2_video.failures import one_line_errors
with one_line_errors():
    if os.environ["RANK"] in "{failing}":
        raise UserError("wrong here")
    import time
    time.sleep(8)
"""


@pytest.mark.parametrize(
    ("failing", "printed"), [("01", ["wrong here"]), ("1", ["rank 1: wrong here"])]
)
def test_of_two_ranks_one_prints_the_line(failing, printed, tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(failing=failing))
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch_command("ddp"), str(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "wrong here" in line]
    assert done.returncode != 0 and lines == printed


def test_the_traceback_is_there_on_demand(tmp_path: Path) -> None:
    command = [sys.executable, "preprocess.py", f"data.root={tmp_path}/none"]
    shown = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | {"HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 1 and "Traceback" in shown.stderr
