"""The cascade from text to the last U-Net: chain, candidates, and what is refused."""

import json
import shutil

import pytest
import torch

from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import CaptionError, text_to_lines
from dalle2_video.model_file import CheckpointError
from dalle2_video.pipeline.cascade import Cascade, CascadeUnet, check_chain, read_texts
from dalle2_video.pipeline.sampling import sample_clips
from dalle2_video.pipeline.sampling_config import SampleConfig, SuperResolutionSampling
from tests.helpers.runs import ORDER

FAST = SampleConfig(
    steps=2, prior_steps=2, batch_size=2, guidance_scale=2.0,
    unets={
        "tsr": SuperResolutionSampling(steps=3, batch_size=3),
        "ssr": SuperResolutionSampling(sampler="dpm_solver", steps=2, batch_size=1),
    },
)  # fmt: skip
TEXTS = ["a man smiles", "a woman nods", "a bald man. Dim light. He talks."]


@pytest.fixture(scope="module")
def cascade(chain_dir) -> Cascade:
    return Cascade.load(chain_dir, order=ORDER)


def test_every_stage_hands_its_clips_to_the_next(cascade) -> None:
    steps = []
    made = cascade.sample_all(TEXTS, FAST, progress=steps.append)
    assert {name: tuple(clips.shape[1:]) for name, clips in made.items()} == {
        "base": (4, 16, 16, 3), "tsr": (8, 16, 16, 3), "ssr": (8, 32, 32, 3),
    }  # fmt: skip
    assert torch.equal(made["tsr"][:, ::2], made["base"])  # known frames, as they went in
    assert not torch.equal(made["tsr"][:, 1::2], made["base"])
    assert steps == ["base"] * 4 + ["tsr"] * 3 + ["ssr"] * 6  # batches of 2, 3 and 1
    assert len(steps) == cascade.num_sampler_steps(3, FAST) and cascade.fps == 4
    assert cascade.num_sampler_steps(3, FAST, "base") == 4
    alone = cascade.sample_all(TEXTS[1:2], FAST, [1])
    for name, clips in made.items():  # keyed by number, whatever the batch
        assert (alone[name].int() - clips[1:2].int()).abs().max() <= 1, name
    assert list(cascade.sample_all(TEXTS, FAST, last="tsr")) == ["base", "tsr"]


def test_one_network_at_a_time_is_on_the_device(cascade, monkeypatch) -> None:
    moves = []
    for name, module in [("clip", cascade.video_clip), ("prior", cascade.prior)] + [
        (unet.name, unet.network) for unet in cascade.unets
    ]:
        monkeypatch.setattr(
            module, "to", lambda device, name=name: moves.append((name, str(device)))
        )
    monkeypatch.setattr(cascade, "device", torch.device("cpu", 0))
    cascade.sample_all(TEXTS[:1], FAST)
    there = [(name, place) for name in ("clip", "prior", *ORDER) for place in ("cpu:0", "cpu")]
    assert moves == there


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_unet_draws_from_a_stream_of_its_own_in_the_precision_asked_for(
    cascade, monkeypatch, precision
) -> None:
    drawn, halves = {}, []

    def watched(unet, model, diffusion, condition, ids, how, seed, lowres, progress, stream):
        drawn.setdefault(stream, []).extend(ids.tolist())
        halves.append((seed, torch.is_autocast_enabled("cpu")))
        return sample_clips(
            unet, model, diffusion, condition, ids, how, seed, lowres, progress, stream
        )

    monkeypatch.setattr("dalle2_video.pipeline.cascade.sample_clips", watched)
    encode, texts = cascade.video_clip.encode_text, []
    monkeypatch.setattr(
        cascade.video_clip,
        "encode_text",
        lambda *tokens: (texts.append(torch.is_autocast_enabled("cpu")), encode(*tokens))[1],
    )
    networks = cascade.video_clip, (cascade.prior, cascade.prior_diffusion), cascade.unets
    config = SampleConfig(**{**FAST.__dict__, "seed": 11})
    made = Cascade(*networks, precision=precision).sample(TEXTS, config, first=4)
    streams = ("sample", "sample/tsr", "sample/ssr")
    assert drawn == {stream: [4, 5, 6] for stream in streams}
    assert set(halves) == {(11, precision == "bf16")}
    assert set(texts) == {False}, "texts are encoded in float32, as in training"
    if precision == "no":
        assert torch.equal(made, cascade.sample(TEXTS, config, first=4))
        assert not torch.equal(made, cascade.sample(TEXTS, FAST, first=4))


def test_the_nearest_of_several_candidates_is_kept(cascade) -> None:
    many = SampleConfig(**{**FAST.__dict__, "candidates": 3})
    assert cascade.judge == "ssr"  # the CLIP sees 8 frames of 32 px
    steps = []
    best = cascade.sample_all(TEXTS, many, progress=steps.append)
    assert len(steps) == cascade.num_sampler_steps(3, many)
    drawn = cascade.sample_all(
        [text for text in TEXTS for _ in range(3)], FAST, range(9)
    )  # the same candidates, none left out
    text = cascade.encode(TEXTS).embedding
    with torch.no_grad():
        video = cascade.video_clip.encode_video(to_float(drawn["ssr"])).unflatten(0, (3, 3))
    kept = torch.einsum("bkd,bd->bk", video, text).argmax(1)
    assert kept.tolist() != [0, 0, 0]
    for name, clips in drawn.items():
        expected = clips.unflatten(0, (3, 3))[torch.arange(3), kept]
        assert (best[name].int() - expected.int()).abs().max() <= 1, name


