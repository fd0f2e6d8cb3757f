"""The front door of the scripts: --help, what they say they read, and how fast they answer."""

import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import preprocess
import sample
import train_clip
import train_decoder
import train_prior
from dalle2_video.cli import compose
from dalle2_video.reference import CONFIGS, help_text, keys_of, page
from dalle2_video.stages import config_tree
from dalle2_video.stages.config_tree import Settings
from tests.helpers.launching import ENVIRONMENT, ROOT

SCRIPTS = (preprocess, train_clip, train_prior, train_decoder, sample, evaluate)
HEAVY = ("torch", "torchvision", "open_clip", "accelerate", "av", "h5py")
LIGHT = f"""
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("typed", "status", "answer"),
    [
        (["--help"], 0, "train_name=default"),
        (["--cfg", "job"], 0, "train_name: default"),
        (["data.fpss=1"], 2, "data.fpss: unknown key; did you mean data.fps"),
        (["data.fps=-1"], 2, "data.fps: must be above 0, got -1"),
    ],
)
def test_it_answers_without_torch(script, typed, status, answer) -> None:
    if script is preprocess and typed == ["--help"]:
        answer = "data.fps=8.0"
    path = f"{script.__name__}.py"
    command = [sys.executable, "-c", f"import sys; sys.argv = {[path, *typed]}\n{LIGHT}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, "imported: []" in done.stdout) == (status, True), done.stderr
    assert answer in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


class Recorder:
    """Settings that note which of their keys are read."""

    def __init__(self, settings: Settings, read: set[str]) -> None:
        self._settings, self._read = settings, read

    def __getattr__(self, name: str) -> object:
        self._read.add(name)
        return getattr(self._settings, name)


def test_a_script_reads_what_its_help_lists(configure, run_dir, tmp_path, monkeypatch) -> None:
    read: set[str] = set()
    original = config_tree.settings_of
    monkeypatch.setattr(config_tree, "settings_of", lambda cfg: Recorder(original(cfg), read))
    out = f"out={tmp_path}"
    jobs = {
        preprocess: [["check=true"], []],
        train_clip: [[]],
        train_prior: [[]],
        train_decoder: [[]],
        sample: [["sample.steps=1", out], ["text=a man", out]],
        evaluate: [["evaluate.metric=nearest", "evaluate.clips=2", "sample.steps=1", out]],
    }
    for script, commands in jobs.items():
        read.clear()
        for typed in commands:
            try:
                script.main(configure(*typed))
            except SystemExit as ended:
                assert ended.code == 0
        # the name is read through run_dir, which holds it
        assert read | {"train_name"} == {*script.main.reads, "train_name"}, script.__name__


def test_the_help_lists_every_key_with_the_value_of_this_command_line() -> None:
    cfg = compose("experiment=celebvtext", "unet=base", "data.fps=5")
    text = help_text("What it does.", ["data", "unets", "unet"], cfg)
    assert text.startswith("What it does.\n")
    for line in ("  data.fps=5 ", "  unets.base.model.dim=128 ", "  unet=base "):
        assert line in text
    assert "unets.tsr" not in text and "clip.model" not in text
    assert "experiment=celebvtext|celebvtext_256|demo" in text and "accelerate=" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_every_key_has_a_meaning() -> None:
    keys = list(keys_of(Settings))
    assert len(keys) > 150 and len({key.name for key in keys}) == len(keys)
    assert [key.name for key in keys if not key.meaning] == []


def test_the_page_of_the_configuration_is_that_of_the_classes() -> None:
    """`python -m dalle2_video.reference > docs/configuration.md` makes it again."""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == page()
    assert Path(CONFIGS).is_dir()
