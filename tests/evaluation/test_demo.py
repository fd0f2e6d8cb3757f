"""`make demo`: its budget, its state, how it runs scripts, and the real thing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import demo
from dalle2_video.errors import UserError
from tests.helpers.launching import ENVIRONMENT, ROOT

# ---------------------------------------------------------------- budget and precision


def test_training_gets_what_starting_and_judging_leave() -> None:
    minutes = demo.training_minutes(20, 1.5, 340)
    # 6 starts less preprocessing's: 5 of 0.1 + 50 / 340; judging 0.2 + 340 / 340
    assert sum(minutes.values()) == pytest.approx(20 - 1.5 - 1.2 - 5 * (0.1 + 50 / 340))
    assert minutes["base"] / minutes["clip"] == pytest.approx(0.64 / 0.14)
    assert list(minutes) == ["clip", "prior", "base", "tsr", "ssr"]
    slower = demo.training_minutes(20, 1.5, 100)
    assert all(slower[stage] < minutes[stage] for stage in minutes)
    with pytest.raises(UserError, match=r"1\.5 minutes leave nothing"):
        demo.training_minutes(1.5, 0.1, 340)


def test_the_precision_is_that_of_the_faster_product() -> None:
    assert demo.faster_precision({"bf16": 0.2, "no": 0.3}) == "bf16"
    assert demo.faster_precision({"bf16": 0.5, "no": 0.1}) == "no"


@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_product_takes_as_long_as_another_clock_finds(name: str, dtype: torch.dtype) -> None:
    """By processor time over all threads, of which a product keeps at most all busy."""
    matrix = torch.randn(512, 512).to(dtype)
    found = []
    for _ in range(20):
        begun = time.process_time()
        matrix @ matrix
        found.append(time.process_time() - begun)
    threads = torch.get_num_threads()
    assert min(found) / threads / 3 < demo.product_seconds(name) < 5 * sorted(found)[10]


# ---------------------------------------------------------------- state


def test_a_new_demo_knows_its_machine(tmp_path: Path) -> None:
    state = demo.read_state(tmp_path, 20)
    assert state["minutes"] == 20 and state["stages"] == {} and demo.spent(state) == 0
    assert state["precision"] in ("no", "bf16")
    timed = 2e-9 * 512**3 / demo.product_seconds("no")
    assert timed / 5 < state["gigaflops"] < 5 * timed
    assert state["hardware"] and not (tmp_path / "demo.json").exists()


def test_a_demo_of_another_budget_or_of_other_stages_is_refused(tmp_path: Path) -> None:
    state = demo.read_state(tmp_path, 20) | {"commit": "of the start"}
    (tmp_path / "demo.json").write_text(json.dumps(state))
    assert demo.read_state(tmp_path, 20) == state  # with the commit of the start
    with pytest.raises(UserError, match="a demo of 20 minutes"):
        demo.read_state(tmp_path, 120)
    state["budget"] = {"clip": 1.0, "decoder": 3.0}
    (tmp_path / "demo.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="other stages"):
        demo.read_state(tmp_path, 20)


def test_the_folder_is_that_of_the_budget() -> None:
    assert demo.parse([]).run_dir == "runs/demo"
    assert demo.parse(["--minutes", "2.5"]).run_dir == "runs/demo2.5"
    given = demo.parse(["--minutes", "20", "--run-dir", "x", "seed=4", "sample.steps=2"])
    assert given.run_dir == "x" and given.overrides == ["seed=4", "sample.steps=2"]


# ---------------------------------------------------------------- scripts


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that notes its arguments, holds 300 MB for a moment, and fails if told so."""
    path = tmp_path / "script.py"
    path.write_text(
        "import pathlib, sys, time\n"
        "with open(pathlib.Path(__file__).with_name('calls'), 'a') as file:\n"
        "    print(*sys.argv[1:], file=file)\n"
        "held = b'x' * 300_000_000\n"
        "time.sleep(0.06)\n"
        "sys.exit('fail=yes' in sys.argv)\n"
    )
    return path


def test_a_script_runs_once_and_later_overrides_win(script: Path, capfd) -> None:
    folder, state = script.parent, {"stages": {}}
    for _ in range(2):
        demo.run_script(folder, state, ["a=1"], ["c=3"], "clip", str(script), "b=2")
    assert (folder / "calls").read_text() == "a=1 b=2 c=3\n"
    assert "clip: done already" in capfd.readouterr().out
    stage = state["stages"]["clip"]
    assert stage["done"] and 0.001 < stage["minutes"] < 1
    assert 0.3 < stage["peak_gigabytes_so_far"] < 64
    assert json.loads((folder / "demo.json").read_text()) == state


def test_what_a_failed_script_took_counts_and_it_runs_again(script: Path) -> None:
    folder, state = script.parent, {"stages": {}}
    with pytest.raises(subprocess.CalledProcessError):
        demo.run_script(folder, state, [], ["fail=yes"], "prior", str(script))
    kept = json.loads((folder / "demo.json").read_text())
    assert not kept["stages"]["prior"]["done"] and demo.spent(kept) > 0.001
    demo.run_script(folder, kept, [], [], "prior", str(script))
    assert kept["stages"]["prior"]["done"] and demo.spent(kept) > demo.spent(state) + 0.001


# ---------------------------------------------------------------- the real scripts


def start(folder: Path) -> subprocess.CompletedProcess:
    """demo.py of 3 minutes with few clips and few sampler steps."""
    few = [
        "faces.clips=160", "evaluate.clips=4", "sample.steps=2", "sample.unets.tsr.steps=2",
        "sample.unets.ssr.steps=2", "clip.train.log_every_clips=128",
        "unets.base.train.log_every_clips=16",
    ]  # fmt: skip
    command = [sys.executable, "demo.py", "--minutes", "3", "--run-dir", str(folder / "run")]
    command += ["--data", str(folder / "data"), *few]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_real_scripts_end_to_end_go_on_after_one_that_failed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # as on a machine so fast that 3 minutes leave half of them for training, on every machine
    state = demo.read_state(run, 3) | {"gigaflops": 1000.0}
    (run / "demo.json").write_text(json.dumps(state))
    (run / "prior").write_text("a file where the stage needs a folder")
    broken = start(tmp_path)
    assert broken.returncode != 0 and "train_prior.py" in broken.stderr
    state = json.loads((run / "demo.json").read_text())
    assert {name: stage["done"] for name, stage in state["stages"].items()} == {
        "preprocess": True, "clip": True, "prior": False,
    }  # fmt: skip
    weights = (run / "clip" / "model.safetensors").stat().st_mtime_ns

    (run / "prior").unlink()
    whole = start(tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert (run / "clip" / "model.safetensors").stat().st_mtime_ns == weights
    later = json.loads((run / "demo.json").read_text())
    assert later["budget"] == state["budget"]
    report = json.loads((run / "report.json").read_text())
    assert report["samples"] == 4 and report["base_clips"] > 16
    assert 0 < report["attribute_accuracy"] < 1
    assert report["minutes_prior"] > state["stages"]["prior"]["minutes"] > 0
    assert report["minutes_total"] == pytest.approx(demo.spent(later))
    assert (run / "index.html").read_text().count("<video") == 12
    assert (run / "samples.mp4").stat().st_size > 0

    again = start(tmp_path)  # nothing is left to do
    assert again.returncode == 0 and again.stdout.count("done already") == 7
    assert json.loads((run / "report.json").read_text()) == report