def test_candidates_are_judged_as_early_as_the_clip_can_see(cascade, configure, run_dir) -> None:
    base = Cascade.load(run_dir, order=("base",))  # 8 frames of 32 px
    assert base.judge == "base"
    # stopped before the judge there is nothing to choose from: one clip per text
    many = SampleConfig(**{**FAST.__dict__, "candidates": 3})
    steps = []
    made = cascade.sample_all(TEXTS, many, progress=steps.append, last="base")
    assert len(made["base"]) == 3 and len(steps) == cascade.num_sampler_steps(3, many, "base")
    model = cascade.unets[0]
    blind = Cascade(cascade.video_clip, (cascade.prior, cascade.prior_diffusion), [model])
    with pytest.raises(ValueError, match="sees 8 frames of 32 px, which no clip of the cascade"):
        blind.sample(TEXTS, SampleConfig(candidates=2))


def test_the_chosen_candidate_goes_on_with_its_own_number_and_text(cascade, monkeypatch) -> None:
    """Chosen behind the base: the later U-Nets make of it what they make of it without a choice."""
    monkeypatch.setattr(Cascade, "judge", "base")
    monkeypatch.setattr(cascade, "nearest", lambda clips, text, many: torch.tensor([2, 3, 7]))
    best = cascade.sample_all(TEXTS, SampleConfig(**{**FAST.__dict__, "candidates": 3}))
    every = [text for text in TEXTS for _ in range(3)]
    drawn = cascade.sample_all(every, FAST, range(9))
    for name, clips in drawn.items():
        assert (best[name].int() - clips[[2, 3, 7]].int()).abs().max() <= 1, name


def test_stages_that_do_not_chain_are_named(cascade, chain_dir, run_dir) -> None:
    base, tsr, ssr = cascade.unets
    for stages, message in (
        ([], "needs a U-Net"),
        ([tsr], "'tsr' is a super-resolution U-Net and cannot come first"),
        ([base, base], "'base' makes clips of text, so it comes first"),
        ([base, ssr], "'ssr' was trained on clips of 16 px at 4 .* 'base' makes 16 px at 2"),
        ([base, tsr, CascadeUnet("ssr", ssr.network, ssr.diffusion, 8.0)], "at 8 .*'tsr' .* at 4"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_chain(stages)
    with pytest.raises(CheckpointError, match=r"'ssr' was trained on .* 16 px .* makes 32 px"):
        Cascade.load(run_dir, order=("base", "ssr"))  # a base of 32 px


def test_a_missing_stage_and_one_of_another_clip_are_named(chain_dir, tmp_path) -> None:
    shutil.copytree(chain_dir, tmp_path / "run")
    path = tmp_path / "run" / "tsr" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"tsr/model.safetensors: no such file; the tsr model"
    ):
        Cascade.load(tmp_path / "run", order=ORDER)
    hashed = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert "clip_hash" in str(hashed)
    place = content.index(b"clip_hash")
    place = content.index(b":", place) + 4  # inside the quoted hash, in either quoting
    changed = b"0" if content[place : place + 1] != b"0" else b"1"
    path.write_bytes(content[:place] + changed + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"tsr/model.safetensors: trained on the CLIP"):
        Cascade.load(tmp_path / "run", order=ORDER)


def test_empty_texts_are_refused_and_long_ones_split(cascade) -> None:
    with pytest.raises(CaptionError):
        cascade.sample(["a man", "  "], FAST)
    long = ", ".join(f"a blue hat number {i}" for i in range(60))  # one sentence, 300 words
    lines = text_to_lines(long)
    assert len(lines) > 3 and all(f"number {i}" in " ".join(lines) for i in range(60))
    assert cascade.sample([long], FAST).shape == (1, 8, 32, 32, 3)


def test_texts_to_sample(tmp_path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n two \n")
    assert read_texts(None, str(file), 2) == ["one", "one", "two", "two"]
    for text, path in ((None, None), ("a", str(file))):
        with pytest.raises(ValueError, match="either text"):
            read_texts(text, path, 1)
    with pytest.raises(ValueError, match="nothing to sample"):
        read_texts("  ", None, 1)


def test_what_a_text_says_reaches_the_model_in_any_order(cascade) -> None:
    """No line is cut off; a free text is the set of its sentences."""
    lines = [f"Person number {i} looks happy and wears a large blue hat." for i in range(9)]
    whole = cascade.encode([lines])
    free = cascade.encode([" ".join(lines)])
    back = cascade.encode([lines[::-1]])
    assert int(whole.mask.sum()) > 100
    torch.testing.assert_close(whole.embedding, back.embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.embedding, free.embedding, atol=1e-5, rtol=0)
    changed = cascade.encode([[*lines[:-1], lines[-1].replace("blue", "red")]])
    assert (changed.embedding - whole.embedding).abs().max() > 1e-5
