"""From the command line to a script: texts, old names, several jobs, SLURM."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import sample
from dalle2_video.cli import (
    check_names,
    compose,
    name_jobs,
    quote_texts,
    sweep_folder,
    without_effect,
)
from dalle2_video.config import ConfigError
from tests.helpers.launching import ENVIRONMENT, ROOT


@pytest.mark.parametrize(
    "text",
    [
        "a woman with long blond hair turns left and starts to smile, warm light from the right",
        "it's \"fine\", isn't it? (yes!) {no} [x]; 5 % = a",
        "two lines,\nof one text",
        "'Hello', she says",
        '"yes" and "no"',
        "back\\slash \\",
        "costs ${seed} dollars",
    ],
)
def test_a_text_arrives_as_it_was_typed(text) -> None:
    assert compose(*quote_texts([f"text={text}"])).text == text


def test_what_is_quoted_or_a_list_stays() -> None:
    typed = ["text='a, b'", "text=[a man nods,warm light]", "text=null", "out=null", "seed=1"]
    assert quote_texts(typed) == typed
    assert list(compose(typed[1]).text) == ["a man nods", "warm light"]


@pytest.mark.parametrize("key", ["run_dir", "file", "out", "data.root", "faces.root"])
def test_a_path_arrives_as_it_was_typed(key) -> None:
    for path in ("runs/x/unets.base.train.lr=0.001", "a, b (1)/ü", "~/clips", "it's"):
        (value,) = quote_texts([f"{key}={path}"])
        cfg = compose(value)
        assert OmegaConf.select(cfg, key) == path.replace("~/", f"{Path.home()}/")


def test_a_name_of_digits_is_a_name() -> None:
    cfg = compose(*quote_texts(["train_name=20240501_1203", "run_dir=runs/${train_name}"]))
    assert (cfg.train_name, cfg.run_dir) == ("20240501_1203", "runs/20240501_1203")


def test_sample_without_a_text_takes_an_example(monkeypatch, tmp_path) -> None:
    def read(text, file, num_samples):
        assert "blond hair" in text and file is None and num_samples == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle2_video.pipeline.cascade.read_texts", read)
    with pytest.raises(KeyboardInterrupt):
        sample.main(compose(f"run_dir={tmp_path}"))


@pytest.mark.parametrize(
    ("typed", "now"),
    [
        ("size=celebvtext", "experiment=celebvtext"),
        ("preset=small", "unets/base=small"),
        ("preset=base", "unets/base=large"),
        ("number=2", "num_samples=2"),
        ("keep_stages=true", "save_intermediates=true"),
        ("evaluate.split=combo", "evaluate.split=heldout"),
        ("validation=combo", "validation=heldout"),
        ("data.splits={train: 0.9, combo: 0.1}", "data.splits={train: 0.9, heldout: 0.1}"),
        ("data.faces.clips=8", "faces.clips=8"),
        ("sample.stages.tsr.steps=4", "sample.unets.tsr.steps=4"),
        ("sample.stages.ssr.window=16", "sample.unets.ssr.tile=16"),
        ("unets.base.images=8", "unets.base.num_images=8"),
        ("unets.base.image_only=0.5", "unets.base.image_only_prob=0.5"),
        ("unets.tsr.drop.all=0.1", "unets.tsr.cond_dropout.all=0.1"),
        ("unets.tsr.window=8", "unets.tsr.crop_frames=8"),
        ("unets.ssr.model.low_size=64", "unets.ssr.model.lowres_size=64"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(typed, now) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{typed}: is now {now}")):
        check_names(["train_name=x", typed])
    assert check_names(["train_name=x", "use_wandb=true"]) == ["train_name=x", "use_wandb=true"]
    if not now.startswith("data.splits"):
        compose(now)  # and Hydra takes it


def test_a_job_of_a_sweep_has_a_folder_of_its_own_and_finds_what_the_run_has(tmp_path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_text("x")
    folder = Path(sweep_folder(str(tmp_path), "unets.base.train.lr=1e-3,data.name=a/b"))
    assert folder == tmp_path / "unets.base.train.lr=1e-3,data.name=a_b"
    assert (folder / "clip" / "model.safetensors").read_text() == "x"
    assert not (folder / "prior").exists()
    (tmp_path / "zoom").mkdir()  # trained since, under a name of one's own
    (tmp_path / "zoom" / "model.safetensors").write_text("x")
    assert sweep_folder(str(tmp_path), "unets.base.train.lr=1e-3,data.name=a/b") == str(folder)
    assert (folder / "zoom").is_symlink()
    assert sweep_folder(str(tmp_path), "") == str(tmp_path) and not (tmp_path / "clip").is_symlink()


def test_several_jobs_of_one_command_each_run_in_their_folder(tmp_path) -> None:
    """The real multirun, as far as the check of the store: no job is refused by the first one's."""
    (tmp_path / "x").mkdir()
    command = [sys.executable, "-c", SWEEP, "-m", f"run_dir={tmp_path}", "train_name=x"]
    command += ["clip.train.lr=1e-3,2e-3", "seed=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    names = ["clip.train.lr=0.001 0.001", "clip.train.lr=0.002 0.002"]
    assert folders == [f"{tmp_path}/{name}" for name in names]


def test_names_with_a_comma_are_several_jobs(tmp_path) -> None:
    command = [sys.executable, "-c", SWEEP, "-m", "train_name=20240501,b's", "clip.train.lr=1e-3"]
    command += [f"run_dir={tmp_path}/" + "${train_name}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    jobs = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert jobs == [f"{tmp_path}/20240501 0.001", f"{tmp_path}/b's 0.001"], done.stderr


def test_a_job_with_a_wrong_value_leaves_no_folder(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("x")
    command = [sys.executable, "-c", SWEEP, "-m", f"run_dir={tmp_path}", "clip.train.lr=1e-3,-1"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "clip.train.lr: must be above 0" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "base",
        "clip.train.lr=0.001",
    ]


def test_a_comma_in_a_text_or_a_path_begins_no_other_job(tmp_path) -> None:
    folder = tmp_path / "a, b (1) = ü"
    folder.mkdir()
    command = [sys.executable, "-c", SWEEP, "-m", f"run_dir={folder}", "text=it's red, not blue"]
    command += [f"data.root={folder}/x,y", "clip.train.lr=1e-3,2e-3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert jobs == [f"{folder}/clip.train.lr={lr} {lr}" for lr in ("0.001", "0.002")]


SWEEP = """
from dalle2_video.config import ConfigError
from dalle2_video.cli import script
@script()
def main(cfg):
    print(cfg.run_dir, cfg.clip.train.lr)
main()
"""


def test_a_job_is_named_by_what_differs_between_jobs() -> None:
    typed = ["-m", "train_name=x", "clip.train.lr=1e-3,2e-3", "unet=tsr,ssr", "seed=1"]
    first, word, *rest = name_jobs(typed)
    assert [first, *rest] == typed
    assert word.endswith("exclude_keys=['train_name','run_dir','unet','train_name','seed']")
    assert name_jobs(typed[1:]) == typed[1:]


@pytest.mark.parametrize("place", ["first", "last"])
def test_several_jobs_may_be_asked_for_at_either_end(place: str, tmp_path: Path) -> None:
    words = ["-m", f"run_dir={tmp_path}/none", "text=a,b", "num_samples=0,-1"]
    words = words if place == "first" else [*words[1:], words[0]]
    done = subprocess.run(
        [sys.executable, "sample.py", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("num_samples: must be above 0, got 0")


def test_what_a_script_does_not_read_is_named() -> None:
    typed = ["experiment=demo", "seed=1", "text=a, b", "+unets.base.train.lr=1", "-m", "clip=small"]
    typed += ["hydra.verbose=true", "sample.steps=2", "unets/base=small", "~data.out"]
    found = without_effect(typed, sample.main.reads)
    assert found == ["seed", "unets.base.train.lr", "clip", "unets/base"]
    done = subprocess.run(
        [sys.executable, "sample.py", "seed=1", "run_dir=/none/run"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()
    assert said[0] == "not read by this script: seed" and done.returncode == 2


def test_slurm_has_a_launcher() -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "clip.train.lr=1e-3"]
    compose()  # the defaults are registered
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = hydra_compose("config", overrides, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.partition == "gpu"
    # it signals the job in time to save, and the same job goes on
    assert launcher.signal_delay_s >= 120 and launcher.max_num_timeout > 0
    assert launcher.tasks_per_node == 1 and launcher.gpus_per_node >= 1
