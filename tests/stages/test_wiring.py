"""From the command line to what the scripts pass around."""

from pathlib import Path

import pytest

import preprocess
from dalle2_video.cli import compose, quote_texts, sweep_folder
from dalle2_video.config import ConfigError
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.store.shard import StoreError
from dalle2_video.faces.writer import FacesError
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.wiring import run_config, store_of
from dalle2_video.training.trackers import TrackerError


def test_a_missing_wandb_key_is_found_before_any_work(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(TrackerError, match="WANDB_API_KEY"):
        cfg = compose("use_wandb=true", f"run_dir={tmp_path}/run")
        run_config(settings_of(cfg), cfg, "base")
    assert not (tmp_path / "run").exists()


def test_the_embedded_faces_are_made_where_they_are_missing(tmp_path, capsys) -> None:
    small = ["faces.clips=8", "faces.size=32", "data.workers=0", f"faces.root={tmp_path}"]
    store = store_of(settings_of(compose(*small)))
    assert len(store) == 8 and "no clips yet" in capsys.readouterr().out
    assert len(store_of(settings_of(compose(*small)))) == 8
    assert "no clips yet" not in capsys.readouterr().out  # once
    with pytest.raises(FacesError, match=r"faces\.json: other settings \(clips: 8 there, 9 here\)"):
        store_of(settings_of(compose(*small, "faces.clips=9")))
    mistyped = tmp_path / "mistyped"
    with pytest.raises(StoreError, match="run preprocess"):  # nothing is rendered elsewhere
        store_of(settings_of(compose(*small, f"data.root={mistyped}")))
    with pytest.raises(ArchiveError, match=r"data\.root=.*mistyped does not exist"):
        preprocess.main(compose(*small, f"data.root={mistyped}"))
    assert not mistyped.exists()
    with pytest.raises(StoreError, match="run preprocess"):  # other data are the user's to bring
        store_of(settings_of(compose("experiment=celebvtext", f"data.root={tmp_path}/none")))


@pytest.mark.parametrize(("stage", "kept"), [("prior", {"clip", "base"}), ("clip", set())])
def test_a_job_of_a_sweep_never_trains_in_the_runs_own_stage(tmp_path, stage, kept) -> None:
    for name in ("clip", "prior", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    folder = Path(sweep_folder(str(tmp_path), "lr=1"))
    cfg = compose(*quote_texts([f"run_dir={folder}"]))
    run_config(settings_of(cfg), cfg, stage)
    assert {path.name for path in folder.iterdir()} == kept
    assert (tmp_path / stage).is_dir()


@pytest.mark.parametrize(
    ("stage", "section"), [("clip", "clip"), ("prior", "prior"), ("tsr", "unets.tsr")]
)
def test_a_run_is_what_the_command_line_says(tmp_path, stage: str, section: str) -> None:
    typed = ["seed=7", "force=true", "mixed_precision=bf16", "train_name=x", "timeout_minutes=3"]
    cfg = compose(*typed, f"run_dir={tmp_path}/x", "wandb_tags=[a,b]", "wandb_project=p")
    run = run_config(settings_of(cfg), cfg, stage)
    assert run.dir == f"{tmp_path}/x/{stage}" and run.section == section
    assert (run.seed, run.force, run.mixed_precision) == (7, True, "bf16")
    assert (run.train_name, run.timeout_minutes, run.tracker) == ("x", 3.0, None)
    assert (run.wandb_tags, run.wandb_project) == (("a", "b"), "p")
    assert "run_dir: " in run.resolved and "${" not in run.resolved
    # what a run of before, which lacks a key, has had: the class's default
    assert run.defaults[f"{section}.train.grad_clip"] is not None
    assert all(key.startswith((f"{section}.", "data.")) for key in run.defaults)


@pytest.mark.parametrize(
    ("typed", "tracker"),
    [
        ([], None),
        (["use_wandb=true"], "wandb"),
        (["use_wandb=true", "tracker=wandb"], "wandb"),
        (["tracker=tensorboard"], "tensorboard"),
        (["tracker=mlflow"], "mlflow"),
    ],
)
def test_which_tracker(tmp_path, typed: list[str], tracker: str | None) -> None:
    cfg = compose(*typed, f"run_dir={tmp_path}", "wandb_mode=offline")
    assert run_config(settings_of(cfg), cfg, "base").tracker == tracker


def test_two_trackers_are_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match=r"tracker=mlflow.*use_wandb=true"):
        settings_of(compose("use_wandb=true", "tracker=mlflow"))
    with pytest.raises(ConfigError, match="tracker"):
        settings_of(compose("tracker=comet"))
