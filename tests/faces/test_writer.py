"""The faces data set: what is drawn, said and written must be the same truth."""

import json
import random
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from dalle2_video.data.media.video import decode_clip
from dalle2_video.data.store.store import split_of
from dalle2_video.faces.attributes import (
    APPEARANCE,
    ATTRIBUTES,
    FaceAttributes,
    all_combinations,
    draw_attributes,
    draw_combination,
    held_out_combinations,
)
from dalle2_video.faces.captions import CATEGORY_FOLDERS, WHO, write_captions
from dalle2_video.faces.render import render
from dalle2_video.faces.writer import (
    FRACTIONS,
    FaceClip,
    main,
    plan,
    read_attributes,
    write_dataset,
)

BASE = FaceAttributes(
    hair_color="black", hair_style="short", beard="none", glasses="none", skin="light",
    clothing="green", emotion="neutral", action="nod", light_dir="front",
    light_intensity="bright", light_color_temp="neutral", action_start=0.3, action_length=0.7,
)  # fmt: skip


def some_attributes(count: int) -> list[FaceAttributes]:
    pool = frozenset(all_combinations())
    rngs = [random.Random(k) for k in range(count)]
    return [
        draw_attributes(r, draw_combination(r, r.choice(ATTRIBUTES["skin"]), pool)) for r in rngs
    ]


# ---------------------------------------------------------------- attributes and splits


def test_attributes_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match="clothing: 'pink'"):
        replace(BASE, clothing="pink")
    with pytest.raises(ValueError, match="bald head has none"):
        replace(BASE, hair_style="bald")
    with pytest.raises(ValueError, match="hair_color: None"):
        replace(BASE, hair_color=None)
    with pytest.raises(ValueError, match="leaves the clip"):
        replace(BASE, action_start=0.5, action_length=0.7)
    with pytest.raises(ValueError, match="emotion_change"):
        replace(BASE, emotion="neutral_then_happy")


def test_labels_and_rows_round_trip():
    for attributes in some_attributes(30):
        assert FaceAttributes.from_dict(json.loads(json.dumps(attributes.to_dict()))) == attributes
        for name, label in attributes.labels().items():
            value = getattr(attributes, name)
            assert (label == -1) if value is None else (ATTRIBUTES[name][label] == value)


def test_a_seeded_fifth_of_the_combinations_is_held_out():
    combinations, held = all_combinations(), held_out_combinations(0)
    assert len(combinations) == len(set(combinations)) == 336
    assert len(held) == 67 and held == held_out_combinations(0) != held_out_combinations(1)
    for place, name in enumerate(APPEARANCE):  # every value stays in training and is held out too
        values = {c[place] for c in combinations}
        assert values == {c[place] for c in held} == {c[place] for c in set(combinations) - held}
        assert values - {None} == set(ATTRIBUTES[name])


def test_clips_of_held_out_combinations_show_all_values_evenly():
    clips = [c.attributes for c in plan(6000, seed=0) if c.split == "combo"]
    for name in APPEARANCE:
        labels = [c.labels()[name] for c in clips if c.labels()[name] >= 0]
        shares = np.bincount(labels) / len(labels)
        assert shares.max() * len(shares) < 1.35, name


def test_plan_keeps_the_split_rules():
    clips = plan(1200, seed=0)
    held = held_out_combinations(0)
    by_split = {s: [c for c in clips if c.split == s] for s in FRACTIONS}
    assert len(clips) == 1200 and all(len(part) > 40 for part in by_split.values())
    for clip in clips:
        assert clip.split == split_of(clip.clip_id[:11], 0, FRACTIONS)
        assert (clip.attributes.combination in held) == (clip.split == "combo")
    seen = {c.attributes.combination for c in by_split["train"]}
    assert {c.attributes.combination for c in by_split["val"]} <= seen
    people = {}
    for clip in clips:
        people.setdefault(clip.clip_id[:11], []).append(clip)
    assert all(len({(c.identity, c.attributes.skin) for c in p}) == 1 for p in people.values())
    assert max(len(p) for p in people.values()) > 1
    assert len({p[0].identity for p in people.values()}) == len(people)


