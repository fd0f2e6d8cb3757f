"""A small open_clip model whose checkpoint lies in a local file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from open_clip.factory import _MODEL_CONFIGS

NAME = "tiny-test-clip"
MODEL_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


@contextmanager
def open_clip_checkpoint(folder: Path) -> Iterator[tuple[Path, open_clip.CLIP]]:
    """The whole checkpoint as open_clip saves it, and the model itself; known by NAME inside."""
    (folder / f"{NAME}.json").write_text(json.dumps(MODEL_CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(7)
    source = open_clip.create_model(NAME)
    path = folder / "open_clip.pt"
    torch.save(source.state_dict(), path)
    try:
        yield path, source
    finally:
        _MODEL_CONFIGS.pop(NAME, None)
