"""From the command line to what the scripts pass around."""

import pytest

import preprocess
from dalle2_video.cli import compose
from dalle2_video.data.store.shard import StoreError
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.wiring import run_config, store_of
from dalle2_video.training.log import WandbKeyError


def test_a_missing_wandb_key_is_found_before_any_work(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(WandbKeyError):
        cfg = compose("use_wandb=true", f"run_dir={tmp_path}/run")
        run_config(settings_of(cfg), cfg, "base")
    assert not (tmp_path / "run").exists()


def test_the_embedded_faces_are_made_where_they_are_missing(tmp_path, capsys) -> None:
    small = ["faces.clips=8", "faces.size=32", "data.workers=0", f"faces.root={tmp_path}"]
    store = store_of(settings_of(compose(*small)))
    assert len(store) == 8 and "no clips yet" in capsys.readouterr().out
    assert len(store_of(settings_of(compose(*small)))) == 8
    assert "no clips yet" not in capsys.readouterr().out  # once
    mistyped = tmp_path / "mistyped"
    with pytest.raises(StoreError, match="run preprocess"):  # nothing is rendered elsewhere
        store_of(settings_of(compose(*small, f"data.root={mistyped}")))
    with pytest.raises(SystemExit, match=r"data\.root=.*mistyped does not exist"):
        preprocess.main(compose(*small, f"data.root={mistyped}"))
    assert not mistyped.exists()
    with pytest.raises(StoreError, match="run preprocess"):  # other data are the user's to bring
        store_of(settings_of(compose("experiment=celebvtext", f"data.root={tmp_path}/none")))
