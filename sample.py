"""Sample videos from text with the networks of a run: an mp4 per clip and a contact sheet.

    python sample.py train_name=run1 text="a man with a beard smiles, warm light from the left"
    python sample.py train_name=run1 file=texts.txt number=2 sample.guidance_scale=4

A text is taken apart at its sentences; nothing of it is cut off. Without text and file, an example
is sampled.
"""

import re
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from dalle2_video.data.sheet import save_sheet
from dalle2_video.data.video import encode_mp4
from dalle2_video.generate import Cascade, read_texts
from dalle2_video.training.setup import quote_texts, sample_config

EXAMPLE = "A woman with long blond hair turns left and starts to smile. Warm light from the right."


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    config = sample_config(cfg)
    example = EXAMPLE if cfg.text is None and cfg.file is None else cfg.text
    texts = read_texts(example, cfg.file, cfg.number)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cascade = Cascade.load(cfg.run_dir, device, cfg.mixed_precision)
    with tqdm(total=cascade.num_steps(len(texts), config), desc="sampling", unit="step") as bar:
        clips = cascade.sample(texts, config, progress=bar.update).numpy()
    name = re.sub(r"[^a-z0-9]+", "_", texts[0].lower())[:60].strip("_")
    out = Path(cfg.out or Path(cfg.run_dir) / "samples" / f"{name}_{config.seed}")
    out.mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(clips):
        encode_mp4(out / f"{i:04d}.mp4", clip, cascade.fps)
    save_sheet(out / "sheet.png", list(clips), texts)
    print(f"{len(clips)} clips in {out}")


if __name__ == "__main__":
    sys.argv[1:] = quote_texts(sys.argv[1:])
    main()
