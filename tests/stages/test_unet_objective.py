"""The loss of a U-Net on a batch, with networks that record what they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.store.dataset import Batch
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.schedule import alpha_sigma
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.pipeline.sampling_config import SuperResolutionSampling, UnetSampling
from dalle2_video.stages.frozen_clip import draw_t, keep_masks, shared_coin
from dalle2_video.stages.sections import CondDropout, UnetSection
from dalle2_video.stages.unet import UnetObjective, build_unet, sample_own
from dalle2_video.training.stage import StepInfo
from tests.helpers.lowres import CONV
from tests.helpers.networks import EXAMPLES, SMALL, waves

HALF = CondDropout(all=0.2, embedding=0.4, text=0.4)
PLAIN = UnetSection(model=SMALL, diffusion=DiffusionConfig(), cond_dropout=HALF)
JOINT = dataclasses.replace(PLAIN, num_images=2)


def encode(batch: Batch) -> TextEncoding:
    """A text's embedding and states hold its sample id."""
    ids = batch.sample_ids.float()
    embedding = ids[:, None].expand(-1, 24)
    return TextEncoding(embedding, ids[:, None, None].expand(-1, 5, 12), torch.zeros(len(ids), 5))


def batch_of(ids: Tensor, frames: int = 4, side: int = 16, images: int = 0) -> Batch:
    """Clips whose embeddings hold the negative sample ids; images with ids from 1000 on."""
    pixels = (127.5 + 127 * waves(len(ids), frames, side, side, 3, phase=float(ids[0]))).byte()
    embedding = -ids.float()[:, None].expand(-1, 24)
    more = None
    if images:
        more = batch_of(1000 + torch.arange(len(ids) * images), 1, side)
    none = torch.zeros(0, dtype=torch.long)
    keys = [str(i) for i in ids.tolist()]
    return Batch(ids, keys, pixels, none, none, [[key] for key in keys], embedding, more)


def step_of(ids: Tensor, first: int = 0, seed: int = 5) -> StepInfo:
    return StepInfo(ids, seed, torch.device("cpu"), None, first)  # type: ignore[arg-type]


class Recorder(torch.nn.Module):
    """A network that keeps its inputs and answers `answer` times z, or twice its channels."""

    def __init__(self, answer: float = 0.0, channels: int = 1) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.tensor(answer))
        self.channels, self.calls = channels, []

    def forward(self, z, log_snr, condition, num_images=0, x0_prev=None, lowres=None) -> Tensor:
        self.calls.append((z.clone(), log_snr, condition, num_images, x0_prev, lowres))
        return (self.answer * z).repeat(1, self.channels, 1, 1, 1)


def steps(section: UnetSection, images: int = 0) -> Iterator[tuple[Batch, StepInfo]]:
    ids = torch.arange(40, 46)
    for first in range(0, 600, 6):
        yield batch_of(ids, images=images), step_of(ids, first)


def test_a_clip_gets_its_own_time_noise_and_condition() -> None:
    ids, net = torch.tensor([3, 70, 12, 9, 4, 41, 8, 17]), Recorder()
    batch = batch_of(ids)
    loss = UnetObjective("base", PLAIN, encode)(net, batch, step_of(ids)).loss  # type: ignore[arg-type]
    ((z, log_snr, condition, num_images, x0_prev, lowres),) = net.calls
    wanted = PLAIN.diffusion.schedule.log_snr(draw_t(5, ids, "base"))
    torch.testing.assert_close(log_snr, wanted)
    alpha, sigma = (a[:, None, None, None, None] for a in alpha_sigma(wanted))
    eps = keyed.randn((3, 4, 16, 16), 5, ids, "base/noise")
    x0 = to_float(batch.frames)
    torch.testing.assert_close(z, alpha * x0 + sigma * eps)
    keep_embedding, keep_text = keep_masks(dataclasses.asdict(HALF), 5, ids, "drop")
    assert torch.equal(condition.keep_embedding, keep_embedding)
    assert torch.equal(condition.keep_text, keep_text)
    assert not torch.equal(keep_embedding, keep_text)
    assert torch.equal(condition.embedding[:, 0], -ids.float())
    assert torch.equal(condition.text_embedding[:, 0], ids.float())
    assert (num_images, x0_prev, lowres) == (0, None, None)
    v = alpha * eps - sigma * x0
    torch.testing.assert_close(loss, v.square().mean())


