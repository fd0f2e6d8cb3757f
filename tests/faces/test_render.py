"""The renderer of the faces data set: every attribute shows, and shows the right way round."""

from dataclasses import replace

import numpy as np
import pytest

from dalle2_video.faces.attributes import ATTRIBUTES
from dalle2_video.faces.geometry import Light, ellipsoid, rotation
from dalle2_video.faces.identity import Identity
from dalle2_video.faces.motion import Motion, motion
from dalle2_video.faces.render import render
from tests.helpers.faces import BASE

PERSON = Identity.of(7)


def draw(size=32, frames=1, seed=3, **changes) -> np.ndarray:
    """float (F,H,W,3) of BASE with changes; frame 0 is before the action."""
    return render(replace(BASE, **changes), 7, size, frames, 4.0, seed).astype(float)


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
    monkeypatch.setattr("dalle2_video.faces.render.CHUNK_PIXELS", 3 * 32 * 32)
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


def test_a_turn_that_ends_early_comes_back_and_a_late_one_stays():
    for action, name in (("turn_right", "yaw"), ("tilt", "roll")):
        timed = replace(BASE, action=action, action_start=0.0, action_length=0.6)
        curve = getattr(motion(timed, 32, 8.0, 0), name)
        assert curve.max() > 0.35 and abs(curve[-8:]).max() < 0.1
        late = replace(timed, action_start=0.4)
        curve = getattr(motion(late, 32, 8.0, 0), name)
        assert abs(curve[:12]).max() < 0.1 and curve[-4:].min() > 0.35


@pytest.mark.parametrize(("length", "nods"), [(0.3, 1), (0.6, 2), (1.0, 3)])
def test_a_nod_takes_a_third_of_the_clip(length, nods):
    pitch = motion(replace(BASE, action_start=0.0, action_length=length), 300, 150.0, 0).pitch
    down = pitch > 0.25
    assert down[0] + (down[1:] & ~down[:-1]).sum() == nods


def test_lids_close_for_a_fifth_of_a_second_every_two_to_four():
    fps = 100.0
    for seed in range(5):
        blink = motion(BASE, 3000, fps, seed).blink
        shut = blink > 0.5
        begins = (shut[1:] & ~shut[:-1]).nonzero()[0] / fps
        assert shut.sum() / fps / len(begins) == pytest.approx(0.2, abs=0.03)
        assert 1.9 < np.diff(begins).min() and np.diff(begins).max() < 4.1
        assert begins[0] < 3.1 and blink.max() == 1


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


@pytest.fixture
def posed(monkeypatch):
    """Draws BASE with changes, still, in a pose (radians) that no clip reaches."""

    def draw_posed(pose: dict[str, float], nose: float = 1.0, **changes) -> np.ndarray:
        still = {k: np.zeros(1, np.float32) for k in vars(motion(BASE, 1, 4.0, 0))}
        held = Motion(**(still | {k: np.full(1, v, np.float32) for k, v in pose.items()}))
        monkeypatch.setattr("dalle2_video.faces.render.motion", lambda *_: held)
        person = replace(PERSON, nose=nose)
        monkeypatch.setattr(Identity, "of", classmethod(lambda *_: person))
        return draw(64, hair_style="bald", hair_color=None, **changes)

    return draw_posed


def test_the_nose_is_hidden_behind_a_head_that_looks_away(posed):
    away, facing = {"yaw": np.pi}, {"yaw": 0.0}
    assert (posed(facing, 0.85) != posed(facing, 1.15)).any()
    assert (posed(away, 0.85) == posed(away, 1.15)).all()


def test_the_light_stays_where_it_is_when_the_head_lies_on_its_side(posed):
    for roll in (-np.pi / 2, 0.0, np.pi / 2):
        x, y = 0.42 * np.sin(roll), 0.42 * (1 - np.cos(roll)) - 0.12  # centre: it leans in the neck
        column, row = round((x + 1) * 32), round((y + 1) * 32)
        ratio = {}
        for side in ("left", "right"):
            image = posed({"roll": roll}, light_dir=side)[0, row - 8 : row + 8]
            left, right = image[:, column - 12 : column], image[:, column : column + 12]
            ratio[side] = left.mean() / right.mean()
        assert ratio["left"] > 1.4 * ratio["right"], roll  # the features count in both


def test_shade_and_gloss_in_closed_form():
    """Lambert's cosine wrapped by a tenth; Blinn and Phong's half vector, nothing from behind."""
    light = Light((0.6, 0.0, 0.8), ambient=0.3, key=0.7)
    for normal, cosine in (((0.6, 0.0, 0.8), 1.0), ((0.0, 1.0, 0.0), 0.0), ((-0.6, 0, -0.8), -1.0)):
        assert light.shade(normal) == pytest.approx(0.3 + 0.7 * max(0.9 * cosine + 0.1, 0))
    half = np.array([0.6, 0.0, 1.8]) / np.hypot(0.6, 1.8)
    assert light.specular(tuple(half), 4) == pytest.approx(1)
    assert light.specular((0.0, 0.0, 1.0), 4) == pytest.approx(half[2] ** 16)
    assert light.specular(tuple(-half), 4) == 0


def test_a_still_face_under_frontal_light_is_its_own_mirror_image(monkeypatch):
    """Brows, eyes, mouth and beard mirror exactly once the sway is set to none."""
    still = motion(BASE, 1, 4.0, 0)
    still = type(still)(**{k: 0 * v for k, v in vars(still).items()})
    for smile in (-1.0, 0.0, 1.0):
        pose = replace(still, smile=np.full(1, smile, np.float32))
        monkeypatch.setattr("dalle2_video.faces.render.motion", lambda *_, p=pose: p)
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


def test_long_hair_covers_the_ears():
    """From the wall to the cheek on both sides, at the height of the ears: one dark strip."""
    image = draw(64, hair_style="long", hair_color="black").max(-1)[0, 25:29]
    for side in (image[:, 12:16], image[:, 48:51]):
        assert side.max() < 40


def test_hair_has_no_texture_that_aliases():
    """The finest strands fade before a pixel holds half a period: sizes agree when averaged."""
    small = draw(32, hair_style="long", hair_color="blond")
    large = draw(128, hair_style="long", hair_color="blond")
    shrunk = large.reshape(1, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(small - shrunk)[:, 2:7, 10:22].mean() < 8


def test_identity_varies_between_people_only():
    assert Identity.of(5) == Identity.of(5) and Identity.of(5) != Identity.of(6)
