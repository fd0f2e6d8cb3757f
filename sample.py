"""Sample videos from text with the networks of a run: a file per clip and a contact sheet.

    python sample.py train_name=run1 text="a man with a beard smiles, warm light from the left"
    python sample.py train_name=run1 file=texts.txt num_samples=2 sample.guidance_scale=4
    python sample.py train_name=run1 sample.candidates=4 save_intermediates=true format=frames
    accelerate launch --config_file configs/accelerate/ddp.yaml sample.py file=texts.txt

A text is taken apart at its sentences; nothing of it is cut off. Without text and file, an example
is sampled. `cascade` names the U-Nets; several processes share the texts out.
"""

import dataclasses
import hashlib
import re
from pathlib import Path

from omegaconf import DictConfig

from dalle2_video.cli import script

EXAMPLE = "A woman with long blond hair turns left and starts to smile. Warm light from the right."
SHOWN = 32  # clips on the sheet


@script(
    *("text", "file", "num_samples", "format", "save_intermediates", "out"),
    *("train_name", "run_dir", "mixed_precision", "timeout_minutes", "cascade", "sample"),
)
def main(cfg: DictConfig) -> None:
    # here, not above: --help and a wrong key need none of it
    from accelerate.utils import gather_object

    from dalle2_video.data.media.output import write_clip
    from dalle2_video.data.media.sheet import save_sheet
    from dalle2_video.pipeline.cascade import Cascade, read_texts, sampling_bar
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.training.accelerator import chosen_precision, process_state

    settings = settings_of(cfg)
    config = settings.sample
    example = EXAMPLE if settings.text is None and settings.file is None else settings.text
    texts = read_texts(example, settings.file, settings.num_samples)
    state = process_state(settings.timeout_minutes)
    precision = chosen_precision(settings.mixed_precision)
    cascade = Cascade.load(settings.run_dir, state.device or "cpu", precision, settings.cascade)
    mine = range(state.process_index, len(texts), state.num_processes)
    bar = sampling_bar(cascade.num_sampler_steps(len(mine), config), not state.is_main_process)
    with bar as progress:
        made = cascade.sample_all([texts[i] for i in mine], config, mine, progress)

    name = re.sub(r"[^a-z0-9]+", "_", texts[0].lower())[:60].strip("_")
    asked = repr((texts, settings.cascade, config, settings.format)).encode()
    name = f"{name}_{config.seed}_{hashlib.blake2b(asked, digest_size=3).hexdigest()}"
    out = Path(settings.out or Path(settings.run_dir) / "samples" / name)
    *earlier, last = cascade.unets
    for unet in [*earlier, last] if settings.save_intermediates else [last]:
        folder = out if unet is last else out / unet.name
        for i, frames in zip(mine, made[unet.name].numpy(), strict=True):
            facts = {
                "seed": config.seed,
                "number": i,
                "run": str(settings.run_dir),
                "stage": unet.name,
            }
            facts |= {"cascade": settings.cascade, "sample": dataclasses.asdict(config)}
            write_clip(folder, f"{i:04d}", frames, unet.fps, texts[i], facts, settings.format)
    clips = zip(mine, made[last.name].numpy(), strict=True)
    shown = dict(gather_object([(i, frames) for i, frames in clips if i < SHOWN]))
    if state.is_main_process:
        save_sheet(out / "sheet.png", [shown[i] for i in sorted(shown)], texts[:SHOWN])
        print(f"{len(texts)} clips in {out}")


if __name__ == "__main__":
    main()
