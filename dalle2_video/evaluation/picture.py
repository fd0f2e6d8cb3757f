"""An animated picture of sampled clips with their captions, such as the one of the README.

    python -m dalle2_video.evaluation.picture runs/demo --clips 0,3,8,12 --out samples.webp

Reads the folder that demo.py writes; a WebP plays in browsers and on GitHub.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle2_video.data.atomic import read_json, whole
from dalle2_video.data.media.sheet import wrap_text
from dalle2_video.errors import UserError
from dalle2_video.evaluation.page import read_mp4
from dalle2_video.failures import one_line_errors

FPS = 8.0
GAP, FONT_SIZE, LINE = 12, 14, 18  # pixels
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a demo: clips/<U-Net> and captions.json")
    parser.add_argument("--clips", default="0,1,2,3,4,5,6,7", help="which of them, from 0")
    parser.add_argument("--unet", default="ssr", help="whose clips")
    parser.add_argument("--columns", type=int, default=4, help="clips in a row")
    parser.add_argument("--side", type=int, default=192, help="pixels of a clip")
    parser.add_argument("--out", type=Path, default=Path("samples.webp"), help="the WebP file")
    given = parser.parse_args()
    captions = read_json(given.run / "captions.json")
    paths = sorted((given.run / "clips" / given.unet).glob("*.mp4"))
    if not paths:
        raise UserError(f"{given.run}/clips/{given.unet}: no clips; run demo.py first")
    chosen = [int(number) for number in given.clips.split(",") if number.strip().isdecimal()]
    if not chosen or max(chosen) >= len(paths):
        raise UserError(f"--clips {given.clips}: must be numbers from 0 to {len(paths) - 1}")
    clips = [read_mp4(paths[number])[0] for number in chosen]
    texts = [captions[number] for number in chosen]
    save_animation(given.out, clips, texts, given.columns, given.side)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.2f} MB")


def save_animation(
    path: Path,
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int = 4,
    side: int = 192,
    fps: float = FPS,
) -> None:
    """A WebP that plays all clips at once, for ever, each above its caption.

    clips: uint8 RGB (F, H, H, 3), of one length. captions: one for each. side: pixels of a clip.
    """
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap_text(caption, side, font) for caption in captions]
    height = side + GAP + LINE * max(map(len, texts))
    rows = -(-len(clips) // columns)
    size = (columns * (side + GAP) + GAP, rows * (height + GAP) + GAP)
    frames = []
    for number in range(len(clips[0])):
        sheet = Image.new("RGB", size, BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        for place, (clip, lines) in enumerate(zip(clips, texts, strict=True)):
            left = GAP + place % columns * (side + GAP)
            top = GAP + place // columns * (height + GAP)
            image = Image.fromarray(clip[number]).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left, top))
            for k, line in enumerate(lines):
                draw.text((left, top + side + GAP // 2 + k * LINE), line, INK, font)
        frames.append(sheet)
    with whole(path) as partial:
        frames[0].save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            quality=80,
            method=6,
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
