"""Unet3D: shapes, conditions, what can see what."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle2_video.models.attention import (
    CrossAttention,
    RelativePositionBias,
    SpatialAttention,
    TemporalAttention,
)
from dalle2_video.models.conditioning import Condition, LocalTokenMixer
from dalle2_video.models.layers import SpatialConv, channels_to_space, space_to_channels
from dalle2_video.models.unet3d import Block, Unet3D
from tests.helpers.networks import SMALL, awake, inputs


def test_starts_at_zero_and_every_parameter_gets_gradient() -> None:
    net = Unet3D(SMALL, 24, 12)
    z, log_snr, condition = inputs()
    assert (net(z, log_snr, condition) == 0).all()
    net = awake(net)
    dropped = condition._replace(
        keep_embedding=torch.tensor([True, False]), keep_text=torch.tensor([False, True])
    )
    net(z, log_snr, dropped).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_runs_at_other_frame_counts() -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    for frames in (1, 2, 8):
        z, log_snr, condition = inputs(frames=frames)
        assert net(z, log_snr, condition).shape == z.shape


def test_batch_is_independent_and_permutes() -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = inputs(3)
    order = torch.tensor([2, 0, 1])
    out = net(z, log_snr, condition)
    permuted = net(z[order], log_snr[order], Condition(*(c[order] for c in condition)))
    torch.testing.assert_close(permuted, out[order], atol=1e-5, rtol=1e-4)


def test_frames_see_each_other_only_through_temporal_attention() -> None:
    """A known mistake of open code: "factorised attention" without any over time."""
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = inputs()
    changed = z.clone()
    changed[:, :, 3] += 1.0
    difference = (net(changed, log_snr, condition) - net(z, log_snr, condition)).abs()
    assert difference[:, :, 0].max() > 1e-5
    for module in net.modules():
        if isinstance(module, TemporalAttention):
            nn.init.zeros_(module.to_out.weight)
    difference = (net(changed, log_snr, condition) - net(z, log_snr, condition)).abs()
    assert difference[:, :, :3].max() == 0 and difference[:, :, 3].max() > 1e-3


def test_temporal_attention_follows_each_spatial_attention() -> None:
    net = Unet3D(SMALL, 24, 12)
    kinds = [type(m) for m in net.modules() if isinstance(m, SpatialAttention | TemporalAttention)]
    assert kinds == [SpatialAttention, TemporalAttention] * (len(kinds) // 2) and len(kinds) >= 10


def test_text_is_a_set_and_padding_is_unseen() -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = inputs()
    out = net(z, log_snr, condition)
    garbage = condition.text.clone()
    garbage[0, 3:] = 50.0
    torch.testing.assert_close(net(z, log_snr, condition._replace(text=garbage)), out)
    order = torch.tensor([3, 4, 0, 1, 2])  # the second line first
    shuffled = condition._replace(
        text=condition.text[:, order], text_place=condition.text_place[:, order]
    )
    torch.testing.assert_close(net(z, log_snr, shuffled), out, atol=1e-5, rtol=1e-4)


def test_tokens_are_joined_with_their_neighbours_of_the_same_line_only() -> None:
    """ "no glasses, beard" says another thing than "glasses, no beard"."""
    module = awake(LocalTokenMixer(8))
    x = torch.randn(1, 7, 8)
    place = torch.tensor([[0, 1, 2, 0, 1, -1, -1]])
    out = module(x, place)
    for changed in range(7):
        y = x.clone()
        y[0, changed] += torch.randn(8)
        moved = (module(y, place) - out)[0].abs().amax(-1) > 1e-6
        line = {0, 1, 2} if changed < 3 else {3, 4} if changed < 5 else {changed}
        assert set(moved.nonzero().flatten().tolist()) == {t for t in line if abs(t - changed) <= 1}


def test_dropped_conditions_say_nothing_and_kept_ones_do() -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = inputs()
    other = condition._replace(
        embedding=condition.embedding.flip(0),
        text=condition.text.flip(0),
        text_embedding=condition.text_embedding.flip(0),
    )
    assert (net(z, log_snr, condition) - net(z, log_snr, other)).abs().max() > 1e-3
    torch.testing.assert_close(
        net(z, log_snr, condition.dropped()), net(z, log_snr, other.dropped())
    )
    only_text = condition._replace(embedding=condition.embedding.flip(0))
    assert (net(z, log_snr, only_text) - net(z, log_snr, condition)).abs().max() > 1e-4


def test_temporal_attention_equals_an_einsum_reference() -> None:
    torch.manual_seed(0)
    layer = awake(TemporalAttention(32, 16))
    x = torch.randn(2, 5, 3, 3, 32)
    h = layer.norm(x)
    q, k, v = (a.unflatten(-1, (2, 16)) for a in layer.to_qkv(h).chunk(3, dim=-1))
    scores = torch.einsum("bihwnd,bjhwnd->bhwnij", q, k) / 4
    bias = layer.position_bias(5, x.device)
    weights = (scores + bias[None, None, None]).softmax(-1)
    out = torch.einsum("bhwnij,bjhwnd->bihwnd", weights, v).flatten(-2)
    torch.testing.assert_close(layer(x), x + layer.to_out(out), atol=1e-5, rtol=1e-4)


def test_relative_position_buckets() -> None:
    bias = RelativePositionBias(heads=2, buckets=32, max_distance=128)
    bucket = bias.bucket(torch.arange(-200, 201))
    past, future = bucket[:200].flip(0), bucket[201:]
    assert bucket[200] == 0 and bucket.min() == 0 and bucket.max() == 31
    assert past[:7].tolist() == list(range(1, 8))  # near distances are exact
    assert (future - past == 16).all() and (past.diff() >= 0).all()
    # 8 exact ones, then 8 of equal ratios up to 128 frames: 8 x 16^(k / 8)
    exact = [min(8 + int(2 * math.log2(d / 8) + 1e-6), 15) for d in range(8, 201)]
    assert past[7:].tolist() == exact
    table = bias(6, torch.device("cpu"))
    future_bias = bias.bias.weight[16 + 2]  # of the key two frames after the query
    torch.testing.assert_close(table[:, 1, 3], future_bias)
    assert (table[:, 0, 2] == table[:, 3, 5]).all() and (table[:, 0, 2] != table[:, 2, 0]).all()


def test_spatial_attention_equals_an_einsum_reference() -> None:
    torch.manual_seed(0)
    layer = awake(SpatialAttention(32, 16))
    x = torch.randn(2, 3, 2, 3, 32)
    q, k, v = (
        a.flatten(2, 3).unflatten(-1, (2, 16)) for a in layer.to_qkv(layer.norm(x)).chunk(3, -1)
    )
    weights = (torch.einsum("bfind,bfjnd->bfnij", q, k) / 4).softmax(-1)
    out = torch.einsum("bfnij,bfjnd->bfind", weights, v).flatten(-2).unflatten(2, (2, 3))
    torch.testing.assert_close(layer(x), x + layer.to_out(out), atol=1e-5, rtol=1e-4)


def test_cross_attention_equals_an_einsum_reference() -> None:
    torch.manual_seed(0)
    layer = awake(CrossAttention(32, 12, 16))
    x, context = torch.randn(2, 3, 2, 2, 32), torch.randn(2, 6, 12)
    q = layer.to_q(layer.norm(x)).unflatten(-1, (2, 16))
    k, v = (a.unflatten(-1, (2, 16)) for a in layer.to_kv(context).chunk(2, -1))
    weights = (torch.einsum("bfhwnd,bjnd->bfhwnj", q, k) / 4).softmax(-1)
    out = torch.einsum("bfhwnj,bjnd->bfhwnd", weights, v).flatten(-2)
    found = layer(x, context, torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(found, x + layer.to_out(out), atol=1e-5, rtol=1e-4)


def test_cross_attention_equals_a_loop() -> None:
    layer = awake(CrossAttention(32, 12, 16))
    x, context = torch.randn(2, 3, 2, 2, 32), torch.randn(2, 6, 12)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    out = layer(x, context, mask)
    for b, count in ((0, 6), (1, 4)):
        alone = layer(x[b : b + 1], context[b : b + 1, :count], mask[b : b + 1, :count])
        torch.testing.assert_close(out[b : b + 1], alone, atol=1e-5, rtol=1e-4)


def test_convolution_and_stem_are_what_they_say() -> None:
    conv = SpatialConv(4, 6)
    x = torch.randn(2, 3, 8, 8, 4)
    kernel = conv.weight[:, :, None]  # (6, 4, 1, 3, 3)
    reference = F.conv3d(x.permute(0, 4, 1, 2, 3), kernel, conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv(x), reference.permute(0, 2, 3, 4, 1), atol=1e-5, rtol=1e-4)
    assert torch.equal(channels_to_space(space_to_channels(x, 4), 4), x)
    frame = F.pixel_unshuffle(x[0].permute(0, 3, 1, 2), 2)
    ours = space_to_channels(x, 2)[0].unflatten(-1, (4, 4)).permute(0, 4, 3, 1, 2).flatten(1, 2)
    assert torch.equal(ours, frame)


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="one entry per level"):
        dataclasses.replace(SMALL, attention=(True,))
    with pytest.raises(ValueError, match="no multiple of 4"):
        dataclasses.replace(SMALL, image_size=18)
    with pytest.raises(ValueError, match="no multiple of head_dim 24"):
        dataclasses.replace(SMALL, head_dim=24)


@pytest.mark.slow
def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    net = Unet3D(SMALL, 24, 12)
    z, log_snr, condition = inputs()
    target = torch.randn_like(z).clamp(-1, 1)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(400):
        loss = F.mse_loss(net(z, log_snr, condition), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_activation_checkpointing_runs_blocks_again_and_changes_no_gradient() -> None:
    """A known mistake of open code: gradient checkpointing that matched no module."""
    z, log_snr, condition = inputs()

    def train(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int, int]:
        torch.manual_seed(0)
        net = awake(Unet3D(SMALL, 24, 12)).train()
        net.activation_checkpointing = checkpointing
        calls, kept = [], []
        for module in net.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            loss = net(z, log_snr, condition).square().sum()
        held = sum(kept)  # before the backward pass
        loss.backward()
        return {n: p.grad for n, p in net.named_parameters()}, len(calls), held

    plain, once, much = train(False)
    again, twice, little = train(True)
    blocks = sum(isinstance(m, Block) for m in Unet3D(SMALL, 24, 12).modules())
    assert (once, twice) == (blocks, 2 * blocks)
    assert little < 0.3 * much
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# ---------------------------------------------------------------- joint image-video training


def joint(batch: int = 2, frames: int = 4, images: int = 3):
    """A batch of clips with appended images: (z, log-SNRs and conditions of clips and images)."""
    z, log_snr, condition = inputs(batch, frames)
    _, _, other = inputs(batch * images, 1)
    stills = torch.randn(batch, 3, images, 16, 16)
    levels = torch.linspace(-2, 4, batch * images)
    both = Condition.cat(condition, other._replace(text=other.text.flip(0)))
    return torch.cat([z, stills], dim=2), torch.cat([log_snr, levels]), both


@pytest.mark.parametrize("learned", [False, True])
def test_images_are_alone_and_the_clip_is_as_without_them(learned: bool) -> None:
    """No information passes between masked frames: each part equals a run of its own."""
    net = awake(Unet3D(dataclasses.replace(SMALL, learned_variance=learned), 24, 12))
    z, log_snr, condition = joint()
    out = net(z, log_snr, condition, 3)
    assert out.shape == (len(z), 6 if learned else 3, *z.shape[2:])
    clip = net(z[:, :, :4], log_snr[:2], Condition(*(c[:2] for c in condition)))
    torch.testing.assert_close(out[:, :, :4], clip, atol=1e-5, rtol=1e-4)
    for b in range(2):
        for j in range(3):
            item = 2 + 3 * b + j
            own = Condition(*(c[item : item + 1] for c in condition))
            frame = z[b : b + 1, :, 4 + j : 5 + j]
            alone = net(frame, log_snr[item : item + 1], own, 1)
            torch.testing.assert_close(
                out[b : b + 1, :, 4 + j : 5 + j], alone, atol=1e-5, rtol=1e-4
            )


def test_no_gradient_passes_between_images_and_clip() -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = joint()
    z.requires_grad_()
    text = condition.text.clone().requires_grad_()
    out = net(z, log_snr, condition._replace(text=text), 3)
    seen, words = torch.autograd.grad(out[0, :, 5].square().sum(), [z, text], retain_graph=True)
    assert seen[0, :, 5].abs().max() > 1e-4 and seen[1].abs().max() == 0
    seen[0, :, 5] = 0
    assert seen.abs().max() == 0, "an image sees itself alone"
    assert words.flatten(1).abs().amax(1).nonzero().flatten().tolist() == [3], "and its own text"
    seen, words = torch.autograd.grad(out[1, :, 0].square().sum(), [z, text])
    assert (seen[1].abs().amax((0, 2, 3)) > 0).tolist() == [True] * 4 + [False] * 3
    assert words.flatten(1).abs().amax(1).nonzero().flatten().tolist() == [1]


def test_every_parameter_takes_part_in_a_step_of_images_alone() -> None:
    """One without a gradient would break DDP, and hang ZeRO-3."""
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = joint()
    keep = torch.arange(6) % 2 == 0
    condition = Condition(*(c[2:] for c in condition))
    condition = condition._replace(keep_text=keep, keep_embedding=~keep)
    net(z[:, :, 4:], log_snr[2:], condition, 3).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_conditions_with_other_numbers_of_tokens_are_joined() -> None:
    _, _, condition = inputs()
    short = condition._replace(text=condition.text[:, :3], text_place=condition.text_place[:, :3])
    both = Condition.cat(short, condition)
    assert both.text.shape == (4, 5, 12) and (both.text_place[:2, 3:] == -1).all()
    assert torch.equal(both.text[2:], condition.text)


# ---------------------------------------------------------------- self-conditioning, compilation


def test_self_conditioning_sees_the_last_estimate() -> None:
    net = awake(Unet3D(dataclasses.replace(SMALL, self_condition=True), 24, 12))
    z, log_snr, condition = inputs()
    first = net(z, log_snr, condition)
    torch.testing.assert_close(first, net(z, log_snr, condition, 0, torch.zeros_like(z)))
    assert (net(z, log_snr, condition, 0, torch.randn_like(z)) - first).abs().max() > 1e-3


@pytest.mark.parametrize("images", [0, 3])
def test_the_network_compiles_as_one_graph(images: int) -> None:
    net = awake(Unet3D(SMALL, 24, 12))
    z, log_snr, condition = joint() if images else inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    out = net(z, log_snr, condition, images)
    torch.testing.assert_close(compiled(z, log_snr, condition, images), out, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_stays_near_float32() -> None:
    """Norms take their statistics in float32, the noise level's sines see it in float32."""
    net = awake(Unet3D(SMALL, 24, 12))
    z, _, condition = inputs()
    for levels in ((-3.0, 3.0), (-10.0, -9.9)):
        log_snr = torch.tensor(levels)
        out = net(z, log_snr, condition)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(z, log_snr, condition)
            embedded = net.condition.log_snr(log_snr)
        assert half.dtype == torch.float32
        assert (half - out).square().mean() < 1e-3 * out.square().mean()
        exact = net.condition.log_snr(log_snr)
        assert (embedded - exact).abs().max() < 0.05 * exact.abs().max()
    x = 100 + torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        norm = F.layer_norm(x.bfloat16(), (32,)).float()
    torch.testing.assert_close(norm, F.layer_norm(x.bfloat16().float(), (32,)), atol=0.02, rtol=0)
