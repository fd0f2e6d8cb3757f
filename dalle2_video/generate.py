"""Text to video: text tower -> prior -> base U-Net, with the checkpoints of one run.

Every number that a clip is made from is keyed by (seed, index of the clip), so a clip does not
depend on the batch that it is sampled in. B clips, F frames, H W, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.checkpoint import (
    CheckpointError,
    LoadedModel,
    file_hash,
    load_model,
    load_weights,
)
from dalle2_video.data.captions import pack_lines, text_to_lines, to_line
from dalle2_video.data.video import to_uint8
from dalle2_video.diffusion.guidance import (
    Denoiser,
    Scale,
    denoiser,
    dynamic_threshold,
    guided,
    interval_scale,
    oscillating_scale,
    static_threshold,
)
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.diffusion.sampling import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.models.prior import Prior, PriorConfig
from dalle2_video.models.unet3d import Condition, Unet3D, UnetConfig
from dalle2_video.models.video_clip import TextEncoding, VideoCLIP, VideoCLIPConfig
from dalle2_video.models.whitening import Whitening

Progress = Callable[[], None]


@dataclass(frozen=True)
class SampleConfig:
    """How to sample.

    eta: of ddim, 0 = deterministic. gamma, corrector: of ancestral. guidance_scale: 1 is the plain
    conditional model. guidance: when it applies: "constant"; "interval", between the log-SNRs
    guidance_interval; or "oscillating", the first guidance_constant share of the steps, then every
    other one. guidance_rescale: see `guided`. prior_draws: embeddings drawn per clip, of which the
    one nearest to the text is kept (DALL-E 2 draws two).
    """

    sampler: Literal["ddim", "ancestral", "dpm_solver"] = "ddim"
    steps: int = 25
    eta: float = 0.0
    gamma: float = 0.1
    corrector: float = 0.0
    guidance_scale: float = 3.0
    guidance: Literal["constant", "interval", "oscillating"] = "constant"
    guidance_interval: tuple[float, float] = (-8.0, 4.0)
    guidance_constant: float = 0.5
    guidance_rescale: float = 0.0
    threshold: Literal["none", "static", "dynamic"] = "static"
    prior_steps: int = 25
    prior_guidance_scale: float = 1.5
    prior_draws: int = 2
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "prior_steps", "prior_draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eta", "gamma", "guidance_constant", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.corrector < 0:
            raise ValueError(f"corrector must be at least 0, not {self.corrector}")
        low, high = self.guidance_interval
        if not low < high:
            raise ValueError(f"guidance_interval must rise, not {low}, {high}")

    def scale(self, steps: Tensor) -> float | Scale:
        """The scale of guidance for a sampler that goes through these log-SNRs."""
        match self.guidance:
            case "interval":
                return interval_scale(self.guidance_scale, *self.guidance_interval)
            case "oscillating":
                return oscillating_scale(self.guidance_scale, steps, self.guidance_constant)
        return self.guidance_scale


def sample_embeddings(
    prior: Callable[..., Tensor],
    whiten: Whitening,
    diffusion: DiffusionConfig,
    text: TextEncoding,
    counters: Tensor,
    config: SampleConfig,
) -> Tensor:
    """Video embeddings (B, D), l2-normalised as in the cache; counters (B,) key the noise.

    whiten: the space that the prior works in. Draws `prior_draws` per text with DDIM and keeps the
    one with the largest dot product with the text embedding (Ramesh et al. 2022, section 2.2).
    """
    batch, dim = text.embedding.shape
    device = text.embedding.device
    draws = config.prior_draws

    def both(z: Tensor, log_snr: Tensor) -> Tensor:
        halves = len(z) // batch
        keep = torch.arange(len(z), device=device) < batch
        return prior(
            z,
            log_snr[:, None].expand(-1, draws),
            text.states.repeat(halves, 1, 1),
            text.mask.repeat(halves, 1),
            text.embedding.repeat(halves, 1),
            keep,
        )

    z = keyed.randn((draws, dim), config.seed, counters, "prior", device)
    denoise = denoiser(both, diffusion.prediction)
    if config.prior_guidance_scale != 1:
        denoise = guided(denoise, config.prior_guidance_scale)
    x0 = ddim(denoise, z, sampler_steps(diffusion.schedule, config.prior_steps, device))
    embeddings = torch.nn.functional.normalize(whiten.inverse(x0), dim=-1)
    nearest = torch.einsum("bkd,bd->bk", embeddings, text.embedding).argmax(1)
    return embeddings[torch.arange(batch, device=device), nearest]


def sample_clips(
    unet: Callable[..., Tensor],
    shape: tuple[int, ...],
    diffusion: DiffusionConfig,
    condition: Condition,
    counters: Tensor,
    config: SampleConfig,
    progress: Progress | None = None,
    self_condition: bool = False,
) -> Tensor:
    """Clips (B, *shape) float32 about [-1, 1] from conditions, shape (C, F, H, W).

    unet: a Unet3D or what wraps it; self_condition: whether it wants its last estimate. counters
    (B,) key the noise.
    """
    device = condition.embedding.device
    two = Condition.cat(condition, condition.dropped())

    estimate: Tensor | None = None

    def network(z: Tensor, log_snr: Tensor) -> Tensor:
        doubled = len(z) > len(counters)
        known = two if doubled else condition
        if not self_condition or estimate is None:
            return unet(z, log_snr, known)
        return unet(z, log_snr, known, 0, estimate.repeat(1 + doubled, 1, 1, 1, 1))

    steps = sampler_steps(diffusion.schedule, config.steps, device)
    denoise: Denoiser = denoiser(network, diffusion.prediction)
    if config.guidance_scale != 1:
        denoise = guided(denoise, config.scale(steps), config.guidance_rescale)
    if config.threshold == "static":
        denoise = static_threshold(denoise)
    elif config.threshold == "dynamic":
        denoise = dynamic_threshold(denoise)

    thresholded = denoise

    def remember(z: Tensor, log_snr: Tensor) -> Tensor:
        nonlocal estimate
        x0 = thresholded(z, log_snr)
        estimate = x0.clamp(-1, 1)  # as in training
        return x0

    denoise = remember

    def noise(i: int) -> Tensor:
        return keyed.randn(shape, config.seed, counters, f"sample/{i}", device)

    z = keyed.randn(shape, config.seed, counters, "sample", device)
    report = None if progress is None else lambda _: progress()
    match config.sampler:
        case "dpm_solver":
            return dpm_solver(denoise, z, steps, report)
        case "ancestral":
            return ancestral(denoise, z, steps, noise, config.gamma, config.corrector, report)
    return ddim(denoise, z, steps, noise, config.eta, report)


def load_clip(path: Path) -> tuple[VideoCLIP, LoadedModel]:
    """The video CLIP of a run, on the CPU, in eval mode; CheckpointError names file and cause."""
    loaded = load_model(path, "clip")
    clip = VideoCLIP(VideoCLIPConfig.from_dict(loaded.config), load_pretrained=False)
    load_weights(clip, loaded, optional=lambda name: not clip.keeps(name))
    return clip.eval().requires_grad_(False), loaded


def load_prior(path: Path) -> tuple[Prior, DiffusionConfig, LoadedModel]:
    """The prior of a run with its diffusion settings, on the CPU, in eval mode."""
    loaded = load_model(path, "prior")
    config = loaded.config
    prior = Prior(PriorConfig(**config["model"]), config["embedding_dim"], config["text_dim"])
    load_weights(prior, loaded)
    return prior.eval().requires_grad_(False), DiffusionConfig(**config["diffusion"]), loaded


def load_unet(path: Path, name: str) -> tuple[Unet3D, DiffusionConfig, LoadedModel]:
    """A U-Net of a run with its diffusion settings, on the CPU, in eval mode."""
    loaded = load_model(path, name)
    config = loaded.config
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config["model"].items()
    }
    unet = Unet3D(UnetConfig(**sizes), config["embedding_dim"], config["text_dim"])
    load_weights(unet, loaded)
    return unet.eval().requires_grad_(False), DiffusionConfig(**config["diffusion"]), loaded


def read_texts(text: str | Sequence[str] | None, file: str | None, number: int) -> list[str]:
    """The texts to sample, each `number` times. ValueError where there is none, or both."""
    if (text is None) == (file is None):
        raise ValueError('give either text="..." or file=<a text file, one text per line>')
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if file is None:
        texts = [text if isinstance(text, str) else "\n".join(text or [])]
    else:
        texts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        texts = [line for line in texts if line]
    if not any(one.strip() for one in texts):
        raise ValueError(f"{file or 'text'}: empty, there is nothing to sample")
    return [one for one in texts for _ in range(number)]


class Cascade:
    """The networks of one run, checked to belong together, ready to sample."""

    def __init__(
        self,
        clip: VideoCLIP,
        prior: tuple[Prior, DiffusionConfig],
        base: tuple[Unet3D, DiffusionConfig],
        fps: float,
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
    ) -> None:
        self.device = torch.device(device)
        self.clip = clip.to(self.device)
        self.prior, self.prior_diffusion = prior[0].to(self.device), prior[1]
        self.base, self.base_diffusion = base[0].to(self.device), base[1]
        self.fps = fps
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
    ) -> Cascade:
        """The EMA weights of runs/<name>/{clip,prior,base}/model.safetensors.

        Raises CheckpointError where a file is missing or damaged, or a stage was trained on another
        CLIP than the one in the run.
        """
        run_dir = Path(run_dir)
        clip_path = run_dir / "clip" / "model.safetensors"
        clip, _ = load_clip(clip_path)
        prior, prior_diffusion, prior_file = load_prior(run_dir / "prior" / "model.safetensors")
        base, base_diffusion, base_file = load_unet(run_dir / "base" / "model.safetensors", "base")
        clip_hash = file_hash(clip_path)
        for file in (prior_file, base_file):
            if file.meta.get("clip_hash") != clip_hash:
                raise CheckpointError(
                    f"{file.path}: trained on the CLIP {file.meta.get('clip_hash')}, but "
                    f"{clip_path} is {clip_hash}; train this stage again"
                )
        fps = base_file.config["fps"]
        return cls(clip, (prior, prior_diffusion), (base, base_diffusion), fps, device, precision)

    def encode(self, texts: Sequence[str | Sequence[str]]) -> TextEncoding:
        """Texts, each one string (taken apart at sentences) or a list of lines, as tensors."""
        sets = [[to_line(line) for line in text_to_lines(text)] for text in texts]
        packed = pack_lines(sets)
        return self.clip.encode_text(
            packed.tokens.to(self.device), packed.line_index.to(self.device)
        )

    @torch.no_grad()
    def sample(
        self,
        texts: Sequence[str | Sequence[str]],
        config: SampleConfig,
        first: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """One clip per text: uint8 RGB (B, F, H, W, 3) on the CPU.

        Clip i is keyed by (config.seed, first + i). progress is called once per step of a batch;
        there are `num_steps(len(texts), config)` of them.
        """
        clips = []
        for start in range(0, len(texts), config.batch_size):
            part = texts[start : start + config.batch_size]
            counters = torch.arange(first + start, first + start + len(part))
            text = self.encode(part)  # in float32, as in training
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                embedding = sample_embeddings(
                    self.prior, self.prior.whiten, self.prior_diffusion, text, counters, config
                )
                condition = Condition.of(embedding, text.states, text.place, text.embedding)
                video = sample_clips(
                    self.base,
                    self.base.config.clip_shape,
                    self.base_diffusion,
                    condition,
                    counters,
                    config,
                    progress,
                    self.base.config.self_condition,
                )
            clips.append(to_uint8(video).cpu())
        return torch.cat(clips)

    @staticmethod
    def num_steps(texts: int, config: SampleConfig) -> int:
        """How often `sample` calls its progress."""
        return -(-texts // config.batch_size) * config.steps
