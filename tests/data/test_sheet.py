"""Contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.media.sheet import contact_sheet, save_sheet
from tests.helpers.media import grey_steps


def test_contact_sheet_is_readable(tmp_path: Path) -> None:
    clips = [grey_steps(16, 32, 32, step=10), grey_steps(3, 128, 128)]
    texts = ["a man smiles, " * 30 + "\nwarm light", "x" * 500]
    sheet = contact_sheet(clips, texts, frames_per_clip=4)
    pixels = np.asarray(sheet)
    first = pixels[20, 300:]  # right of the text: frames enlarged to at least 112 pixels
    assert sorted(set(first[:, 0].tolist()) - {250}) == [0, 50, 100, 150]
    assert (first[:, 0] == 50).sum() >= 112
    assert (pixels[:, :300].min(2) < 128).sum() > 2000, "no text was drawn"
    assert (pixels[:, 295:300] == 250).all(), "text runs into the frames"
    save_sheet(tmp_path / "sheets" / "sheet.png", clips, texts)
    assert (tmp_path / "sheets" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="2 clips, 1 captions"):
        contact_sheet(clips, texts[:1])
