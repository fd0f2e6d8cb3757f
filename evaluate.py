"""Measure a run by its samples: figures as JSON, samples as mp4 and a contact sheet.

    python evaluate.py train_name=run1
    python evaluate.py train_name=run1 evaluate.metric=nearest evaluate.split=train
    python evaluate.py train_name=run1 evaluate.metric=nll evaluate.split=val

The first reads the attributes that the captions of `combo` name (embedded data); the second asks
whether the samples of an overfitted run show their own clips; the third bounds the bits per
dimension of held-out clips, given their texts and their own video embeddings, without sampling.
"""

import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from dalle2_video.data.atomic import write_json
from dalle2_video.data.captions import CaptionPolicy
from dalle2_video.data.dataset import CelebVTextDataset
from dalle2_video.data.faces import read_attributes
from dalle2_video.data.sheet import save_sheet
from dalle2_video.data.video import encode_mp4
from dalle2_video.evaluation.alignment import (
    EvaluateConfig,
    captions_of,
    evaluate_alignment,
    nearest_clips,
)
from dalle2_video.evaluation.attributes import load_probe
from dalle2_video.evaluation.likelihood import evaluate_bits
from dalle2_video.evaluation.provenance import provenance
from dalle2_video.generate import Cascade, load_unet, sampling_bar
from dalle2_video.training.conditions import TextEncoder, load_conditions
from dalle2_video.training.setup import sample_config, store_of
from dalle2_video.training.stage import from_config


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    plan = from_config(EvaluateConfig, cfg.evaluate, "evaluate")
    if plan.metric == "nll":
        bits(cfg, plan)
        return
    config, store = sample_config(cfg), store_of(cfg)
    policy = CaptionPolicy(drop=False)
    dataset = CelebVTextDataset(store, plan.split, cfg.seed, policy, first_windows=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cascade = Cascade.load(cfg.run_dir, device, cfg.mixed_precision, list(cfg.cascade))
    first = cascade.stages[0].name
    number = min(plan.clips, len(dataset))
    steps = cascade.num_steps(number, config)
    if plan.metric == "attributes":
        attributes = read_attributes(Path(cfg.data.root) / "attributes.jsonl")
        with sampling_bar(steps + cascade.num_steps(number, config, first)) as report:
            figures, captions, made = evaluate_alignment(
                cascade, dataset, attributes, load_probe(), number, config, report
            )
    else:
        captions = captions_of(dataset, number)
        with sampling_bar(steps) as report:
            made = cascade.sample_stages(captions.lines, config, report=report)
        frames = made[cascade.stages[-1].name]
        own = nearest_clips(frames, captions.frames) == torch.arange(number)
        figures = {"samples": float(number), "nearest_is_own_clip": own.float().mean().item()}
    out = folder_of(cfg)
    for stage in cascade.stages:
        for i, clip in enumerate(made[stage.name].numpy()):
            encode_mp4(out / "clips" / stage.name / f"{i:04d}.mp4", clip, stage.fps)
    texts = [" ".join(lines) for lines in captions.lines]
    save_sheet(out / "sheet.png", list(made[cascade.stages[-1].name][:32].numpy()), texts[:32])
    write_json(out / "captions.json", texts)
    judged = figures | provenance() | {"mixed_precision": cfg.mixed_precision}
    write_json(out / "report.json", judged)
    print(json.dumps(judged, indent=1), f"\nin {out}")


def bits(cfg: DictConfig, plan: EvaluateConfig) -> None:
    """Bits per dimension by the U-Net `cfg.unet`: <out>/nll_<unet>.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = load_conditions(
        cfg.run_dir, store_of(cfg), cfg.seed, CaptionPolicy(drop=False), True, plan.split
    )
    path = Path(cfg.run_dir) / cfg.unet / "model.safetensors"
    unet, diffusion, loaded = load_unet(path, cfg.unet)
    if unet.config.low_copies:
        raise SystemExit(f"evaluate.metric=nll: {path} is given a smaller clip; take unet=base")
    if loaded.meta.get("clip_hash") != conditions.clip_hash:
        raise SystemExit(
            f"{path} was trained with another video CLIP than {cfg.run_dir}/clip holds"
        )
    dataset = conditions.val_set
    number = min(plan.clips, len(dataset))
    with tqdm(total=number, unit="clip", desc="bits") as bar:
        figures = evaluate_bits(
            unet.to(device),
            diffusion,
            TextEncoder(conditions.clip),
            dataset,
            number,
            plan.draws,
            cfg.sample.seed,
            cfg.sample.batch_size,
            bar.update,
        )
    judged = figures | {"split": plan.split, "steps": diffusion.variance_steps} | provenance()
    write_json(folder_of(cfg) / f"nll_{cfg.unet}.json", judged)
    print(json.dumps(judged, indent=1), f"\nin {folder_of(cfg)}")


def folder_of(cfg: DictConfig) -> Path:
    """Where figures and samples go."""
    return Path(cfg.out or Path(cfg.run_dir) / "evaluation")


if __name__ == "__main__":
    main()
