"""The faces data set: what is drawn, said and written must be the same truth."""

import json
import random
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from dalle2_video.data.face_attributes import (
    APPEARANCE,
    ATTRIBUTES,
    FaceAttributes,
    all_combinations,
    draw_attributes,
    draw_combination,
    held_out_combinations,
)
from dalle2_video.data.face_captions import CATEGORY_FOLDERS, WHO, write_captions
from dalle2_video.data.face_motion import motion
from dalle2_video.data.face_render import Identity, ellipsoid, render, rotation
from dalle2_video.data.faces import FRACTIONS, FaceClip, main, plan, read_attributes, write_dataset
from dalle2_video.data.store import split_of
from dalle2_video.data.video import decode_clip

BASE = FaceAttributes(
    hair_color="black", hair_style="short", beard="none", glasses="none", skin="light",
    clothing="green", emotion="neutral", action="nod", light_dir="front",
    light_intensity="bright", light_color_temp="neutral", action_start=0.3, action_length=0.7,
)  # fmt: skip


def draw(size=32, frames=1, seed=3, **changes) -> np.ndarray:
    """float (F,H,W,3) of BASE with changes; frame 0 is before the action."""
    return render(replace(BASE, **changes), 7, size, frames, 4.0, seed).astype(float)


def some_attributes(count: int) -> list[FaceAttributes]:
    pool = frozenset(all_combinations())
    rngs = [random.Random(k) for k in range(count)]
    return [
        draw_attributes(r, draw_combination(r, r.choice(ATTRIBUTES["skin"]), pool)) for r in rngs
    ]


# ---------------------------------------------------------------- the renderer


