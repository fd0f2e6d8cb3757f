"""The probe reads what the renderer drew; scores are checked in closed form."""

import json

import numpy as np
import pytest
import torch

from dalle2_video.data.media.frame import crop_resize
from dalle2_video.faces import train_probe
from dalle2_video.faces.attributes import ATTRIBUTES, UNDEFINED, FaceAttributes
from dalle2_video.faces.light import MEASURES
from dalle2_video.faces.plan import plan
from dalle2_video.faces.probe import (
    PROBE_PATH,
    AttributeProbe,
    ProbeConfig,
    load_probe,
    probe_loss,
    score,
    targets_of,
)
from dalle2_video.faces.render import render
from dalle2_video.model_file import CheckpointError


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, list[FaceAttributes]]:
    """60 clips of val and heldout that no training saw, through H.264: uint8 (60,8,32,32,3)."""
    clips = [c for c in plan(6000, seed=0) if c.split != "train"][:60]
    frames = np.stack([train_probe.decoded(c) for c in clips])
    return torch.from_numpy(frames), [c.attributes for c in clips]


# ---------------------------------------------------------------- the packaged probe


def test_packaged_probe_reads_held_out_renders(held_out):
    frames, attributes = held_out
    probe, targets = load_probe(), targets_of(attributes)
    result = score(probe.network.predict(frames), targets)
    assert result.mean > 0.97 and min(result.accuracy.values()) > 0.9
    assert result.low <= result.mean <= result.high and result.clips == 60
    by_rule = score({n: r.predict(frames) for n, r in probe.light.items()}, targets)
    assert min(by_rule.accuracy.values()) > 0.85
    wrong = {n: t.roll(7) for n, t in targets.items()}
    assert score(probe.network.predict(frames), wrong).mean < 0.6


def test_packaged_probe_reads_other_sizes_and_frame_counts():
    """48 px and 16 frames, never seen in training."""
    attributes = [c.attributes for c in plan(24, seed=9)]
    frames = np.stack([render(a, k, 48, 16, 8.0, k) for k, a in enumerate(attributes)])
    read = load_probe().network.predict(torch.from_numpy(frames))
    assert score(read, targets_of(attributes)).mean > 0.93


def test_probe_file_is_small_pinned_and_frozen(tmp_path):
    assert PROBE_PATH.stat().st_size < 2_000_000
    probe = load_probe()
    assert not probe.network.training
    assert not any(p.requires_grad for p in probe.network.parameters())
    changed = tmp_path / "probe.safetensors"
    changed.write_bytes(PROBE_PATH.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=f"{changed.name}: SHA-256"):
        load_probe(changed)
    with pytest.raises(CheckpointError, match="no such file"):
        load_probe(tmp_path / "none.safetensors")


# ---------------------------------------------------------------- the network


def test_prepare_resizes_like_preprocess_and_samples_time():
    probe = AttributeProbe(ProbeConfig())
    clip = np.random.default_rng(0).integers(0, 256, (1, 16, 80, 80, 3), dtype=np.uint8)
    video = probe.prepare(torch.from_numpy(clip))
    assert video.shape == (1, 3, 8, 32, 32)
    for k in range(8):
        want = crop_resize(clip[0, 2 * k], 32).astype(np.float32)
        got = (video[0, :, k].permute(1, 2, 0) + 1) * 127.5
        assert np.abs(got.numpy() - want).max() <= 0.51  # rounding to uint8
    few = probe.prepare(torch.from_numpy(clip[:, :3]))
    assert torch.equal(few[:, :, 0], few[:, :, 2]) and not torch.equal(few[:, :, 0], few[:, :, 3])
    with pytest.raises(ValueError, match="uint8"):
        probe.prepare(torch.zeros(1, 8, 32, 32, 3))


def test_every_parameter_learns_and_clips_do_not_mix_in_eval():
    probe = AttributeProbe(ProbeConfig())
    frames = torch.randint(0, 256, (4, 8, 32, 32, 3), dtype=torch.uint8)
    targets = {n: torch.randint(len(v), (4,)) for n, v in ATTRIBUTES.items()}
    probe_loss(probe(frames), targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probe.heads.parameters())
    assert all(p.grad is not None for p in probe.parameters())
    probe.eval()
    assert probe.features(frames).shape == (4, 2 * probe.config.features)
    alone = probe.predict(frames[2:3])
    assert all(alone[n] == p[2] for n, p in probe.predict(frames, batch_size=3).items())
    probe.train()
    with torch.no_grad():
        for head in probe.heads.values():  # clear answers, so that no rounding turns one
            head.weight.mul_(50)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    read = probe.predict(frames)
    assert probe.training  # left as it was found
    assert all(torch.equal(value, before[name]) for name, value in probe.state_dict().items())
    assert all(
        torch.equal(value, read[name]) for name, value in probe.eval().predict(frames).items()
    )


