"""sample.py and evaluate.py through a whole cascade: files, captions, several processes."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from dalle2_video.config import ConfigError
from dalle2_video.data.media.output import write_clip
from tests.helpers.launching import launch_command, run_launch
from tests.helpers.runs import CHAIN, ORDER

TEXTS = ["a man smiles", "a woman nods", "a bald man. Dim light. He talks."]


def metadata(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


def test_the_script_writes_every_stage_with_its_caption(configure, chain_dir, tmp_path) -> None:
    text = "A man with a beard smiles. The light comes from the left."
    places = [f"out={tmp_path}", "num_samples=2", f"text='{text}'"]
    sample.main(configure(*CHAIN, *places, "save_intermediates=true", "sample.seed=7", run="chain"))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    clips = {f"{folder}{i:04d}.mp4" for folder in ("base/", "tsr/", "") for i in range(2)}
    assert names == clips | {"sheet.png"}
    for name, fps, size in (("base/0001.mp4", 2, (4, 16)), ("0001.mp4", 4, (8, 32))):
        with av.open(str(tmp_path / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == fps
        assert (len(frames), frames[0].shape[0]) == size
        found = metadata(tmp_path / name)
        facts = json.loads(found["comment"])
        assert found["title"] == text
        assert facts["seed"] == 7 and facts["number"] == 1 and facts["cascade"] == list(ORDER)
        assert facts["sample"]["unets"]["ssr"]["steps"] == 2
    assert Image.open(tmp_path / "sheet.png").size[0] > 8 * 32


def test_frames_as_png_say_the_same(configure, chain_dir, tmp_path) -> None:
    sample.main(configure(*CHAIN, f"out={tmp_path}", "format=frames", run="chain"))
    paths = sorted((tmp_path / "0000").iterdir())
    assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(8)]
    image = Image.open(paths[3])
    assert image.size == (32, 32) and image.text["title"] == sample.EXAMPLE
    assert json.loads(image.text["comment"])["number"] == 0
    with pytest.raises(ConfigError, match="format: must be 'mp4' or 'frames', got 'gif'"):
        sample.main(configure("format=gif", run="chain"))


def test_a_caption_of_any_letters_survives(tmp_path) -> None:
    title = 'Eine Frau – "lächelt"; =\\ 女人\nnickt'
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    path = write_clip(tmp_path, "a", frames, 4.0, title, {"seed": 1})
    assert metadata(path)["title"] == title
    folder = write_clip(tmp_path, "b", frames, 4.0, title, {"seed": 1}, "frames")
    assert Image.open(folder / "0000.png").text["title"] == title


def test_two_processes_share_the_texts_out(configure, chain_dir, tmp_path) -> None:
    """The clips are those of one process; the sheet shows all; a process may have no text."""
    cfg = configure(*CHAIN, run="chain")
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    overrides = [f"file={file}", "sample.steps=2", "format=frames"]
    sample.main(configure(*CHAIN, *overrides, f"out={tmp_path}/one", run="chain"))
    command = [*launch_command("ddp"), "sample.py", f"run_dir={cfg.run_dir}", *overrides]
    run_launch([*command, "sample.prior_steps=2", f"out={tmp_path}/two", *steps_of(cfg)])
    for i in range(3):
        for path in sorted((tmp_path / "one" / f"{i:04d}").iterdir()):
            other = tmp_path / "two" / f"{i:04d}" / path.name
            one, two = (np.asarray(Image.open(p)).astype(int) for p in (path, other))
            assert np.abs(one - two).max() <= 1
    sheets = [Image.open(tmp_path / which / "sheet.png").size for which in ("one", "two")]
    assert sheets[0] == sheets[1]


def steps_of(cfg) -> list[str]:
    return [f"sample.unets.{name}.steps={cfg.sample.unets[name].steps}" for name in ("tsr", "ssr")]


def test_evaluation_reads_every_stage(configure, chain_dir, tmp_path) -> None:
    evaluate.main(configure(*CHAIN, "evaluate.clips=4", f"out={tmp_path}", run="chain"))
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("attribute_accuracy", "accuracy_of_base", "accuracy_of_tsr"):
        assert 0 <= report[f"{name}_low"] <= report[name] <= report[f"{name}_high"] <= 1
    for stage in ORDER:
        assert len(list((tmp_path / "clips" / stage).glob("*.mp4"))) == 4
