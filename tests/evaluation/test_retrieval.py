"""Recall against a brute-force reference, with ties, collapse and numbers that are not finite."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle2_video.evaluation import retrieval as module
from dalle2_video.evaluation.retrieval import retrieval


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int) -> float:
    hits = 0
    for i in range(len(queries)):
        nearest = np.argsort(-(gallery @ queries[i]), kind="stable")[:k]
        hits += i in nearest
    return hits / len(queries)


def test_recall_equals_a_brute_force_search(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)  # so that the last chunk is a partial one
    video = unit(50, 8, 0)
    text = F.normalize(video + unit(50, 8, 1), dim=-1)
    found = retrieval(video, text).metrics()
    for k in (1, 5, 10):
        for name, q, g in (("text_to_video", text, video), ("video_to_text", video, text)):
            expected = brute_force(q.numpy(), g.numpy(), k)
            assert found[f"recall_at_{k}_{name}"] == pytest.approx(expected)
    assert 0.2 < found["recall_at_1_text_to_video"] < 1  # neither trivial nor hopeless
    assert found["recall_at_1_text_to_video"] != found["recall_at_1_video_to_text"]


def test_a_perfect_model_finds_everything():
    video = unit(30, 16, 2)
    found = retrieval(video, video)
    assert found.text_to_video.at == {1: 1.0, 5: 1.0, 10: 1.0}
    assert found.video_to_text.median_rank == 1


@pytest.mark.parametrize("collapsed", ["video", "text", "both"])
def test_a_collapsed_model_scores_chance(collapsed):
    n = 40
    video, text = unit(n, 16, 3), unit(n, 16, 4)
    # A basis vector, so that equal rows give bitwise equal scores whatever the order of summation.
    point = torch.eye(16)[:1].expand(n, -1)
    video = point if collapsed in ("video", "both") else video
    text = point if collapsed in ("text", "both") else text
    found = retrieval(video, text)
    collapsed_gallery = found.text_to_video if collapsed != "text" else found.video_to_text
    assert collapsed_gallery.at == pytest.approx({1: 1 / n, 5: 5 / n, 10: 10 / n})
    assert collapsed_gallery.median_rank == (n + 1) / 2
    assert found.metrics()["recall_at_1_chance"] == 1 / n


def test_two_clips_with_the_same_caption_share_the_first_place():
    video = torch.eye(4)
    text = torch.eye(4)
    text[1] = text[0]  # clip 1 has the caption of clip 0
    found = retrieval(video, text)
    assert found.video_to_text.at[1] == pytest.approx(
        (1 / 2 + 1 / 4 + 1 + 1) / 4
    )  # clip 1: all tie
    assert found.video_to_text.at[5] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(value):
    video, text = unit(5, 4, 5), unit(5, 4, 6)
    text[2, 1] = value
    with pytest.raises(ValueError, match="text embeddings hold numbers that are not finite"):
        retrieval(video, text)


def test_shapes_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(6, 4\)"):
        retrieval(unit(5, 4, 0), unit(6, 4, 0))
