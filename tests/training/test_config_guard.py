"""What must be alike: a run and its folder, rank and rank (those are in test_distributed.py)."""

from dataclasses import replace

import pytest

from dalle2_video.config import ConfigError
from dalle2_video.training.config import RunConfig
from dalle2_video.training.config_guard import data_facts, differences, flat, translated
from dalle2_video.training.loop import train
from tests.helpers.tiny_stage import TinySet, tiny_config, tiny_stage

YAML = """
seed: 0
mixed_precision: "no"
run_dir: a
data: {{root: /a, size: {size}, workers: 2}}
tiny: {{train: {{lr: {lr}, clips: {clips}, workers: 0}}, drop: 0.1}}
other: {{train: {{lr: {other}}}}}
tiny2: {{train: {{lr: {other}}}}}
sample: {{steps: {other}}}
"""


def resolved(**changes) -> str:
    return YAML.format(**{"size": 32, "lr": 0.01, "clips": 16, "other": 1} | changes)


def test_a_folder_of_another_configuration_is_refused(tmp_path, capsys) -> None:
    run = RunConfig(str(tmp_path), section="tiny", resolved=resolved())
    train(tiny_stage(), tiny_config(clips=16), run)
    free = resolved(clips=24, other=7)  # longer, and another stage's learning rate
    train(tiny_stage(), tiny_config(clips=24), replace(run, resolved=free))
    wrong = replace(run, resolved=resolved(size=64, lr=0.02))
    words = r"data\.size: 32 there, 64 here; tiny\.train\.lr: 0\.01 there, 0\.02 here.*force=true"
    with pytest.raises(ConfigError, match=words):
        train(tiny_stage(), tiny_config(), wrong)
    assert (tmp_path / "config.yaml").read_text() == free  # as it was
    train(tiny_stage(), tiny_config(), replace(wrong, force=True))
    assert (tmp_path / "config.yaml").read_text() == wrong.resolved


def test_how_long_is_free_and_how_many_faces_is_not(tmp_path) -> None:
    text = resolved() + "faces: {clips: 8, root: a}\n"
    run = RunConfig(str(tmp_path), section="tiny", resolved=text)
    train(tiny_stage(), tiny_config(clips=16), run)
    moved = replace(run, resolved=text.replace("root: a", "root: b"))
    train(tiny_stage(), tiny_config(clips=16), moved)
    more = replace(run, resolved=text.replace("clips: 8", "clips: 9"))
    with pytest.raises(ConfigError, match=r"faces\.clips: 8 there, 9 here"):
        train(tiny_stage(), tiny_config(clips=16), more)


def test_a_folder_without_a_checkpoint_may_begin_again(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(resolved(lr=5))
    run = RunConfig(str(tmp_path), section="tiny", resolved=resolved())
    assert train(tiny_stage(), tiny_config(clips=8), run).progress.clips == 8


OLD_KEYS = {
    "unets.base.images": "unets.base.num_images",
    "unets.base.image_only": "unets.base.image_only_prob",
    "unets.base.drop.all": "unets.base.cond_dropout.all",
    "unets.tsr.window": "unets.tsr.crop_frames",
    "unets.tsr.model.low_frames": "unets.tsr.model.num_lowres_frames",
    "unets.tsr.model.low_size": "unets.tsr.model.lowres_size",
    "data.faces": "faces",
    "data.faces.size": "faces.size",
    "data.splits.combo": "data.splits.heldout",
}


def test_older_keys_are_translated_and_no_other() -> None:
    assert translated(dict.fromkeys(OLD_KEYS, 1)) == dict.fromkeys(OLD_KEYS.values(), 1)
    same = [*OLD_KEYS.values(), "sample.window", "unets.base.model.window", "data.faces_root"]
    assert translated(dict.fromkeys(same, 1)) == dict.fromkeys(same, 1)


def test_a_folder_begun_under_older_keys_goes_on(tmp_path) -> None:
    old = "data: {faces: {size: 64}, size: 32}\nunets: {tsr: {window: 8, train: {lr: 0.01}}}\n"
    new = "faces: {size: 64}\ndata: {size: 32}\nunets: {tsr: {crop_frames: 8, train: {lr: 0.01}}}\n"
    run = RunConfig(str(tmp_path), section="unets.tsr", resolved=old)
    train(tiny_stage(), tiny_config(clips=16), run)
    assert train(tiny_stage(), tiny_config(), replace(run, resolved=new)).progress.clips == 32
    wrong = new.replace("crop_frames: 8", "crop_frames: 4").replace("size: 64", "size: 48")
    (tmp_path / "config.yaml").write_text(old)
    words = r"faces\.size: 64 there, 48 here; unets\.tsr\.crop_frames: 8 there, 4 here"
    with pytest.raises(ConfigError, match=words):
        train(tiny_stage(), tiny_config(clips=40), replace(run, resolved=wrong))


def test_a_run_goes_on_when_its_data_get_a_layout(tmp_path) -> None:
    """How the root is read may be named later; the clips themselves are compared elsewhere."""
    old, new = (
        f"data: {{size: 8{more}}}\ntiny: {{train: {{lr: 0.01}}}}\n"
        for more in ("", ", layout: celebvtext, file_column: x, caption_columns: [a]")
    )
    run = RunConfig(str(tmp_path), section="tiny", resolved=old)
    train(tiny_stage(), tiny_config(clips=16), run)
    moved = replace(run, resolved=new)
    assert train(tiny_stage(), tiny_config(), moved).progress.clips == 32


def test_differences_are_few_and_named() -> None:
    there = {f"k{i}": 0 for i in range(9)}
    told = differences(there, {name: 1 for name in there})
    assert told[0] == "k0: 0 there, 1 here" and told[-1] == "and 3 more" and len(told) == 7
    assert differences({"a": 1}, {"b": 1}) == ["a: 1 there, 'none' here", "b: 'none' there, 1 here"]
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_data_is_told_by_its_keys() -> None:
    class Keyed(TinySet):
        def keys(self):
            return [f"clip{i}" for i in range(self.num)]

    assert data_facts(TinySet(4)) == {"clips": 4}
    a, b = data_facts(Keyed(4)), data_facts(Keyed(5))
    assert a["keys"] != b["keys"] and a == data_facts(Keyed(4))