def test_splits_follow_the_seed_that_the_readers_use():
    clips, moved = plan(200, seed=0), plan(200, seed=0, split_seed=3)
    assert [c.clip_id for c in clips] == [c.clip_id for c in moved]
    held = held_out_combinations(0)
    for clip in moved:
        assert clip.split == split_of(clip.clip_id[:11], 3, FRACTIONS)
        assert (clip.attributes.combination in held) == (clip.split == "combo")


def test_plan_is_pure_and_clips_are_named_like_celebv_text():
    clips = plan(60, seed=4)
    assert clips == plan(60, seed=4) != plan(60, seed=5)
    ids = [c.clip_id for c in clips]
    assert len(set(ids)) == 60
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{11}_\d+_\d+", i) for i in ids)
    assert any("_" in i[:11] for i in ids) and any("-" in i[:11] for i in ids)


def test_values_are_drawn_evenly():
    clips = plan(2000, seed=1)
    for name, values in ATTRIBUTES.items():
        labels = [c.attributes.labels()[name] for c in clips]
        shares = np.bincount([k for k in labels if k >= 0]) / sum(k >= 0 for k in labels)
        assert np.abs(shares * len(values) - 1).max() < 0.25, name


# ---------------------------------------------------------------- captions


def words(lines: list[str]) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(lines).lower()))


def test_captions_name_the_truth_and_nothing_else():
    light = {
        "light_dir": ({"left"}, {"right"}, {"front", "frontal"}),
        "light_intensity": ({"bright", "brightly"}, {"dim", "dimly", "dark"}),
        "light_color_temp": ({"warm"}, {"cold"}, {"white", "neutral"}),
    }
    for k, attributes in enumerate(some_attributes(200)):
        captions = write_captions(attributes, 2.0, str(k))
        assert tuple(captions) == CATEGORY_FOLDERS
        for lines in captions.values():
            assert len(lines) >= 3 and len(set(lines)) == len(lines)
            assert all(line.strip() and len(line.split()) < 18 for line in lines)
            assert "{" not in " ".join(lines)
        for folder, groups in light.items():
            label = attributes.labels()[folder]
            for line in captions[folder]:
                for place, group in enumerate(groups):
                    assert bool(words([line]) & group) == (place == label), line
        for line in captions["face40_details_new"]:
            said = words([line])
            bald = attributes.hair_style == "bald"
            assert ("bald" in said or "no hair" in line.lower()) == bald
            colours = said & {"black", "blond"} | ({"red"} if "red hair" in line else set())
            assert colours == (set() if bald else {attributes.hair_color})
            assert (attributes.hair_style in said) or bald
            bearded = "beard" in said and "no beard" not in line.lower()
            assert bearded == (attributes.beard == "beard")
            spectacled = "no glasses" not in line.lower()
            assert "glasses" in said and spectacled == (attributes.glasses == "glasses")
            assert f"{attributes.skin} skin" in line.lower()
            assert re.search(rf"{attributes.clothing} (shirt|top|sweater)", line)
        action = words(captions["action_dur"])
        verbs = {"nod": "nods", "talk": "talks", "tilt": "tilts"}
        sides = {"turn_left": {"left"}, "turn_right": {"right"}}.get(attributes.action, set())
        assert action & {"left", "right"} == sides
        for name, verb in verbs.items():
            assert not (verb in action and attributes.action != name)
        emotion = captions["emotion"]
        smiles = words(emotion) & {"smile", "smiles", "smiling", "happy"}
        assert bool(smiles) == ("happy" in attributes.emotion)
        assert ("sad" in words(emotion)) == (attributes.emotion == "sad")


def test_emotion_phases_and_action_times_are_in_seconds():
    changed = replace(BASE, emotion="neutral_then_happy", emotion_change=0.45)
    captions = write_captions(changed, 4.0, "x")
    assert captions["emotion"][0] == "neutral 0.0 to 1.8 s, happy 1.8 to 4.0 s"
    spoken = " ".join(captions["action_dur"])
    assert "1.2" in spoken and ("end" in spoken or "last" in spoken)
    first = " ".join(write_captions(replace(BASE, action_start=0.0, action_length=0.6), 2.0, "x")
                     ["action_dur"])  # fmt: skip
    assert "first" in first and "1.2" in first