def test_loss_ignores_undefined_targets():
    logits = {"hair_color": torch.randn(3, 3)}
    kept = probe_loss(
        {"hair_color": logits["hair_color"][:2]}, {"hair_color": torch.tensor([0, 2])}
    )
    loss = probe_loss(logits, {"hair_color": torch.tensor([0, 2, UNDEFINED])})
    assert torch.allclose(loss, kept)


# ---------------------------------------------------------------- scores


def test_targets_are_undefined_for_the_hair_of_bald_heads():
    clips = [c.attributes for c in plan(40, seed=0)]
    targets = targets_of(clips)
    for k, clip in enumerate(clips):
        assert (targets["hair_color"][k] == UNDEFINED) == (clip.hair_style == "bald")


def test_score_in_closed_form():
    targets = {"a": torch.tensor([0, 0, 0, 1]), "b": torch.tensor([1, UNDEFINED, 0, 1])}
    read = {"a": torch.tensor([0, 0, 1, 1]), "b": torch.tensor([1, 0, 0, 0])}
    result = score(read, targets)
    assert result.accuracy == {"a": 0.75, "b": pytest.approx(2 / 3)}
    assert result.chance == {"a": 0.75, "b": pytest.approx(2 / 3)}
    assert result.mean == pytest.approx((0.75 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="b: no clip"):
        score(read, targets | {"b": torch.full((4,), UNDEFINED)})


def test_interval_covers_the_true_accuracy_as_often_as_it_says():
    """Two attributes that fail together in a clip: 95 % of 400 intervals hold the truth."""
    random, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        right = torch.rand(100, generator=random) < 0.7
        targets = {n: torch.zeros(100, dtype=torch.long) for n in ("a", "b")}
        targets["b"] = torch.where(torch.rand(100, generator=random) < 0.3, UNDEFINED, 0)
        result = score({n: (~right).long() for n in targets}, targets)
        held += result.low <= 0.7 <= result.high
    assert 0.91 <= held / 400 <= 0.98


# ---------------------------------------------------------------- training


def test_augmentation_is_slight_and_keyed():
    video = torch.rand(6, 3, 2, 32, 32) * 2 - 1
    smooth = torch.nn.functional.avg_pool3d(video, (1, 9, 9), 1, (0, 4, 4))
    changed = train_probe.augment(smooth, torch.Generator().manual_seed(1))
    again = train_probe.augment(smooth, torch.Generator().manual_seed(1))
    assert torch.equal(changed, again) and changed.shape == smooth.shape
    assert 0 < (changed - smooth).abs().mean() < 0.15 and changed.abs().max() <= 1


def test_augmentation_shifts_by_up_to_a_pixel_blurs_and_adds_noise():
    dot = torch.full((64, 3, 1, 32, 32), -1.0)
    dot[:, :, :, 16, 16] = 1
    changed = train_probe.augment(dot, torch.Generator().manual_seed(0))
    places = changed.mean((1, 2)).flatten(1).argmax(1)
    shifts = {(int(p) // 32 - 16, int(p) % 32 - 16) for p in places}
    assert shifts == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    neighbours = changed.mean((1, 2)).flatten(1).topk(9).values[:, 1:].mean(1)
    assert neighbours.max() > -0.9  # some dots are spread over their neighbours
    flat = torch.zeros(64, 3, 1, 32, 32)
    spread = train_probe.augment(flat, torch.Generator().manual_seed(0)).std((2, 3, 4)).mean(1)
    assert spread.max() > 0.05 and spread.min() < 0.01


def test_train_probe_command_writes_probe_and_table(tmp_path, capsys):
    out, report = tmp_path / "probe.safetensors", tmp_path / "probe.json"
    train_probe.main(["--clips", "60", "--epochs", "1", "--batch-size", "8", "--workers", "0",
                      "--out", str(out), "--report", str(report)])  # fmt: skip
    metrics = json.loads(report.read_text())
    probe = load_probe(out, sha256=None)
    assert metrics["probe_sha256"] == probe.sha256 and probe.sha256 in capsys.readouterr().out
    clips = plan(60, 0)
    assert metrics["probe_train_clips"] == sum(clip.split == "train" for clip in clips)
    for split in ("val", "heldout"):  # what the saved file reads in clips of that split alone
        part = [clip for clip in clips if clip.split == split]
        frames = torch.from_numpy(np.stack([train_probe.decoded(clip) for clip in part]))
        targets = targets_of([clip.attributes for clip in part])
        result = score(probe.network.predict(frames), targets)
        by_rule = score({n: r.predict(frames) for n, r in probe.light.items()}, targets)
        assert metrics[f"probe_{split}_clips"] == len(part)
        assert metrics[f"probe_{split}_mean_accuracy"] == pytest.approx(result.mean, abs=1e-4)
        assert metrics[f"probe_{split}_chance_mean"] == pytest.approx(result.mean_chance, abs=1e-4)
        for name in MEASURES:
            found = metrics[f"light_rule_{split}_accuracy_{name}"]
            assert found == pytest.approx(by_rule.accuracy[name], abs=1e-4)
