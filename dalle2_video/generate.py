"""Text to video: text tower -> prior -> base U-Net -> super-resolution, with one run's checkpoints.

B clips, F frames, H W, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle2_video.checkpoint import (
    CheckpointError,
    LoadedModel,
    file_hash,
    load_model,
    load_weights,
)
from dalle2_video.data.captions import pack_lines, text_to_lines, to_line
from dalle2_video.data.video import has_view, to_float, to_uint8
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.models.prior import Prior, PriorConfig
from dalle2_video.models.unet3d import Condition, Unet3D, UnetConfig
from dalle2_video.models.video_clip import TextEncoding, VideoCLIP, VideoCLIPConfig
from dalle2_video.sampling import SampleConfig, sample_clips, sample_embeddings

Report = Callable[[str], None]  # the name of the U-Net that has made a step


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


@dataclass(frozen=True)
class CascadeStage:
    """One U-Net of a cascade; fps: of the clips that it makes."""

    name: str
    unet: Unet3D
    diffusion: DiffusionConfig
    fps: float


@contextmanager
def sampling_bar(steps: int, disable: bool = False) -> Iterator[Report]:
    """A progress bar that names the U-Net at work; yields what `sample` reports to."""
    with tqdm(total=steps, unit="step", disable=disable) as bar:

        def report(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield report


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on the device inside, and on the CPU again behind it."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


class Cascade:
    """The networks of one run, checked to belong together, ready to sample.

    They stay on the CPU; each is on the device while it is at work, one after the other.
    """

    def __init__(
        self,
        clip: VideoCLIP,
        prior: tuple[Prior, DiffusionConfig],
        stages: Sequence[CascadeStage],
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
    ) -> None:
        check_chain(stages)
        self.device = torch.device(device)
        self.clip, (self.prior, self.prior_diffusion) = clip, prior
        self.stages = list(stages)
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
        order: Sequence[str] = ("base",),
    ) -> Cascade:
        """The EMA weights of runs/<name>/{clip,prior,...}/model.safetensors; order: the U-Nets.

        Raises CheckpointError where a file is missing or damaged, where a stage was trained on
        another CLIP than the one in the run, or where a U-Net does not take what the one before it
        makes.
        """
        run_dir = Path(run_dir)
        clip_path = run_dir / "clip" / "model.safetensors"
        clip, _ = load_clip(clip_path)
        prior, prior_diffusion, prior_file = load_prior(run_dir / "prior" / "model.safetensors")
        files, stages = [prior_file], []
        for name in order:
            unet, diffusion, file = load_unet(run_dir / name / "model.safetensors", name)
            stages.append(CascadeStage(name, unet, diffusion, file.config["fps"]))
            files.append(file)
        clip_hash = file_hash(clip_path)
        for file in files:
            if file.meta.get("clip_hash") != clip_hash:
                raise CheckpointError(
                    f"{file.path}: trained on the CLIP {file.meta.get('clip_hash')}, but "
                    f"{clip_path} is {clip_hash}; train this stage again"
                )
        return cls(clip, (prior, prior_diffusion), stages, device, precision)

    @property
    def fps(self) -> float:
        """Frames per second of the clips that `sample` returns."""
        return self.stages[-1].fps

    @torch.no_grad()
    def encode(self, texts: Sequence[str | Sequence[str]]) -> TextEncoding:
        """Texts, each one string (taken apart at sentences) or a list of lines, as tensors on the
        device. CaptionError where one is empty.
        """
        with placed(self.clip, self.device):
            return self._encode(texts)

    def _encode(self, texts: Sequence[str | Sequence[str]]) -> TextEncoding:
        sets = [[to_line(line) for line in text_to_lines(text)] for text in texts]
        packed = pack_lines(sets)
        return self.clip.encode_text(
            packed.tokens.to(self.device), packed.line_index.to(self.device)
        )

    def sample(
        self,
        texts: Sequence[str | Sequence[str]],
        config: SampleConfig,
        first: int = 0,
        report: Report | None = None,
    ) -> Tensor:
        """One clip per text from the whole cascade: uint8 RGB (B, F, H, W, 3) on the CPU.

        Clip i is keyed by (config.seed, first + i), see `sample_stages`.
        """
        numbers = range(first, first + len(texts))
        return self.sample_stages(texts, config, numbers, report)[self.stages[-1].name]

    @torch.no_grad()
    def sample_stages(
        self,
        texts: Sequence[str | Sequence[str]],
        config: SampleConfig,
        numbers: Sequence[int] | None = None,
        report: Report | None = None,
        last: str | None = None,
    ) -> dict[str, Tensor]:
        """One clip per text from every U-Net, by its name: uint8 RGB (B, F, H, W, 3) on the CPU.

        The clip of text i is keyed by (config.seed, numbers[i]), by default i. Of several
        candidates the first U-Net whose clips the CLIP can see makes them all, and the nearest to
        the text goes on. last: the U-Net to stop behind. report is called after each step of a
        batch, `num_steps` times in all. ValueError where there are candidates and the CLIP can see
        none of the clips.
        """
        numbers, many = range(len(texts)) if numbers is None else numbers, config.candidates
        if not texts:  # more processes than texts
            return {stage.name: torch.empty(0, dtype=torch.uint8) for stage in self.stages}
        judge = self.judge if many > 1 else None
        texts = [text for text in texts for _ in range(many)]
        counters = torch.tensor([many * number + j for number in numbers for j in range(many)])
        size = config.batch_size
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        with placed(self.clip, self.device):
            encoded = [self._encode(part) for part in parts]  # in float32, as in training
        conditions = []
        with placed(self.prior, self.device):
            for text, keys in zip(encoded, counters.split(size), strict=True):
                with self._autocast():
                    embedding = sample_embeddings(
                        self.prior, self.prior.whiten, self.prior_diffusion, text, keys, config
                    )
                condition = Condition.of(embedding, text.states, text.place, text.embedding)
                conditions.append(condition.to("cpu"))
        made: dict[str, Tensor] = {}
        low: Tensor | None = None
        for stage in self.stages:
            clips = []
            lows = [None] * len(conditions) if low is None else low.split(size)
            with placed(stage.unet, self.device):
                for condition, keys, small in zip(
                    conditions, counters.split(size), lows, strict=True
                ):
                    clips.append(self._stage(stage, condition, keys, small, config, report))
            low = torch.cat(clips)
            if judge is stage:
                text = torch.cat([condition.text_embedding for condition in conditions])
                kept = self.nearest(low, text, many)
                low, counters = low[kept], counters[kept]
                whole = reduce(Condition.cat, conditions)
                conditions = [whole.rows(rows) for rows in kept.split(size)]
                made = {name: clips[kept] for name, clips in made.items()}
            made[stage.name] = low
            if stage.name == last:
                break
        return made

    def _stage(
        self,
        stage: CascadeStage,
        condition: Condition,
        counters: Tensor,
        low: Tensor | None,
        config: SampleConfig,
        report: Report | None,
    ) -> Tensor:
        """One batch of one U-Net: uint8 (B, F, H, W, 3) on the CPU from the smaller clips, too."""
        with self._autocast():
            video = sample_clips(
                stage.unet,
                stage.unet.config,
                stage.diffusion,
                condition.to(self.device),
                counters,
                config.stage(stage.name),
                config.seed,
                None if low is None else to_float(low.to(self.device)),
                None if report is None else lambda: report(stage.name),
                "sample" if low is None else f"sample/{stage.name}",
            )
        return to_uint8(video).cpu()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def judge(self) -> CascadeStage:
        """The first U-Net whose clips the CLIP can see; ValueError where there is none."""
        video = self.clip.config.video
        for stage in self.stages:
            model = stage.unet.config
            if has_view(model.num_frames, model.image_size, video.num_frames, video.image_size):
                return stage
        raise ValueError(
            f"candidates: the video CLIP sees {video.num_frames} frames of {video.image_size} px, "
            "which no clip of the cascade can show it"
        )

    def nearest(self, clips: Tensor, text: Tensor, many: int) -> Tensor:
        """Of each `many` clips, uint8 (B, F, H, W, 3), the index of the one whose embedding is
        nearest to that of its text, (B, D); int64 (B / many,).
        """
        video, scores = self.clip.config.video, []
        with placed(self.clip, self.device):
            for frames, target in zip(clips.split(32), text.split(32), strict=True):
                view = to_float(frames.to(self.device), video.num_frames, video.image_size)
                embedding = self.clip.encode_video(view)
                scores.append((embedding * target.to(self.device)).sum(1).cpu())
        best = torch.cat(scores).unflatten(0, (-1, many)).argmax(1)
        return torch.arange(len(best)) * many + best

    def num_steps(self, texts: int, config: SampleConfig, last: str | None = None) -> int:
        """How often `sample_stages` reports a step."""
        steps, many = 0, config.candidates
        for stage in self.stages:
            steps += -(-texts * many // config.batch_size) * config.stage(stage.name).steps
            if many > 1 and stage is self.judge:
                many = 1
            if stage.name == last:
                break
        return steps


def check_chain(stages: Sequence[CascadeStage]) -> None:
    """CheckpointError where a U-Net does not take what the one before it makes."""
    if not stages:
        raise CheckpointError("a cascade needs a U-Net, such as cascade=[base]")
    first = stages[0]
    if first.unet.config.low_copies:
        raise CheckpointError(
            f"cascade: {first.name!r} makes more of a smaller clip, not of a text"
        )
    for before, after in pairwise(stages):
        made, takes = before.unet.config, after.unet.config
        if not takes.low_copies:
            raise CheckpointError(f"cascade: {after.name!r} makes clips of text, so it comes first")
        low_fps = after.fps / takes.times[0]
        if (made.image_size, before.fps) != (takes.low_size, low_fps):
            raise CheckpointError(
                f"cascade: {after.name!r} was trained on clips of {takes.low_size} px at "
                f"{low_fps:g} frames per second, but {before.name!r} makes {made.image_size} px at "
                f"{before.fps:g}"
            )
