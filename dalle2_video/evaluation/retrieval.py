"""Retrieval over a whole split: the k nearest clips of a text, the k nearest texts of a clip.

Ties are resolved by expectation: recall is that of equal scores in a random order, so a collapsed
model scores chance, k / N.

N clips of the split, D embedding dimension; row i of both matrices belongs to clip i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KS = (1, 5, 10)
CHUNK = 1024  # rows of the N x N score matrix that exist at a time


@dataclass(frozen=True)
class Recall:
    """One direction. at: k -> recall at k in [0, 1]; median_rank: 1 is best, a tie counts half."""

    at: dict[int, float]
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions over the same num_clips clips."""

    text_to_video: Recall
    video_to_text: Recall
    num_clips: int

    def metrics(self) -> dict[str, float]:
        """Flat names: recall_at_1_text_to_video ..., median_rank_..., recall_at_1_chance."""
        found = {"recall_at_1_chance": 1 / self.num_clips}
        directions = {"text_to_video": self.text_to_video, "video_to_text": self.video_to_text}
        for name, recall in directions.items():
            found |= {f"recall_at_{k}_{name}": value for k, value in recall.at.items()}
            found[f"median_rank_{name}"] = recall.median_rank
        return found


def retrieval(video: Tensor, text: Tensor) -> Retrieval:
    """Recall of video and text embeddings, (N, D) each and l2-normalised; row i is of clip i.

    Raises ValueError on other shapes, or on numbers that are not finite (with a NaN every
    comparison is false, so that everything would look found).
    """
    if video.ndim != 2 or video.shape != text.shape or not len(video):
        shapes = f"{tuple(video.shape)} and {tuple(text.shape)}"
        raise ValueError(f"retrieval: video and text must both be (N, D), got {shapes}")
    for name, x in (("video", video), ("text", text)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"retrieval: the {name} embeddings hold numbers that are not finite")
    video, text = video.float(), text.float()
    return Retrieval(recall(text, video), recall(video, text), len(video))


def recall(queries: Tensor, gallery: Tensor) -> Recall:
    """Recall of one direction, (N, D) each; the right answer of query i is gallery row i."""
    greater, ties = [], []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T  # (n, N)
        right = scores.diagonal(start).unsqueeze(1)
        greater.append((scores > right).sum(dim=1))
        ties.append((scores == right).sum(dim=1) - 1)
    above = torch.cat(greater).cpu().double()
    equal = torch.cat(ties).cpu().double()
    # Of equal + 1 places, from above + 1 on, the right answer takes each with the same probability.
    at = {k: float(((k - above) / (equal + 1)).clamp(0, 1).mean()) for k in KS}
    return Recall(at, float((1 + above + equal / 2).quantile(0.5)))
