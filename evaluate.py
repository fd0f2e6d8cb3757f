"""Judge a run by its samples: metrics as JSON, samples as mp4 and a contact sheet.

    python evaluate.py train_name=run1
    python evaluate.py train_name=run1 evaluate.metric=nearest evaluate.split=train
    python evaluate.py train_name=run1 evaluate.metric=nll evaluate.split=val

The first reads from samples what the captions of `heldout` name (embedded data); the second asks
whether samples of a run that has learned its clips by heart show those clips; the third bounds the
bits per dimension of the clips themselves and samples nothing.
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from dalle2_video.cli import script


@script(
    *("out", "train_name", "run_dir", "seed", "mixed_precision"),
    *("cascade", "sample", "evaluate", "faces", "data"),
)
def main(cfg: DictConfig) -> None:
    # here, not above: --help and a wrong key need none of it
    import torch
    from tqdm import tqdm

    from dalle2_video.data.atomic import write_json
    from dalle2_video.data.media.encode import encode_mp4
    from dalle2_video.data.media.sheet import save_sheet
    from dalle2_video.data.sources.captions import EvaluationCaptions
    from dalle2_video.data.store.dataset import CelebVTextDataset
    from dalle2_video.evaluation.alignment import (
        captions_of,
        evaluate_alignment,
        evaluate_nearest,
    )
    from dalle2_video.evaluation.likelihood import evaluate_bits
    from dalle2_video.faces.probe import load_probe
    from dalle2_video.faces.writer import read_attributes
    from dalle2_video.pipeline.cascade import Cascade, sampling_bar
    from dalle2_video.provenance import provenance
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.stages.wiring import need_data_of_the_run, store_of
    from dalle2_video.training.accelerator import chosen_precision

    settings = settings_of(cfg)
    need_data_of_the_run(settings)
    plan, config, store = settings.evaluate, settings.sample, store_of(settings)
    every = EvaluationCaptions()
    dataset = CelebVTextDataset(store, plan.split, settings.seed, every, first_windows=True)
    precision = chosen_precision(settings.mixed_precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cascade = Cascade.load(settings.run_dir, device, precision, settings.cascade)
    num_clips = min(plan.clips, len(dataset))
    out = Path(settings.out or f"{settings.run_dir}/evaluation")
    first, last = cascade.unets[0].name, cascade.unets[-1].name
    steps, made = cascade.num_sampler_steps(num_clips, config), {}
    if plan.metric == "nll":
        captions = captions_of(dataset, num_clips)
        with tqdm(total=num_clips, unit="clip") as bar:
            metrics = evaluate_bits(cascade, captions, plan.draws, config, bar.update)
    elif plan.metric == "attributes":
        attributes = read_attributes(Path(settings.data.root) / "attributes.jsonl")
        steps += cascade.num_sampler_steps(num_clips, config, first)
        with sampling_bar(steps) as progress:
            metrics, captions, made = evaluate_alignment(
                cascade, dataset, attributes, load_probe(), num_clips, config, progress
            )
    else:
        captions = captions_of(dataset, num_clips)
        with sampling_bar(steps) as progress:
            metrics, made = evaluate_nearest(cascade, captions, config, progress)
    for unet in cascade.unets if made else ():
        for i, clip in enumerate(made[unet.name].numpy()):
            encode_mp4(out / "clips" / unet.name / f"{i:04d}.mp4", clip, unet.fps)
    if made:
        texts = [" ".join(lines) for lines in captions.lines]
        save_sheet(out / "sheet.png", list(made[last][:32].numpy()), texts[:32])
        write_json(out / "captions.json", texts)
    judged = metrics | provenance() | {"mixed_precision": precision}
    write_json(out / ("nll.json" if plan.metric == "nll" else "report.json"), judged)
    print(json.dumps(judged, indent=1), f"\nin {out}")


if __name__ == "__main__":
    main()
