"""Sample videos from text with the networks of a run: a file per clip and a contact sheet.

    python sample.py train_name=run1 text="a man with a beard smiles, warm light from the left"
    python sample.py train_name=run1 file=texts.txt number=2 sample.guidance_scale=4
    python sample.py train_name=run1 sample.candidates=4 keep_stages=true format=frames
    accelerate launch --config_file configs/accelerate/ddp.yaml sample.py file=texts.txt

A text is taken apart at its sentences; nothing of it is cut off. Without text and file, an example
is sampled. `cascade` names the U-Nets; several processes share the texts out.
"""

import dataclasses
import re
import sys
from pathlib import Path

import hydra
from accelerate.utils import gather_object
from omegaconf import DictConfig

from dalle2_video.data.media.output import check_format, write_clip
from dalle2_video.data.media.sheet import save_sheet
from dalle2_video.pipeline.cascade import Cascade, read_texts, sampling_bar
from dalle2_video.stages.wiring import quote_texts, sample_config
from dalle2_video.training.accelerator import process_state

EXAMPLE = "A woman with long blond hair turns left and starts to smile. Warm light from the right."
SHOWN = 32  # clips on the sheet


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    config, form = sample_config(cfg), check_format(cfg.format)
    example = EXAMPLE if cfg.text is None and cfg.file is None else cfg.text
    texts = read_texts(example, cfg.file, cfg.number)
    state = process_state(cfg.timeout_minutes)
    cascade = Cascade.load(
        cfg.run_dir, state.device or "cpu", cfg.mixed_precision, list(cfg.cascade)
    )
    mine = range(state.process_index, len(texts), state.num_processes)
    bar = sampling_bar(cascade.num_steps(len(mine), config), not state.is_main_process)
    with bar as report:
        made = cascade.sample_stages([texts[i] for i in mine], config, mine, report)

    name = re.sub(r"[^a-z0-9]+", "_", texts[0].lower())[:60].strip("_")
    out = Path(cfg.out or Path(cfg.run_dir) / "samples" / f"{name}_{config.seed}")
    *earlier, last = cascade.stages
    for stage in [*earlier, last] if cfg.keep_stages else [last]:
        folder = out if stage is last else out / stage.name
        for i, frames in zip(mine, made[stage.name].numpy(), strict=True):
            facts = {"seed": config.seed, "number": i, "run": str(cfg.run_dir), "stage": stage.name}
            facts |= {"cascade": list(cfg.cascade), "sample": dataclasses.asdict(config)}
            write_clip(folder, f"{i:04d}", frames, stage.fps, texts[i], facts, form)
    clips = zip(mine, made[last.name].numpy(), strict=True)
    shown = dict(gather_object([(i, frames) for i, frames in clips if i < SHOWN]))
    if state.is_main_process:
        save_sheet(out / "sheet.png", [shown[i] for i in sorted(shown)], texts[:SHOWN])
        print(f"{len(texts)} clips in {out}")


if __name__ == "__main__":
    sys.argv[1:] = quote_texts(sys.argv[1:])
    main()
