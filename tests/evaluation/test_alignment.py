"""The attribute metrics, on clips whose attributes are known: rendered, wrong and shuffled ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dalle2_video.data.config import DataConfig
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset
from dalle2_video.data.store.store import open_store
from dalle2_video.evaluation.alignment import (
    alignment,
    captions_of,
    evaluate_alignment,
    evaluate_nearest,
    nearest_clips,
)
from dalle2_video.evaluation.config import EvaluateConfig
from dalle2_video.faces.config import FacesConfig
from dalle2_video.faces.probe import load_probe, score, targets_of
from dalle2_video.faces.writer import read_attributes, write_dataset
from dalle2_video.pipeline.sampling_config import SampleConfig


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CelebVTextDataset:
    """60 rendered clips in one split."""
    root = tmp_path_factory.mktemp("faces")
    write_dataset(FacesConfig(str(root), 60), {"all": 1.0}, workers=0, progress=False)
    config = DataConfig(
        root=str(root), fps=4.0, num_frames=8, size=32, splits={"all": 1.0}, workers=0
    )
    preprocess(config)
    return CelebVTextDataset(open_store(config), "all", 0, EvaluationCaptions())


@pytest.fixture(scope="module")
def truth(dataset):
    attributes = read_attributes(dataset.store.root / "attributes.jsonl")
    return [attributes[dataset.key(i).rsplit(":", 1)[0]] for i in range(len(dataset))]


def test_captions_belong_to_their_clips(dataset) -> None:
    captions = captions_of(dataset, 10)
    assert len(captions.lines) == len(captions.sentences) == len(captions.frames) == 10
    for i in range(10):
        assert dataset.key(i).startswith(captions.clip_ids[i] + ":")
        own = dataset.store.lines(dataset.clips[i])
        known = {line.text for lines in own.values() for line in lines}
        assert len(captions.lines[i]) == 6 and set(captions.lines[i]) <= known
        # the sentence says what the lines say, as one sentence where it fits
        words = captions.sentences[i].replace(",", "").replace(".", "").split()
        assert words == " ".join(captions.lines[i]).replace(",", "").replace(".", "").split()
        assert torch.equal(captions.frames[i], torch.from_numpy(dataset.store.frames([i])[0]))


def test_real_clips_score_high_and_other_clips_do_not(dataset, truth) -> None:
    frames = torch.from_numpy(dataset.store.frames(range(60)))
    metrics = alignment(load_probe(), frames, truth, frames)
    assert metrics["attribute_accuracy"] > 0.97
    assert metrics["ceiling_accuracy"] == metrics["attribute_accuracy"]
    assert metrics["light_rule_accuracy"] > 0.9
    # shuffled: each clip against the caption of the clip a third of the set further on
    other = {name: value.roll(-20) for name, value in targets_of(truth).items()}
    expected = score(load_probe().network.predict(frames), other).mean
    assert metrics["attribute_accuracy_shuffled"] == pytest.approx(expected)
    assert metrics["attribute_chance_shuffled"] == pytest.approx(expected)
    assert expected < 0.6
    result = score(load_probe().network.predict(frames), targets_of(truth))
    assert metrics["attribute_chance"] == result.mean_chance  # not that of the light alone
    pair, swapped = alignment(load_probe(), frames[:2], truth[:2]), targets_of(truth[1::-1])
    wrong = score(load_probe().network.predict(frames[:2]), swapped).mean
    assert pair["attribute_accuracy_shuffled"] == pytest.approx(wrong) and wrong < 1
    # frames of other clips are as bad as captions of other clips
    moved = alignment(load_probe(), frames.roll(7, 0), truth)
    assert moved["attribute_accuracy"] < 0.6 and "ceiling_accuracy" not in moved
    with_one = alignment(load_probe(), torch.cat([frames[1:2], frames[1:]]), truth)
    assert with_one["attribute_accuracy"] < metrics["attribute_accuracy"]


def test_the_lines_and_the_free_text_are_both_sampled(dataset, truth) -> None:
    real = torch.from_numpy(dataset.store.frames(range(12)))
    asked = []

    def sample_all(texts, config, sample_ids=None, progress=None, last=None):
        asked.append(texts)
        if last == "base":
            return {"base": real.roll(1, 0)}
        return {"base": real.roll(5, 0)[:, ::2], "ssr": real}

    cascade = SimpleNamespace(sample_all=sample_all)
    attributes = {dataset.key(i).rsplit(":", 1)[0]: clip for i, clip in enumerate(truth)}
    metrics, captions, made = evaluate_alignment(
        cascade, dataset, attributes, load_probe(), 12, SampleConfig()
    )
    assert asked == [captions.lines, captions.sentences] and torch.equal(made["ssr"], real)
    assert metrics["samples"] == 12
    assert metrics["attribute_accuracy"] > 0.9 > 0.7 > metrics["free_sentence_accuracy"]
    read = load_probe().network.predict(real.roll(5, 0)[:, ::2])
    assert metrics["accuracy_of_base"] == score(read, targets_of(truth[:12])).mean
    assert "accuracy_of_ssr" not in metrics


def test_nearest_clip_is_found_through_shifts_in_time_and_noise() -> None:
    random = np.random.default_rng(0)
    clips = torch.from_numpy(random.integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8))
    order = torch.tensor([3, 0, 5, 1])
    noisy = clips[order].int() + torch.randint(-20, 20, clips[order].shape)
    samples = noisy.clamp(0, 255).to(torch.uint8).roll(1, 1)
    assert nearest_clips(samples, clips).tolist() == order.tolist()
    # nor do all frames at once: the first clip has the frames of the sample, the second their mean
    pair = torch.stack([clips[0], clips[0]])
    pair[0, ::2], pair[0, 1::2], pair[1] = 0, 255, 127
    assert nearest_clips(pair[:1].roll(1, 1), pair).tolist() == [0]
    # one frame like another clip's does not decide
    samples[0, 2] = clips[4, 0]
    assert nearest_clips(samples, clips)[0] == 3


def test_the_share_of_samples_that_show_their_own_clip(dataset) -> None:
    """Three of four samples are their clips, seen smaller; the fourth shows the first one's."""
    captions = captions_of(dataset, 4)
    samples = captions.frames[[0, 1, 2, 0]][:, ::2]
    cascade = SimpleNamespace(
        sample_all=lambda texts, config, progress: {
            "base": captions.frames.roll(1, 0),
            "ssr": samples,
        }
    )
    metrics, made = evaluate_nearest(cascade, captions, SampleConfig())
    assert metrics == {"samples": 4.0, "nearest_is_own_clip": 0.75}
    assert list(made) == ["base", "ssr"]


def test_what_to_evaluate_is_checked() -> None:
    with pytest.raises(ValueError, match=r"draws\n.*greater than or equal to 1"):
        EvaluateConfig("nll", draws=0)
    with pytest.raises(ValueError, match=r"clips\n.*greater than 0"):
        EvaluateConfig(clips=0)
