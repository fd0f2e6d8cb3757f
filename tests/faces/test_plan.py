"""Which clips a data set holds: people, splits and looks, before anything is drawn."""

import re
from dataclasses import replace

import numpy as np

from dalle2_video.data.store.splits import split_of
from dalle2_video.faces.attributes import APPEARANCE, ATTRIBUTES, held_out_combinations
from dalle2_video.faces.plan import FRACTIONS, FaceClip, plan
from tests.helpers.faces import BASE


def test_clips_of_held_out_combinations_show_all_values_evenly():
    clips = [c.attributes for c in plan(6000, seed=0) if c.split == "heldout"]
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
        assert (clip.attributes.combination in held) == (clip.split == "heldout")
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
        assert (clip.attributes.combination in held) == (clip.split == "heldout")


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


def test_clip_seed_depends_on_its_name_alone():
    clip = FaceClip("abcdefghijk_0_0", "train", 1, BASE)
    assert clip.seed == replace(clip, split="val").seed
    assert clip.seed != replace(clip, clip_id="abcdefghijk_0_1").seed
