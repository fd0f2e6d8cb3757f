"""The report: an HTML page with a table and players of each sampled clip; all clips in one mp4."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.evaluation.summary import Row

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: left }
tr:nth-child(even) { background: #f3f3f3 }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1.2em }
video { flex: 1; min-width: 0; image-rendering: pixelated; background: #000 }
figure { margin: 0; display: flex; flex-wrap: wrap; gap: 4px }
figcaption { font-size: 12px; color: #444; width: 100% }
"""


def write_page(
    folder: Path,
    captions: Sequence[str],
    rows: Sequence[Row],
    metrics: Mapping[str, Any],
    unets: Sequence[str],
) -> None:
    """index.html over folder/clips/<U-Net>/*.mp4, each clip as every U-Net made it; samples.mp4
    with the last one's clips side by side.

    captions: one for each clip, in the order of the files' names. metrics: of these the page shows
    commit and hardware. ValueError where there are fewer clips than captions.
    """
    paths = sorted((folder / "clips" / unets[-1]).glob("*.mp4"))[: len(captions)]
    table = "".join(
        f"<tr><td>{html.escape(r.stage)}<td>{r.minutes:.1f}<td>{html.escape(r.metric)}"
        f"<td>{html.escape(r.chance)}"
        for r in rows
    )
    players = "".join(
        "<figure>"
        + "".join(
            f'<video src="clips/{unet}/{path.name}" title="{unet}" controls loop muted autoplay>'
            "</video>"
            for unet in unets
        )
        + f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in zip(paths, captions, strict=True)
    )
    (folder / "index.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>DALLE2-video demo</title><style>{STYLE}</style>"
        f"<h1>DALLE2-video: sampled from captions of unseen combinations</h1>"
        f"<p>commit {html.escape(str(metrics['commit']))}, {html.escape(metrics['hardware'])}</p>"
        f"<table><tr><th>stage<th>minutes<th>metric<th>chance{table}</table>"
        f"<p>Each clip from left to right: {', '.join(unets)}.</p>"
        f'<div class="clips">{players}</div>',
        encoding="utf-8",
    )
    clips, fps = zip(*(read_mp4(path) for path in paths), strict=True)
    scale = max(1, 128 // clips[0].shape[1])
    tiled = grid(np.stack(clips)).repeat(scale, 1).repeat(scale, 2)
    encode_mp4(folder / "samples.mp4", tiled, fps[0])


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    """All frames of one of our own mp4 files, uint8 (F, H, W, 3), and its frames per second."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), float(rate or 8)


def grid(clips: np.ndarray) -> np.ndarray:
    """Clips (B, F, H, W, 3) side by side, as square as it goes: (F, rows H, columns W, 3)."""
    count, frames, height, width, _ = clips.shape
    columns = int(np.ceil(count**0.5))
    rows = -(-count // columns)
    blank = np.zeros((rows * columns - count, frames, height, width, 3), clips.dtype)
    tiles = np.concatenate([clips, blank]).reshape(rows, columns, frames, height, width, 3)
    return tiles.transpose(2, 0, 3, 1, 4, 5).reshape(frames, rows * height, columns * width, 3)