def test_images_have_times_noise_and_conditions_of_their_own_and_weigh_as_a_frame() -> None:
    ids, net = torch.arange(3), Recorder()
    objective = UnetObjective("base", JOINT, encode)  # type: ignore[arg-type]
    batch = batch_of(ids, images=2)
    found = objective(net, batch, step_of(ids))
    ((z, log_snr, condition, num_images, _, _),) = net.calls
    assert batch.images is not None and num_images == 2 and z.shape[2] == 4 + 2
    others = batch.images.sample_ids
    torch.testing.assert_close(log_snr[3:], JOINT.diffusion.schedule.log_snr(
        draw_t(5, others, "base/image")))  # fmt: skip
    assert condition.text_embedding[:, 0].tolist() == [*ids.tolist(), *others.tolist()]
    noise = keyed.randn((3, 1, 16, 16), 5, others, "base/image/noise")
    alpha, sigma = (a[:, None, None, None, None] for a in alpha_sigma(log_snr[3:]))
    stills = alpha * to_float(batch.images.frames) + sigma * noise
    for b in range(3):
        for j in range(2):  # image j of clip b at b J + j
            torch.testing.assert_close(z[b, :, 4 + j], stills[2 * b + j, :, 0])
    clips, images = found.metrics["loss_clips"], found.metrics["loss_images"]
    torch.testing.assert_close(found.loss.detach(), (4 * clips + 2 * images) / 6)
    assert clips != pytest.approx(float(images), rel=1e-3)


def test_a_share_of_the_steps_has_images_alone() -> None:
    section = dataclasses.replace(JOINT, image_only_prob=0.3)
    objective = UnetObjective("base", section, encode)  # type: ignore[arg-type]
    alone = []
    for batch, step in steps(section, 2):
        parts, num_images = objective.parts(batch, step)
        assert num_images == 2
        alone.append([part.kind for part in parts] == ["images"])
        assert alone[-1] == shared_coin(0.3, step, "image_only")
    assert 15 < sum(alone) < 45  # of 100


def test_self_conditioning_shows_the_clamped_estimate_in_every_other_step() -> None:
    """And always without gradient, as sampling does."""
    model = dataclasses.replace(SMALL, self_condition=True)
    section = dataclasses.replace(JOINT, model=model)
    objective, shown = UnetObjective("base", section, encode), []  # type: ignore[arg-type]
    for batch, step in steps(section, 2):
        net = Recorder(2.0)
        objective(net, batch, step)
        shown.append(len(net.calls) == 2)
        if not shown[-1]:
            assert net.calls[0][4] is None
            continue
        (z, log_snr, *_, before, _), (again, *_, x0_prev, _) = net.calls
        assert before is None and torch.equal(again, z) and not x0_prev.requires_grad
        wanted = to_x0("v", 2 * z[:, :, :4], z[:, :, :4], log_snr[:6])
        assert wanted.abs().max() > 1
        torch.testing.assert_close(x0_prev[:, :, :4], wanted.clamp(-1, 1))
        image = to_x0("v", 2 * z[1, :, 5][None], z[1, :, 5][None], log_snr[6 + 3 : 6 + 4])
        torch.testing.assert_close(x0_prev[1, :, 5], image[0].clamp(-1, 1))
    assert 30 < sum(shown) < 70  # of 100
    with torch.no_grad():
        for batch, step in list(steps(section, 2))[:10]:
            net = Recorder(2.0)
            objective(net, batch, step)
            assert len(net.calls) == 2


def test_a_learned_variance_is_taught_at_the_times_of_its_process() -> None:
    model = dataclasses.replace(SMALL, learned_variance=True)
    section = dataclasses.replace(PLAIN, model=model, diffusion=DiffusionConfig(variance_steps=10))
    ids, net = torch.arange(8), Recorder(channels=2)
    found = UnetObjective("base", section, encode)(net, batch_of(ids), step_of(ids))  # type: ignore[arg-type]
    grid = section.diffusion.schedule.log_snr(torch.arange(1, 11) / 10)
    apart = (net.calls[0][1][:, None] - grid).abs().amin(1)
    assert apart.max() < 1e-4
    total = found.metrics["loss_simple"] + found.metrics["loss_variance"]
    torch.testing.assert_close(found.loss.detach(), total)


