"""Video CLIP: both towers, sets of lines, the logit scale, pretrained text towers, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.factory import _MODEL_CONFIGS
from open_clip.transformer import TextTransformer

from dalle2_video.data.sources.captions import tokenize
from dalle2_video.model_file import CheckpointError, file_hash, load_model, load_weights, save_model
from dalle2_video.models.clip_config import (
    PretrainedTextConfig,
    TrainedTextConfig,
    VideoCLIPConfig,
    VideoTowerConfig,
)
from dalle2_video.models.sdpa import attention
from dalle2_video.models.text_tower import EOT, TextTower, TowerError, weights_sha256
from dalle2_video.models.video_clip import VideoCLIP
from dalle2_video.models.vivit import ConvTubelets, VideoTower
from dalle2_video.training.optimizer import param_groups
from tests.helpers.towers import MODEL_CONFIG, NAME, open_clip_checkpoint

VIDEO = VideoTowerConfig(16, 4, (8, 8), 2, 32, 1, 2, 2)
CONFIG = VideoCLIPConfig(24, VIDEO, TrainedTextConfig(32, 2, 2))
TEXTS = [
    ["a man nods", "warm light", "the woman with long blond hair turns left, then smiles"],
    ["warm light"],
    ["a man nods", "bright light from the left"],
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model() -> VideoCLIP:
    return VideoCLIP(CONFIG).eval()


def clips(number: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, 4, 16, 16, generator=generator) * 2 - 1


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_attention_in_bf16_on_a_cpu_is_softmax_attention(tokens):
    q, k, v = torch.randn(3, 2, 3, tokens, 16)
    causal = torch.full((tokens, tokens), -math.inf).triu(1)
    for bias in (None, causal):
        scores = q @ k.transpose(-1, -2) / 4 + (0 if bias is None else bias)
        expected = scores.softmax(-1) @ v
        assert torch.allclose(attention(q, k, v, bias), expected, atol=1e-5)
        half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).abs().max() < 0.05


# ---------------------------------------------------------------- video tower


def test_the_tubelet_embedding_is_a_3d_convolution():
    tower = VideoTower(VIDEO, 24)
    seen = []
    tower.embed.register_forward_hook(lambda module, args, out: seen.append(out))
    video = clips(2)
    tower(video)
    kernel = tower.embed.project.weight.view(32, 3, 2, 8, 8)
    expected = F.conv3d(
        video, kernel, tower.embed.project.bias, stride=(2, 8, 8)
    )  # (B, W, T, h, w)
    expected = expected.permute(0, 2, 3, 4, 1).reshape(4, 4, 32)
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_the_spatial_transformer_sees_one_tubelet_and_the_temporal_one_all_of_them():
    tower = VideoTower(VIDEO, 24).eval()
    spatial, temporal = [], []
    tower.spatial.register_forward_hook(lambda module, args, out: spatial.append(out))
    tower.temporal.register_forward_hook(lambda module, args, out: temporal.append(out))
    video = clips(2)
    changed = video.clone()
    changed[0, :, 2:] = -changed[0, :, 2:]  # frames 2 and 3 of clip 0: its second tubelet
    tower(video), tower(changed)
    same = (spatial[0] == spatial[1]).all(dim=1)
    assert same.tolist() == [True, False, True, True]  # (clip, tubelet) 00 01 10 11
    assert (temporal[0] == temporal[1]).all(dim=1).tolist() == [False, True]  # no leak over clips


def test_the_order_of_frames_matters_at_both_levels(model):
    video = clips(3)
    original = model.encode_video(video)
    for order in ([2, 3, 0, 1], [1, 0, 3, 2]):  # tubelets swapped; frames swapped inside each
        moved = model.encode_video(video[:, :, order])
        assert (moved - original).abs().max() > 1e-3
    # Without its positions the temporal transformer is a set function of the tubelets.
    with torch.no_grad():
        model.video.temporal.positions.zero_()
    swapped = model.encode_video(video[:, :, [2, 3, 0, 1]])
    assert torch.allclose(swapped, model.encode_video(video), atol=1e-5)


def test_video_embeddings_have_norm_one_and_do_not_depend_on_the_batch(model):
    video = clips(4)
    whole = model.encode_video(video)
    assert whole.dtype == torch.float32
    assert torch.allclose(whole.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(model.encode_video(video[2:3]), whole[2:3], atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 16, 8), (1, 3, 8, 16, 16), (1, 4, 16, 16, 3), (3, 4, 16)]
)
def test_a_clip_of_another_size_or_axis_order_is_an_error(model, shape):
    with pytest.raises(ValueError, match=r"expected \(B, C, F, H, W\) = \(B, 3, 4, 16, 16\)"):
        model.encode_video(torch.zeros(shape))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch": (8, 5)}, "width of patch 5 does not divide image_size 16"),
        ({"tubelet": 3}, "tubelet 3 does not divide num_frames 4"),
        ({"heads": 3}, "heads 3 does not divide width 32"),
    ],
)
def test_impossible_video_towers_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VIDEO, **change)


# ---------------------------------------------------------------- text tower, sets of lines


def open_clip_twin(seed: int) -> TextTransformer:
    torch.manual_seed(seed)
    return TextTransformer(width=32, heads=2, layers=2, output_dim=24, output_tokens=True)


def test_the_tower_gives_open_clips_own_numbers_at_the_lines_own_length():
    tower, reference = TextTower(open_clip_twin(3), frozen=False), open_clip_twin(3)
    lines = ["warm light", "a man", "the man nods, then he turns left and smiles a little"]
    packed = tokenize([[line] for line in lines]).tokens
    found = tower(packed)
    pooled, states = reference(open_clip.get_tokenizer("ViT-B-32")(lines))  # (3, 77, 32)
    assert packed.shape[1] < 77
    assert torch.allclose(found.embedding, pooled, atol=1e-5)
    assert found.length.tolist() == (packed != 0).sum(dim=1).tolist()
    for i, length in enumerate(found.length):
        assert torch.allclose(found.states[i, :length], states[i, :length], atol=1e-5)


def test_lines_of_any_lengths_come_back_in_their_order(model):
    """They run sorted by length, in several passes."""
    lines = [
        "a man nods and then smiles",
        "a",
        "the woman with long blond hair turns",
        "warm light",
    ]
    together = model.text(tokenize([lines]).tokens)
    for i, line in enumerate(lines):
        alone = model.text(tokenize([[line]]).tokens)
        assert torch.allclose(together.embedding[i], alone.embedding[0], atol=1e-5)


def test_a_set_is_the_normalised_mean_of_its_lines_and_their_states_in_a_row(model):
    packed = tokenize(TEXTS)
    text = model.encode_text(packed.tokens, packed.line_index)
    assert text.states.shape[2] == model.text_width == 32
    for b, lines in enumerate(TEXTS):
        alone = [model.text(tokenize([[line]]).tokens) for line in lines]
        mean = torch.stack([F.normalize(a.embedding[0], dim=0) for a in alone]).mean(0)
        assert torch.allclose(text.embedding[b], F.normalize(mean, dim=0), atol=1e-5)
        states = torch.cat([a.states[0, : a.length[0]] for a in alone])
        assert int(text.mask[b].sum()) == len(states)
        assert torch.allclose(text.states[b, : len(states)], states, atol=1e-5)
        assert not text.states[b, len(states) :].any() and not text.mask[b, len(states) :].any()
        place = torch.cat([torch.arange(int(a.length[0])) for a in alone])
        assert torch.equal(text.place[b, : len(states)], place)
    assert text.mask.sum(dim=1).max() == text.states.shape[1]  # packed to the longest set


def test_the_order_of_lines_and_empty_slots_does_not_matter(model):
    packed = tokenize(TEXTS)
    index = packed.line_index
    first = model.encode_text(packed.tokens, index)
    gaps = torch.full((len(index), 1), -1)
    second = model.encode_text(packed.tokens, torch.cat([gaps, index.flip(1)], dim=1))
    assert torch.allclose(first.embedding, second.embedding, atol=1e-6)
    assert torch.equal(first.mask, second.mask)
    # The states are the same up to their order: line for line at other places.
    lines = [int((packed.tokens[i] != 0).sum()) for i in index[0]]
    blocks = list(first.states[0].split(lines))
    assert torch.allclose(second.states[0], torch.cat(blocks[::-1]), atol=1e-5)


def test_all_that_six_captions_say_reaches_the_model(model):
    # A known mistake of open code: six captions joined, and cut off at 77 tokens.
    lines = [f"line {i} " + "with a good many words of its own " * 4 + "end" for i in range(6)]
    packed = tokenize([lines])
    text = model.encode_text(packed.tokens, packed.line_index)
    assert int(text.mask.sum()) == int((packed.tokens != 0).sum()) > 2 * 77
    for i in range(6):
        other = tokenize([[*lines[:i], lines[i].replace("end", "stop"), *lines[i + 1 :]]])
        changed = model.encode_text(other.tokens, other.line_index)
        assert (changed.embedding - text.embedding).abs().max() > 1e-5


def test_text_does_not_leak_across_the_batch(model):
    packed = tokenize(TEXTS)
    whole = model.encode_text(packed.tokens, packed.line_index)
    alone = tokenize(TEXTS[1:2])
    single = model.encode_text(alone.tokens, alone.line_index)
    assert torch.allclose(single.embedding, whole.embedding[1:2], atol=1e-5)
    n = single.states.shape[1]
    assert torch.allclose(single.states, whole.states[1:2, :n], atol=1e-5)


def test_bad_tokens_are_errors(model):
    packed = tokenize(TEXTS)
    endless = packed.tokens.clone()
    endless[1][endless[1] == EOT] = 5
    with pytest.raises(ValueError, match=r"lines \[1\] have no end token"):
        model.encode_text(endless, packed.line_index)
    empty = packed.line_index.clone()
    empty[2] = -1
    with pytest.raises(ValueError, match=r"clips \[2\] of the batch have no line"):
        model.encode_text(packed.tokens, empty)
    with pytest.raises(ValueError, match=r"expected \(U, T <= 77\)"):
        model.text(torch.full((1, 78), EOT))


# ---------------------------------------------------------------- both


def test_every_parameter_gets_a_gradient_and_is_in_the_optimizer_once(model):
    packed = tokenize(TEXTS)
    out = model.train()(clips(3), packed.tokens, packed.line_index)
    (F.cross_entropy(out.logit_scale * out.video @ out.text.T, torch.arange(3))).backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == set()
    groups = param_groups(model, 0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    # A known mistake of open code: the temperature in no optimizer. It has no weight decay either.
    home = [g for g in groups if any(p is model.log_logit_scale for p in g["params"])]
    assert [g["weight_decay"] for g in home] == [0.0]


def test_the_logit_scale_starts_at_the_papers_value_and_stays_in_1_to_100(model):
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_logit_scale.fill_(9.0)
        assert model.logit_scale.item() == pytest.approx(100)
        model.log_logit_scale.fill_(-3.0)
        assert model.logit_scale.item() == 1


def test_bf16_autocast_is_close_to_float32(model):
    packed = tokenize(TEXTS)
    exact = model(clips(3), packed.tokens, packed.line_index)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(clips(3), packed.tokens, packed.line_index)
    for a, b in ((exact.video, half.video), (exact.text, half.text)):
        assert b.dtype == torch.float32  # normalised in float32
        assert torch.allclose(b.norm(dim=1), torch.ones(3), atol=1e-5)
        assert (a * b).sum(dim=1).min() > 0.999


def test_a_checkpoint_gives_the_same_model_and_another_ones_is_refused(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_model(path, "clip", model.config.to_dict(), model.state_dict())
    loaded = load_model(path, "clip")
    config = VideoCLIPConfig.from_dict(loaded.config)
    assert config == CONFIG
    twin = VideoCLIP(config)
    load_weights(twin, loaded)
    assert torch.equal(twin.eval().encode_video(clips(2)), model.encode_video(clips(2)))
    other = VideoCLIP(dataclasses.replace(CONFIG, embed_dim=16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not fit the model"):
        load_weights(other, loaded)


# ---------------------------------------------------------------- pretrained text tower


@pytest.fixture
def weights(tmp_path):
    """A whole open_clip checkpoint of a small model, saved locally, and the model itself."""
    with open_clip_checkpoint(tmp_path) as found:
        yield found


def pretrained(path, **changes) -> VideoCLIPConfig:
    text = PretrainedTextConfig(NAME, str(path), **changes)
    return dataclasses.replace(CONFIG, text=text)


def test_a_pretrained_tower_gives_the_numbers_of_its_open_clip_model(weights):
    path, source = weights
    model = VideoCLIP(pretrained(path))
    lines = ["a man nods", "the woman turns left and then smiles"]
    packed = tokenize([[line] for line in lines])
    expected = source.encode_text(open_clip.get_tokenizer("ViT-B-32")(lines), normalize=True)
    found = model.encode_text(packed.tokens, packed.line_index)
    assert torch.allclose(found.embedding, expected, atol=1e-5)
    assert not any(name.startswith("visual") for name, _ in model.named_parameters())


def test_a_frozen_tower_is_in_eval_mode_in_no_optimizer_and_in_no_checkpoint(weights, tmp_path):
    path, _ = weights
    model = VideoCLIP(pretrained(path))
    for module in (model.train(), model.train().text):
        module.train()
    assert model.video.training
    assert not any(m.training for m in model.text.modules())
    packed = tokenize(TEXTS)
    out = model(clips(3), packed.tokens, packed.line_index)
    assert not out.text.requires_grad and out.video.requires_grad
    listed = {id(p) for group in param_groups(model, 0.1) for p in group["params"]}
    assert not listed & {id(p) for p in model.text.parameters()}
    assert listed == {id(p) for p in model.video.parameters()} | {id(model.log_logit_scale)}

    state = {n: t for n, t in model.state_dict().items() if model.keeps(n)}
    assert not any(name.startswith("text.") for name in state)
    saved = tmp_path / "model.safetensors"
    save_model(saved, "clip", model.config.to_dict(), state)
    loaded = load_model(saved, "clip")
    twin = VideoCLIP(VideoCLIPConfig.from_dict(loaded.config), load_pretrained=False)
    load_weights(twin, loaded, optional=lambda name: not twin.keeps(name))
    first = model.eval()(clips(3), packed.tokens, packed.line_index)
    second = twin.eval()(clips(3), packed.tokens, packed.line_index)
    assert torch.equal(first.video, second.video) and torch.equal(first.text, second.text)
    assert file_hash(saved) == loaded.hash


def test_a_frozen_tower_whose_file_is_gone_or_changed_is_an_error(weights):
    path, source = weights
    model = VideoCLIP(pretrained(path))
    config = VideoCLIPConfig.from_dict(model.config.to_dict())
    assert isinstance(config.text, PretrainedTextConfig)
    assert config.text.sha256 == weights_sha256(model.text)
    with torch.no_grad():
        source.token_embedding.weight[100, 3] += 1
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"open_clip\.pt: other weights than those"):
        VideoCLIP(config, load_pretrained=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"open_clip\.pt: no weights for .* {NAME}"):
        VideoCLIP(config, load_pretrained=False)
    path.unlink()
    with pytest.raises(TowerError, match=r"open_clip\.pt: no such file, and no tag of"):
        VideoCLIP(config, load_pretrained=False)


def test_a_tower_that_is_tuned_is_in_the_checkpoint_and_needs_no_file(weights, tmp_path):
    path, _ = weights
    model = VideoCLIP(pretrained(path, frozen=False))
    assert model.train().text.training
    assert all(p.requires_grad for p in model.text.parameters())
    assert all(model.keeps(name) for name in model.state_dict())
    with torch.no_grad():
        model.text.positions.add_(1)
    saved = tmp_path / "model.safetensors"
    save_model(saved, "clip", model.config.to_dict(), model.state_dict())
    path.unlink()
    loaded = load_model(saved, "clip")
    twin = VideoCLIP(VideoCLIPConfig.from_dict(loaded.config), load_pretrained=False)
    load_weights(twin, loaded)
    assert torch.equal(twin.text.positions, model.text.positions)


def test_a_tower_that_does_not_fit_is_an_error(weights):
    path, _ = weights
    wide = dataclasses.replace(pretrained(path), embed_dim=32)
    with pytest.raises(ValueError, match="its embeddings have 24 dimensions, not 32"):
        VideoCLIP(wide)
    unknown = dataclasses.replace(CONFIG, text=PretrainedTextConfig("no-such-model", str(path)))
    with pytest.raises(ValueError, match="no-such-model: open_clip knows no model of this name"):
        VideoCLIP(unknown)
    with pytest.raises(ValueError, match=r"open_clip\.pt: no weights for .* ViT-B-32"):
        VideoCLIP(dataclasses.replace(CONFIG, text=PretrainedTextConfig("ViT-B-32", str(path))))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context_length": 64}, "has 49408 tokens and context 64"),
        ({"no_causal_mask": True}, "attends to padding"),
        ({"pool_type": "last"}, "pools at 'last', not at EOT"),
    ],
)
def test_a_tower_of_another_kind_is_an_error(tmp_path, change, message):
    config = MODEL_CONFIG | {"text_cfg": MODEL_CONFIG["text_cfg"] | change, "custom_text": True}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    try:
        path = tmp_path / "open_clip.pt"
        torch.save(open_clip.create_model(NAME).state_dict(), path)
        with pytest.raises(ValueError, match=message):
            VideoCLIP(pretrained(path))
    finally:
        _MODEL_CONFIGS.pop(NAME, None)


def test_conv_embedding_keeps_tubelets_apart_and_patches_in_place() -> None:
    torch.manual_seed(0)
    config = VideoTowerConfig(32, 4, (8, 8), 2, 32, 1, 1, 2, embedding="conv")
    embed = ConvTubelets(config)
    video = torch.randn(2, 3, 4, 32, 32)
    tokens = embed(video)
    assert tokens.shape == (4, 16, 32)  # (B T, N, W)
    later = video.clone()
    later[:, :, 2:] += 1
    changed = (embed(later) - tokens).abs().amax(dim=(1, 2))
    assert changed[0] == 0 and changed[2] == 0 and changed[1] > 1e-3 and changed[3] > 1e-3
    pixel = video.clone()
    pixel[0, :, 0, 12, 28] += 1  # row 1, column 3 of the patches
    # group norm spreads a little of it over the frame, most stays in place
    difference = (embed(pixel) - tokens)[0].abs().sum(1)
    assert difference.argmax() == 1 * 4 + 3
    with pytest.raises(ValueError, match="square patch"):
        dataclasses.replace(config, patch=(8, 4))