def test_person_man_and_woman_carry_no_meaning():
    counts = dict.fromkeys(WHO, 0)
    for k, attributes in enumerate(some_attributes(300)):
        bearded = replace(attributes, beard="beard")
        lines = write_captions(bearded, 2.0, str(k))["face40_details_new"]
        for who in WHO:
            counts[who] += who in words(lines)
    assert min(counts.values()) > 0.7 * max(counts.values())


# ---------------------------------------------------------------- files


def test_dataset_on_disk(tmp_path):
    clips = write_dataset(tmp_path / "a", 7, 32, seed=2, workers=1, clips_per_archive=4,
                          progress=False)  # fmt: skip
    write_dataset(tmp_path / "b", 7, 32, seed=2, workers=2, clips_per_archive=4, progress=False)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["attributes.jsonl", "faces.json", "faces_000.zip", "faces_001.zip"]
    for name in names:  # the same bytes, whatever the workers
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "faces_000.zip") as archive:
        members = set(archive.namelist())
        for clip in clips[:4]:
            assert f"videos/celebvtext_6/{clip.clip_id}.mp4" in members
            for folder, lines in write_captions(clip.attributes, 2.0, clip.clip_id).items():
                text = archive.read(f"texts/{folder}/{clip.clip_id}.txt").decode()
                assert text.splitlines() == lines
        assert len(members) == 4 * 7
        video = archive.read(f"videos/celebvtext_6/{clips[0].clip_id}.mp4")
    rows = [json.loads(r) for r in (tmp_path / "a" / "attributes.jsonl").read_text().splitlines()]
    assert [(r["clip"], r["split"]) for r in rows] == [(c.clip_id, c.split) for c in clips]
    assert [r["archive"] for r in rows] == ["faces_000.zip"] * 4 + ["faces_001.zip"] * 3
    known = read_attributes(tmp_path / "a" / "attributes.jsonl")
    assert known == {c.clip_id: c.attributes for c in clips}

    drawn = render(clips[0].attributes, clips[0].identity, 32, 16, 8.0, clips[0].seed)
    found = decode_clip(video, fps=8.0, num_frames=16, size=32)
    assert np.allclose(found.times, np.arange(16) / 8, atol=1e-3)
    assert np.abs(found.frames.astype(int) - drawn).mean() < 5


def test_a_stopped_run_continues_and_other_settings_are_refused(tmp_path):
    write_dataset(tmp_path, 6, 16, seconds=0.5, workers=1, clips_per_archive=3, progress=False)
    first, second = (tmp_path / f"faces_00{k}.zip" for k in (0, 1))
    kept, want = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (tmp_path / ".faces_001.zip.partial").write_bytes(b"half")
    write_dataset(tmp_path, 6, 16, seconds=0.5, workers=1, clips_per_archive=3, progress=False)
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == want
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="other settings"):
        write_dataset(tmp_path, 7, 16, workers=1, progress=False)


def test_bad_sizes_and_damaged_attributes(tmp_path):
    for size in (33, 8, 1024):
        with pytest.raises(ValueError, match=f"size {size}"):
            write_dataset(tmp_path, 1, size)
    broken = tmp_path / "attributes.jsonl"
    broken.write_text('{"clip": "x"}\n')
    with pytest.raises(ValueError, match=r"attributes\.jsonl, line 1"):
        read_attributes(broken)


def test_command_line(tmp_path, capsys):
    main(
        ["--out", str(tmp_path), "--clips", "3", "--size", "16", "--frames", "4", "--workers", "1"]
    )
    assert "3 clips of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "odd"), "--clips", "1", "--size", "17"])
    assert "even number" in capsys.readouterr().err


def test_clip_seed_depends_on_its_name_alone():
    clip = FaceClip("abcdefghijk_0_0", "train", 1, BASE)
    assert clip.seed == replace(clip, split="val").seed
    assert clip.seed != replace(clip, clip_id="abcdefghijk_0_1").seed
