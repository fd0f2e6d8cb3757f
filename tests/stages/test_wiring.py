"""From the command line to what the scripts pass around."""

import pytest
from hydra import compose, initialize_config_dir

import evaluate
import preprocess
import sample
from dalle2_video.config import ConfigError
from dalle2_video.data.store.shard import StoreError
from dalle2_video.stages.wiring import quote_texts, run_config, sample_config, store_of
from dalle2_video.training.log import WandbKeyError
from tests.helpers.launching import ROOT


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("config", list(overrides))


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
    assert composed(*quote_texts([f"text={text}"])).text == text


def test_what_is_quoted_or_a_list_stays() -> None:
    typed = ["text='a, b'", "text=[a man nods,warm light]", "text=null", "file=x.txt", "seed=1"]
    assert quote_texts(typed) == typed
    assert list(composed(typed[1]).text) == ["a man nods", "warm light"]


def test_sample_without_a_text_takes_an_example(monkeypatch, tmp_path) -> None:
    def read(text, file, number):
        assert "blond hair" in text and file is None and number == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "read_texts", read)
    with pytest.raises(KeyboardInterrupt):
        sample.main(composed(f"run_dir={tmp_path}"))


def test_unknown_keys_are_errors_everywhere() -> None:
    with pytest.raises(ConfigError, match=r"sample\.stepz: unknown key"):
        sample_config(composed("+sample.stepz=3"))
    with pytest.raises(ConfigError, match=r"evaluate\.clip: unknown key"):
        evaluate.main(composed("+evaluate.clip=3"))
    with pytest.raises(ConfigError, match=r"evaluate\.metric"):
        evaluate.main(composed("evaluate.metric=fvd"))


def test_a_missing_wandb_key_is_found_before_any_work(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(WandbKeyError):
        run_config(composed("use_wandb=true", f"run_dir={tmp_path}/run"), "base")
    assert not (tmp_path / "run").exists()


def test_the_embedded_faces_are_made_where_they_are_missing(tmp_path, capsys) -> None:
    small = ["faces.clips=8", "faces.size=32", "data.workers=0", f"faces.root={tmp_path}"]
    store = store_of(composed(*small))
    assert len(store) == 8 and "no clips yet" in capsys.readouterr().out
    assert len(store_of(composed(*small))) == 8
    assert "no clips yet" not in capsys.readouterr().out  # once
    mistyped = tmp_path / "mistyped"
    with pytest.raises(StoreError, match="run preprocess"):  # nothing is rendered elsewhere
        store_of(composed(*small, f"data.root={mistyped}"))
    with pytest.raises(SystemExit, match=r"data\.root=.*mistyped does not exist"):
        preprocess.main(composed(*small, f"data.root={mistyped}"))
    assert not mistyped.exists()
    with pytest.raises(StoreError, match="run preprocess"):  # other data are the user's to bring
        store_of(composed("size=celebvtext", f"data.root={tmp_path}/none"))