def super_resolution(**changes) -> UnetSection:
    model = dataclasses.replace(CONV, **changes)
    diffusion = DiffusionConfig(prediction="x0", loss="x0")
    return UnetSection(model=model, diffusion=diffusion, augmentation=(30.0, 30.0))


def test_known_frames_do_not_count_and_a_residual_is_what_is_diffused() -> None:
    ids = torch.arange(2)
    batch, step = batch_of(ids, 8), step_of(ids)
    x0 = to_float(batch.frames)
    found = UnetObjective("tsr", super_resolution(), encode)(Recorder(), batch, step)  # type: ignore[arg-type]
    torch.testing.assert_close(found.loss, x0[:, :, 1::2].square().mean())
    objective = UnetObjective("tsr", super_resolution(residual=0.5), encode)  # type: ignore[arg-type]
    after = x0[:, :, [2, 4, 6, 6]]  # behind the last known frame, that one again
    between = (x0[:, :, ::2] + after) / 2
    wanted = ((x0[:, :, 1::2] - between) / 0.5).square().mean()
    torch.testing.assert_close(objective(Recorder(), batch, step).loss, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("model", [SMALL, CONV], ids=["base", "tsr"])
def test_sample_videos_are_made_of_the_batchs_own_conditions(model: UnetConfig) -> None:
    section = super_resolution() if model.lowres_copies else PLAIN
    objective = UnetObjective("some", section, encode)  # type: ignore[arg-type]
    batch, net = batch_of(torch.tensor([4, 9]), model.num_frames), Recorder()
    how = SuperResolutionSampling(steps=1) if model.lowres_copies else UnetSampling(steps=1)
    with torch.no_grad():
        sample_own(net, batch, objective, how, 7)
        again = Recorder()
        sample_own(again, batch, objective, how, 8)
    z, _, condition, _, _, lowres = net.calls[0]
    start = keyed.randn(model.clip_shape, 7, batch.sample_ids, "some")
    torch.testing.assert_close(z[:2], start)
    assert not torch.equal(again.calls[0][0], z)
    assert condition.keep_text.all() and condition.keep_embedding.all()
    assert condition.embedding[:, 0].tolist() == [-4, -9]
    assert condition.text_embedding[:, 0].tolist() == [4, 9]
    assert (lowres is None) == (model is SMALL)


def test_a_compiled_network_sees_few_numbers_of_tokens_and_others_no_padding() -> None:
    ids = torch.arange(2)
    for section, tokens in ((PLAIN, 5), (dataclasses.replace(PLAIN, compile=True), 128)):
        net = Recorder()
        UnetObjective("base", section, encode)(net, batch_of(ids), step_of(ids))  # type: ignore[arg-type]
        condition = net.calls[0][2]
        assert condition.text.shape[1] == tokens
        assert (condition.text_place >= 0).sum(1).tolist() == [5, 5]


def test_a_new_network_is_whitened_by_the_examples_and_keyed_by_seed_and_name() -> None:
    video_clip = SimpleNamespace(embed_dim=24, text_width=12)
    conditions = SimpleNamespace(video_clip=video_clip, examples=lambda: EXAMPLES)
    section = dataclasses.replace(PLAIN, activation_checkpointing=True)

    def stem(name: str, section: UnetSection, seed: int) -> Tensor:
        return build_unet(name, section, conditions, seed).stem.weight  # type: ignore[arg-type]

    net = build_unet("base", section, conditions, 3)  # type: ignore[arg-type]
    assert net.activation_checkpointing
    torch.testing.assert_close(net.condition.whiten_embedding.mean, EXAMPLES.video.mean(0))
    torch.testing.assert_close(net.condition.whiten_text.mean, EXAMPLES.states.mean(0))
    assert torch.equal(stem("base", PLAIN, 3), net.stem.weight)
    assert not torch.equal(stem("base", PLAIN, 4), net.stem.weight)
    assert not torch.equal(stem("tsr", PLAIN, 3), net.stem.weight)
    assert not build_unet("base", PLAIN, conditions, 3).activation_checkpointing  # type: ignore[arg-type]
