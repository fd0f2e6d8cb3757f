"""Text to video: text tower -> prior -> base U-Net -> super-resolution, with one run's checkpoints.

B clips, F frames, H W, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle2_video.data.media.tensors import has_view, to_float, to_uint8
from dalle2_video.data.sources.captions import pack_lines, text_to_lines, to_line
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.model_file import (
    CheckpointError,
    file_hash,
)
from dalle2_video.models.prior import Prior
from dalle2_video.models.unet3d import Condition, Unet3D
from dalle2_video.models.video_clip import TextEncoding, VideoCLIP
from dalle2_video.pipeline.loading import load_clip, load_prior, load_unet
from dalle2_video.pipeline.sampling import SampleConfig, sample_clips, sample_embeddings

Report = Callable[[str], None]  # the name of the U-Net that has made a step


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
        names = [stage.name for stage in self.stages]
        stages = self.stages[: names.index(last) + 1] if last else self.stages
        if not texts:  # more processes than texts
            return {stage.name: torch.empty(0, dtype=torch.uint8) for stage in stages}
        judge, many = self._judge(config, last)
        numbers = range(len(texts)) if numbers is None else numbers
        sample_ids = torch.tensor([many * number + j for number in numbers for j in range(many)])
        condition = self._condition([t for t in texts for _ in range(many)], sample_ids, config)
        made: dict[str, Tensor] = {}
        low: Tensor | None = None
        for stage in stages:
            low = self._stage(stage, condition, sample_ids, low, config, report)
            made[stage.name] = low
            if stage.name == judge:
                kept = self.nearest(low, condition.text_embedding, many)
                condition, sample_ids, low = condition.rows(kept), sample_ids[kept], low[kept]
                made = {name: clips[kept] for name, clips in made.items()}
        return made

    def _condition(
        self, texts: Sequence[str | Sequence[str]], sample_ids: Tensor, config: SampleConfig
    ) -> Condition:
        """What the texts and the prior's embeddings say, on the CPU."""
        size = config.batch_size
        with placed(self.clip, self.device):  # in float32, as in training
            encoded = [self._encode(texts[i : i + size]) for i in range(0, len(texts), size)]
        parts = []
        with placed(self.prior, self.device):
            for text, keys in zip(encoded, sample_ids.split(size), strict=True):
                with self._autocast():
                    embedding = sample_embeddings(
                        self.prior, self.prior.whiten, self.prior_diffusion, text, keys, config
                    )
                part = Condition.of(embedding, text.states, text.place, text.embedding)
                parts.append(part.to("cpu"))
        return reduce(Condition.cat, parts)

    def _stage(
        self,
        stage: CascadeStage,
        condition: Condition,
        sample_ids: Tensor,
        low: Tensor | None,
        config: SampleConfig,
        report: Report | None,
    ) -> Tensor:
        """The clips of one U-Net: uint8 (B, F, H, W, 3) on the CPU; low: the one's before it."""
        model = stage.unet.config
        how, clips = config.of(stage.name, model), []
        with placed(stage.unet, self.device):
            for rows in torch.arange(len(sample_ids)).split(how.batch_size):
                with self._autocast():
                    video = sample_clips(
                        stage.unet,
                        model,
                        stage.diffusion,
                        condition.rows(rows).to(self.device),
                        sample_ids[rows],
                        how,
                        config.seed,
                        None if low is None else to_float(low[rows].to(self.device)),
                        None if report is None else lambda: report(stage.name),
                        "sample" if low is None else f"sample/{stage.name}",
                    )
                clips.append(to_uint8(video).cpu())
        return torch.cat(clips)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def judge(self) -> str:
        """The first U-Net whose clips the CLIP can see; ValueError where there is none."""
        video, frames = self.clip.config.video, 0
        for stage in self.stages:
            model = stage.unet.config
            frames = frames * model.times[0] if frames else model.num_frames
            if has_view(frames, model.image_size, video.num_frames, video.image_size):
                return stage.name
        raise ValueError(
            f"candidates: the video CLIP sees {video.num_frames} frames of {video.image_size} px, "
            "which no clip of the cascade can show it"
        )

    def _judge(self, config: SampleConfig, last: str | None) -> tuple[str | None, int]:
        """Behind which U-Net one of how many candidates is chosen; without that U-Net, of one."""
        if config.candidates == 1:
            return None, 1
        names, judge = [stage.name for stage in self.stages], self.judge
        reached = last is None or names.index(judge) <= names.index(last)
        return (judge, config.candidates) if reached else (None, 1)

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
        steps, (judge, many) = 0, self._judge(config, last)
        for stage in self.stages:
            how = config.of(stage.name, stage.unet.config)
            steps += -(-texts * many // how.batch_size) * how.steps
            if stage.name == judge:
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
        if made.image_size != takes.low_size or not math.isclose(before.fps, low_fps):
            raise CheckpointError(
                f"cascade: {after.name!r} was trained on clips of {takes.low_size} px at "
                f"{low_fps:g} frames per second, but {before.name!r} makes {made.image_size} px at "
                f"{before.fps:g}"
            )