def test_ellipsoid_points_and_normals_match_the_implicit_surface():
    yaw = np.full((1, 1, 1), 0.6, np.float32)
    turn, axes = rotation(yaw, 0.5 * yaw), (0.5, 0.7, 0.6)
    grid = np.linspace(-0.4, 0.4, 9, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    surface = ellipsoid(x[None], y[None], turn, axes, (0.0, 0.0, 0.0), 0.01)
    assert np.allclose(surface.u**2 + surface.v**2 + surface.w**2, 1, atol=1e-4)
    point = np.stack([x, y, surface.z[0]])
    matrix = turn[..., 0, 0, 0]
    gradient = matrix @ np.diag(1 / np.square(axes)) @ matrix.T @ point.reshape(3, -1)
    gradient /= np.linalg.norm(gradient, axis=0)
    assert np.allclose(np.stack(surface.normal).reshape(3, -1), gradient, atol=1e-4)
    assert (surface.normal[2] > 0).all()


def test_ellipsoid_covers_its_own_area():
    """Anti-aliased coverage sums to the area of the silhouette, here an ellipse."""
    size = 64
    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    level = np.zeros((1, 1, 1), np.float32)
    sphere = ellipsoid(
        grid[None, None], grid[None, :, None], rotation(level, level), (0.5, 0.7, 0.6),
        (0.0, 0.0, 0.0), 2 / size,
    )  # fmt: skip
    assert sphere.alpha.sum() * (2 / size) ** 2 == pytest.approx(np.pi * 0.5 * 0.7, rel=0.01)


def test_render_is_a_pure_function_with_the_promised_form():
    frames = render(BASE, 7, 48, 5, 8.0, 1)
    assert frames.shape == (5, 48, 48, 3) and frames.dtype == np.uint8
    assert (frames == render(BASE, 7, 48, 5, 8.0, 1)).all()
    assert (frames != render(BASE, 8, 48, 5, 8.0, 1)).any()
    assert (frames != render(BASE, 7, 48, 5, 8.0, 2)).any()
    with pytest.raises(ValueError, match="size 8"):
        render(BASE, 7, 8, 5, 8.0, 1)


def test_frames_drawn_in_groups_equal_frames_drawn_at_once(monkeypatch):
    whole = render(BASE, 7, 32, 8, 4.0, 1)
    monkeypatch.setattr("dalle2_video.data.face_render.CHUNK_PIXELS", 3 * 32 * 32)
    assert (render(BASE, 7, 32, 8, 4.0, 1) == whole).all()


@pytest.mark.parametrize("hair_style", ["bald", "short", "long"])
def test_light_brightens_its_own_side(hair_style):
    hair = None if hair_style == "bald" else "blond"
    halves = {}
    for side in ("left", "right", "front"):
        image = draw(light_dir=side, hair_style=hair_style, hair_color=hair)
        halves[side] = image[..., :16, :].mean() / image[..., 16:, :].mean()
    assert halves["left"] > 1.3 and halves["right"] < 1 / 1.3
    assert 0.9 < halves["front"] < 1.1


def test_light_intensity_and_colour_temperature():
    assert draw(light_intensity="dim").mean() < 0.6 * draw().mean()
    ratio = {t: draw(light_color_temp=t)[..., 0].mean() / draw(light_color_temp=t)[..., 2].mean()
             for t in ("warm", "neutral", "cold")}  # fmt: skip
    assert ratio["warm"] > 1.3 * ratio["neutral"] and ratio["cold"] < ratio["neutral"] / 1.3


def test_turns_move_the_nose_to_the_viewers_side():
    for action, sign in (("turn_left", -1), ("turn_right", 1)):
        yaw = motion(replace(BASE, action=action), 16, 8.0, 0).yaw
        assert abs(yaw[0]) < 0.1 and sign * yaw[-1] > 0.6
    # In the picture: the eyes (far darker or brighter than a bald head) move to that side.
    columns = np.arange(64)
    shift = {}
    for action in ("turn_left", "turn_right"):
        changes = {"hair_style": "bald", "hair_color": None, "skin": "medium", "beard": "none"}
        image = draw(64, 8, action=action, glasses="glasses", **changes)[[0, 7]]
        band = image[:, 18:34, 8:56].mean(-1)
        dark = (band < 40).sum(1)
        place = (dark * columns[8:56]).sum(1) / dark.sum(1)
        shift[action] = place[1] - place[0]
    assert shift["turn_left"] < -3 and shift["turn_right"] > 3


def test_other_actions_move_what_they_name():
    curves = {a: motion(replace(BASE, action=a), 16, 8.0, 0) for a in ATTRIBUTES["action"]}
    assert curves["nod"].pitch.max() > 0.4 and abs(curves["nod"].yaw).max() < 0.1
    assert curves["tilt"].roll[-1] > 0.35 and abs(curves["nod"].roll).max() < 0.1
    opened = curves["talk"].open
    assert opened[:4].max() == 0 and opened.max() > 0.7
    turns = np.diff(np.sign(np.diff(opened)))
    assert (turns < 0).sum() >= 2  # the mouth opens at least twice
    assert all(c.open.max() == 0 for a, c in curves.items() if a != "talk")


@pytest.mark.parametrize("start, length", [(0.0, 0.6), (0.0, 0.7), (0.3, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("action", ATTRIBUTES["action"])
def test_actions_show_in_eight_frames(action, start, length):
    """At the 8 frames that the networks see, at least 2 frames are well inside the action."""
    curves = motion(
        replace(BASE, action=action, action_start=start, action_length=length), 8, 4.0, 0
    )
    strength = {
        "turn_left": -curves.yaw / 0.7, "turn_right": curves.yaw / 0.7, "nod": curves.pitch / 0.5,
        "tilt": curves.roll / 0.4, "talk": curves.open / 0.9,
    }[action]  # fmt: skip
    assert (strength > 0.6).sum() >= 2


def test_smile_and_frown_differ_and_change_in_time():
    mouth = np.s_[:, 34:52, 18:46]
    faces = {e: draw(64, emotion=e)[mouth] for e in ("neutral", "happy", "sad")}
    for first, second in (("neutral", "happy"), ("neutral", "sad"), ("happy", "sad")):
        assert np.abs(faces[first] - faces[second]).max() > 80
    assert faces["happy"].min(-1).max() > 190  # teeth
    changing = draw(64, 8, action="talk", action_start=0.9, action_length=0.1,
                    emotion="neutral_then_happy", emotion_change=0.5)  # fmt: skip
    smile = motion(replace(BASE, emotion="neutral_then_happy", emotion_change=0.5), 8, 4.0, 0).smile
    assert smile[0] == 0 and smile[-1] == 1 and (np.diff(smile) >= 0).all()
    assert np.abs(changing[0] - changing[6])[34:52, 18:46].max() > 80


def test_a_still_face_under_frontal_light_is_its_own_mirror_image(monkeypatch):
    """Brows, eyes, mouth and beard mirror exactly once the sway is set to none."""
    still = motion(BASE, 1, 4.0, 0)
    still = type(still)(**{k: 0 * v for k, v in vars(still).items()})
    for smile in (-1.0, 0.0, 1.0):
        pose = replace(still, smile=np.full(1, smile, np.float32))
        monkeypatch.setattr("dalle2_video.data.face_render.motion", lambda *_, p=pose: p)
        monkeypatch.setattr("random.Random.uniform", lambda _, low, high: (low + high) / 2)
        image = draw(64, beard="beard", hair_color="red")
        assert np.abs(image - image[:, :, ::-1]).max() <= 2


@pytest.mark.parametrize("name", ["glasses", "beard", "hair_style", "clothing", "skin"])
def test_every_appearance_shows_at_32_pixels(name):
    images = []
    for value in ATTRIBUTES[name]:
        bald = {"hair_color": None} if value == "bald" else {}
        images.append(draw(**{name: value}, **bald))
    for k, first in enumerate(images):
        for second in images[k + 1 :]:
            changed = np.abs(first - second).max(-1) > 40
            assert changed.sum() >= 25  # pixels of 1024


def test_hair_colours_differ_from_one_another_and_from_skin():
    top = {c: draw(hair_color=c)[0, 3:7, 12:20].mean((0, 1)) for c in ATTRIBUTES["hair_color"]}
    top["skin"] = draw(hair_style="bald", hair_color=None)[0, 3:7, 12:20].mean((0, 1))
    names = list(top)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            assert np.abs(top[first] - top[second]).max() > 50


def test_hair_has_no_texture_that_aliases():
    """The finest strands fade before a pixel holds half a period: sizes agree when averaged."""
    small = draw(32, hair_style="long", hair_color="blond")
    large = draw(128, hair_style="long", hair_color="blond")
    shrunk = large.reshape(1, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(small - shrunk)[:, 2:7, 10:22].mean() < 8


def test_identity_varies_between_people_only():
    assert Identity.of(5) == Identity.of(5) and Identity.of(5) != Identity.of(6)


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
