"""The faces data set on disk: the same truth in frames, captions and attributes.jsonl."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.faces.captions import write_captions
from dalle2_video.faces.config import FacesConfig
from dalle2_video.faces.plan import FaceClip, plan
from dalle2_video.faces.render import render
from dalle2_video.faces.writer import FacesError, main, read_attributes, write_dataset

# faces.json and attributes.jsonl of 5 clips as commit 96d8016 wrote them, with the split `combo`.
OLD = Path(__file__).with_name("written_before_heldout")


def write(root: Path, clips: int, per_archive: int, workers: int = 1, **changes) -> list[FaceClip]:
    """Small frames, half a second each."""
    faces = replace(FacesConfig(str(root), clips, size=16, seconds=0.5), **changes)
    return write_dataset(faces, workers=workers, clips_per_archive=per_archive, progress=False)


def test_dataset_on_disk(tmp_path):
    look = {"size": 32, "seconds": 1.5, "seed": 2}
    clips = write(tmp_path / "a", 7, 4, **look)
    write(tmp_path / "b", 7, 4, workers=2, **look)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["attributes.jsonl", "faces.json", "faces_000.zip", "faces_001.zip"]
    for name in names:  # the same bytes, whatever the workers
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "faces_000.zip") as archive:
        members = set(archive.namelist())
        for clip in clips[:4]:
            assert f"videos/celebvtext_6/{clip.clip_id}.mp4" in members
            for folder, lines in write_captions(clip.attributes, 1.5, clip.clip_id).items():
                text = archive.read(f"texts/{folder}/{clip.clip_id}.txt").decode()
                assert text.splitlines() == lines
        assert len(members) == 4 * 7
        video = archive.read(f"videos/celebvtext_6/{clips[0].clip_id}.mp4")
    rows = [json.loads(r) for r in (tmp_path / "a" / "attributes.jsonl").read_text().splitlines()]
    assert [(r["clip"], r["split"]) for r in rows] == [(c.clip_id, c.split) for c in clips]
    assert [r["archive"] for r in rows] == ["faces_000.zip"] * 4 + ["faces_001.zip"] * 3
    known = read_attributes(tmp_path / "a" / "attributes.jsonl")
    assert known == {c.clip_id: c.attributes for c in clips}

    drawn = render(clips[0].attributes, clips[0].identity, 32, 12, 8.0, clips[0].seed)
    found = decode_clip(video, fps=8.0, num_frames=12, size=32)
    assert np.allclose(found.timestamps, np.arange(12) / 8, atol=1e-3)
    assert np.abs(found.frames.astype(int) - drawn).mean() < 5


def test_a_stopped_run_continues_and_other_settings_are_refused(tmp_path):
    write(tmp_path, 6, 3)
    first, second = (tmp_path / f"faces_00{k}.zip" for k in (0, 1))
    kept, want = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (tmp_path / ".faces_001.zip.partial").write_bytes(b"half")
    write(tmp_path, 6, 3)
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == want
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="other settings"):
        write(tmp_path, 7, 3)
    with pytest.raises(ValueError, match="other settings"):  # other clips would be in `train`
        write_dataset(FacesConfig(str(tmp_path), 6, 16, seconds=0.5), split_seed=1, workers=0,
                      clips_per_archive=3)  # fmt: skip


def test_a_folder_that_calls_the_split_combo_is_continued_and_left_as_it_is(tmp_path):
    """faces.root of before: nothing is refused, rendered again or rewritten."""
    clips = plan(5, seed=0)
    assert {clip.split for clip in clips} == {"train", "heldout"}
    for name in ("faces.json", "attributes.jsonl"):
        text = (OLD / name).read_text()
        assert text.count('"combo"') == 1 and '"heldout"' not in text
        (tmp_path / name).write_text(text)
    (tmp_path / "faces_000.zip").write_bytes(b"rendered before")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert write(tmp_path, 5, 1000, seconds=0.25) == clips
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    known = read_attributes(tmp_path / "attributes.jsonl")
    assert known == {clip.clip_id: clip.attributes for clip in clips}

    (tmp_path / "faces_000.zip").unlink()  # a render that was stopped goes on
    write(tmp_path, 5, 1000, seconds=0.25)
    assert zipfile.is_zipfile(tmp_path / "faces_000.zip")
    assert (tmp_path / "faces.json").read_text() == (OLD / "faces.json").read_text()
    with pytest.raises(ValueError, match="other settings"):
        write(tmp_path, 5, 1000, seconds=0.25, seed=1)


def test_new_files_name_the_split_heldout(tmp_path):
    write(tmp_path, 5, 5)
    settings = json.loads((tmp_path / "faces.json").read_text())
    assert settings["fractions"] == {"train": 0.85, "val": 0.075, "heldout": 0.075}
    assert "combo" not in (tmp_path / "attributes.jsonl").read_text()
    with pytest.raises(ValueError, match="`heldout` now"):
        write_dataset(FacesConfig(str(tmp_path / "x"), 5), {"train": 0.5, "combo": 0.5})


def test_damaged_attributes_are_written_again(tmp_path):
    write(tmp_path, 3, 3)
    path = tmp_path / "attributes.jsonl"
    whole = path.read_text()
    path.write_bytes(b"\xff half")
    write(tmp_path, 3, 3)
    assert path.read_text() == whole


def test_bad_sizes_and_damaged_attributes(tmp_path):
    for size in (33, 8, 1024):
        with pytest.raises(ValueError, match=rf"size\n.*input_value={size}"):
            FacesConfig(size=size)
    with pytest.raises(ValueError, match=r"clips\n.*greater than 0"):
        FacesConfig(clips=0)
    with pytest.raises(ValueError, match="at least 1 frame"):
        FacesConfig(seconds=0.05)
    with pytest.raises(ValueError, match="clips_per_archive 0"):
        write(tmp_path, 1, 0)
    broken = tmp_path / "attributes.jsonl"
    broken.write_text('{"clip": "x"}\n')
    with pytest.raises(ValueError, match=r"attributes\.jsonl, line 1"):
        read_attributes(broken)
    with pytest.raises(FacesError, match="only the embedded faces"):
        read_attributes(tmp_path / "none.jsonl")


def test_command_line(tmp_path, capsys):
    main(
        ["--out", str(tmp_path), "--clips", "3", "--size", "16", "--frames", "4", "--workers", "1"]
    )
    assert "3 clips of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "odd"), "--clips", "1", "--size", "17"])
    assert "must be a multiple of 2, got 17" in capsys.readouterr().err
