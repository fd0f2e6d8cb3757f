"""What breaks when a video network learns its variance, what fixes it, and what it is worth.

    python -m benchmarks.learned_variance run            # the grid; again goes on where it was
    python -m benchmarks.learned_variance run --cells search --part 1/2   # one of two processes
    python -m benchmarks.learned_variance sample --device cuda   # of worth_, fresh_, long_
    python -m benchmarks.learned_variance anatomy        # the term's gradient, by step
    python -m benchmarks.learned_variance_figures        # figures and pictures of what has been run

Clips of the embedded data set, 8 frames of 32 px, without conditions. Every (cell, seed) is a file
in runs/learned_variance. A run diverges when its loss is not finite, or above ten times its running
median (of the 200 steps before) for 50 steps in a row.

Recipes: `fixed` learns no variance. `naive` is Nichol & Dhariwal's: the fraction is (raw + 1) / 2,
without bounds, its output shares the network with the prediction, its term is added as it is. Each
remedy changes one thing of it: `sigmoid` bounds the fraction; `detached`, the term's gradient ends
at the output layer; `apart`, that layer's gradient is clipped on its own; `clipped`, the guess of
the clip in the term is clipped to [-1, 1], as in sampling; `weight`, a tenth of the term; `warmup`,
the term rises over the first half; `importance`, half of the times drawn by the root of the term's
mean square. Two are mistakes: `weak`, the paper's 0.001 on a single term, though it is of the sum
of all; `attached`, the term's gradient reaches the prediction. Together: `bounded` is sigmoid and
clipped. `ours`, that of `learned_variance=true`, learns the fraction of each frequency from the
noise level alone, by a gradient of the same size at every step and octave, and is clipped on its
own.
Times are those of T = 1000 steps, in x4000 of 4000. Unlike the training loop, which skips it, a
step with a gradient that is not finite is made, so that what breaks is seen; the first is noted.
In the cells of worth_, fresh_ and long_, which are sampled as well, the learning rate falls to
zero. Those of fresh_ are worth_ with seeds that no choice of the recipe has seen.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, eval_loader
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.objective import Noised, add_noise, per_sample_loss, variance_loss
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.samplers import ancestral
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.diffusion.variance import (
    ReverseStep,
    bound_term,
    fraction_of,
    learned_term,
    on_grid,
    reverse_step,
    split_output,
)
from dalle2_video.evaluation.frechet import frechet_distance
from dalle2_video.evaluation.likelihood import bits_of, to_values
from dalle2_video.faces.probe import load_probe
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.wiring import store_of
from dalle2_video.training.muon import Muon
from dalle2_video.training.optimizer import param_groups

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "learned_variance"
RESULTS = ROOT / "benchmarks" / "results"
NETWORK = ".safetensors"
FRAMES, SIDE, BINS, STEPS = 8, 32, 20, (10, 25, 50, 250)
MODEL = UnetConfig(
    image_size=SIDE, num_frames=FRAMES, patch=4, dim=32, mults=(1, 2), blocks=1, head_dim=32,
    attention=(True, True), cross_attention=(False, False), cond_dim=64, embedding_tokens=0,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How the variance is learned; as it stands, naively."""

    learned: bool = True
    attached: bool = False
    sigmoid: bool = False
    detached: bool = False
    apart: bool = False
    clipped: bool = False
    spectrum: bool = False
    weight: float = 1.0
    warmup: bool = False
    importance: bool = False

    def bits(
        self, step: ReverseStep, estimate: torch.Tensor, raw: torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        """Of one step (B,), with what it makes of a network's output."""
        term = learned_term if self.spectrum else bound_term
        return term(step, estimate, self.fraction(raw), x0)

    def fraction(self, raw: torch.Tensor) -> torch.Tensor:
        """What it makes of a network's output."""
        if self.spectrum:
            return fraction_of(raw)
        return torch.sigmoid(2 * raw) if self.sigmoid else (raw + 1) / 2


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone."""

    recipe: Recipe
    lr: float
    clip: float | None
    precision: str  # fp32 | bf16
    diffusion: str
    steps: int
    seeds: int
    batch: int = 4
    quality: bool = False
    optimizer: str = "adamw"  # adamw | muon
    first: int = 0  # seed

    @property
    def all_seeds(self) -> range:
        """One for each run."""
        return range(self.first, self.first + self.seeds)


NAIVE = Recipe()
RECIPES = {
    "fixed": Recipe(learned=False),
    "naive": NAIVE,
    "sigmoid": replace(NAIVE, sigmoid=True),
    "detached": replace(NAIVE, detached=True),
    "apart": replace(NAIVE, apart=True),
    "clipped": replace(NAIVE, clipped=True),
    "bounded": replace(NAIVE, sigmoid=True, clipped=True),
    "weight": replace(NAIVE, weight=0.1),
    "weak": replace(NAIVE, weight=0.001),
    "attached": replace(NAIVE, attached=True),
    "warmup": replace(NAIVE, warmup=True),
    "importance": replace(NAIVE, importance=True),
    "ours": replace(NAIVE, clipped=True, detached=True, spectrum=True, apart=True),
}
DIFFUSIONS = {
    "x0": DiffusionConfig(prediction="x0", max_weight=5.0, shift=-2.0),  # the demo's
    "x4000": DiffusionConfig(prediction="x0", max_weight=5.0, shift=-2.0, variance_steps=4000),
    "v": DiffusionConfig(),
    "v20": DiffusionConfig(log_snr_min=-20, log_snr_max=20),
    "eps": DiffusionConfig(prediction="eps", loss="eps"),
}
GAMMAS = {"lower": 0.0, "upper": 1.0}
NUMBERS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 999)
RATES = (3e-3, 1e-2, 3e-2)

SEARCH: dict[str, dict] = {
    "x0": {"diffusion": "x0", "steps": 300, "seeds": 2},
    **{
        name: {"diffusion": name, "steps": 300, "seeds": 1} for name in ("x4000", "v", "v20", "eps")
    },
    "x0-muon": {"diffusion": "x0", "steps": 300, "seeds": 1, "optimizer": "muon"},
    "x0-one": {"diffusion": "x0", "steps": 600, "seeds": 1, "batch": 1},
}


def cells() -> dict[str, Cell]:
    """The grid."""
    grid: dict[str, Cell] = {}
    for (where, kind), lr, clip in itertools.product(SEARCH.items(), RATES, (1.0, None)):
        for name in ("fixed", "naive"):
            key = f"search_{where}_{lr:g}_{'clip' if clip else 'free'}_{name}"
            grid[key] = Cell(RECIPES[name], lr, clip, "fp32", **kind)
    for precision, name in itertools.product(("fp32", "bf16"), ("fixed", "naive", "ours")):
        seeds = 20 if name == "ours" else 5
        key = f"stress_hard_{precision}_{name}"
        grid[key] = Cell(RECIPES[name], 1e-2, None, precision, "x0", 300, seeds)
    for name in RECIPES:
        if name in ("fixed", "naive", "apart", "ours"):  # apart is of clipping
            key = f"stress_usual_fp32_{name}"
            grid[key] = Cell(RECIPES[name], 3e-3, 1.0, "fp32", "x0", 300, 5)
        else:
            key = f"stress_hard_fp32_{name}"
            grid[key] = Cell(RECIPES[name], 1e-2, None, "fp32", "x0", 300, 5)
    judged = Cell(RECIPES["ours"], 3e-3, 1.0, "fp32", "x0", 600, 5, batch=8, quality=True)
    for where in ("x0", "v"):
        grid[f"worth_{where}"] = replace(judged, diffusion=where)
        grid[f"fresh_{where}"] = replace(judged, diffusion=where, first=5)
    grid["long_x0"] = replace(judged, steps=2000)
    return grid


class Divergence:
    """Watches the losses of a run: see the top of this file."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.above = self.steps = 0
        self.at: int | None = None

    def add(self, loss: float) -> bool:
        """Whether the run has diverged."""
        recent = self.losses[-200:]
        high = bool(recent) and loss > 10 * statistics.median(recent)
        self.above = self.above + 1 if high else 0
        self.steps += 1
        if not high:  # or a jump would soon be its own median
            self.losses.append(loss)
        if self.at is None and (not math.isfinite(loss) or self.above >= 50):
            self.at = self.steps
        return self.at is not None


class Times:
    """Draws times evenly, or half of them by the root of the mean square that the term had in their
    bin (Nichol & Dhariwal 2021, section 3.3; half, since L_simple is of the same times), with the
    weight that makes up for it.
    """

    def __init__(self, importance: bool, seed: int) -> None:
        self.importance = importance
        self.generator = torch.Generator().manual_seed(10_000 + seed)
        self.history: list[list[float]] = [[] for _ in range(BINS)]

    def draw(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and weights (B,)."""
        even = torch.rand(number, generator=self.generator)
        if not self.importance or any(len(h) < 10 for h in self.history):
            return even, torch.ones(number)
        root = torch.tensor([np.sqrt(np.mean(np.square(h[-10:]))) for h in self.history])
        share = 0.5 * root / root.sum() + 0.5 / BINS
        chosen = torch.multinomial(share.float(), number, True, generator=self.generator)
        return (chosen + even) / BINS, 1 / (BINS * share[chosen]).float()

    def note(self, t: torch.Tensor, terms: torch.Tensor) -> None:
        """What the terms (B,) were at t (B,)."""
        for place, term in zip((t * BINS).long().tolist(), terms.tolist(), strict=True):
            self.history[min(place, BINS - 1)].append(term)


def unconditional(number: int) -> Condition:
    """Takes the progress and shows nothing."""
    none = torch.zeros(number, 8)
    place = torch.zeros(number, 1, dtype=torch.int64)
    return Condition.of(none, torch.zeros(number, 1, 8), place, none).dropped()


def norm_of(tensors: Iterable[torch.Tensor | None]) -> float:
    """Of all of them together."""
    return float(torch.nn.utils.get_total_norm(x for x in tensors if x is not None))


@dataclass
class Trained:
    """A network with its average, and what the run has shown."""

    net: Unet3D
    average: dict[str, torch.Tensor]
    facts: dict


def train(cell: Cell, seed: int, clips: torch.Tensor, device: str = "cpu") -> Trained:
    """One run on uint8 clips (N, F, H, W, 3); it ends where it diverges."""
    recipe = cell.recipe
    diffusion = DIFFUSIONS[cell.diffusion]
    torch.manual_seed(seed)
    net = network(recipe).to(device)
    head = [p for name, p in net.named_parameters() if name.startswith(("variance", "out.raw"))]
    trunk = [p for p in net.parameters() if not any(p is one for one in head)]
    kind = Muon if cell.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(param_groups(net, 0.0), lr=cell.lr, betas=(0.9, 0.99))
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    times, watch = Times(recipe.importance, seed), Divergence()
    data = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {
        name: []
        for name in (
            "loss",
            "simple",
            "term",
            "outside",
            "trunk_norm",
            "head_norm",
            "share_of_term",
        )
    }
    not_finite: int | None = None
    for i in range(cell.steps):
        rate = cell.lr * min(1.0, (i + 1) / 30)
        if cell.quality:  # what is judged in full falls to zero, as in the training loop
            rate *= 0.5 * (1 + math.cos(math.pi * i / cell.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(clips), (cell.batch,), generator=data)
        x0, (t, weight) = to_float(clips[rows], FRAMES, SIDE), times.draw(cell.batch)
        t = on_grid(t, diffusion.variance_steps)
        noise = torch.randn(x0.shape, generator=data)
        x0, t, weight, noise = (one.to(device) for one in (x0, t, weight, noise))
        noised = add_noise(diffusion, x0, t, noise)
        with torch.autocast(device, torch.bfloat16, enabled=cell.precision == "bf16"):
            out = net(noised.z, noised.log_snr, unconditional(cell.batch).to(device))
        prediction, raw = split_output(out.float(), 3)
        simple = per_sample_loss(diffusion, prediction, noised)
        loss = (weight * simple).mean()
        if raw is not None:
            bits = term_of(recipe, diffusion, prediction, raw, noised, t, x0)
            factor = recipe.weight * (min(1.0, 2 * i / cell.steps) if recipe.warmup else 1.0)
            term = factor * (weight * bits).mean()
            times.note(t, bits.detach())
            fraction = recipe.fraction(raw.detach())
            curves["term"].append(float(bits.detach().mean()))
            curves["outside"].append(float(((fraction < 0) | (fraction > 1)).float().mean()))
            if i % 10 == 0 and not recipe.detached:
                of_term = torch.autograd.grad(term, trunk, retain_graph=True, allow_unused=True)
                of_loss = torch.autograd.grad(loss, trunk, retain_graph=True, allow_unused=True)
                ratio = norm_of(list(of_term)) / max(norm_of(list(of_loss)), 1e-12)
                curves["share_of_term"].append(ratio)
            loss = loss + term
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        curves["loss"].append(float(loss.detach()))
        curves["simple"].append(float(simple.detach().mean()))
        curves["trunk_norm"].append(norm_of([p.grad for p in trunk]))
        curves["head_norm"].append(norm_of([p.grad for p in head]))
        norm = curves["trunk_norm"][-1] + curves["head_norm"][-1]
        if not_finite is None and not math.isfinite(norm):
            not_finite = i + 1
        if watch.add(curves["loss"][-1]):
            break
        if cell.clip is not None:
            parts = [trunk, head] if recipe.apart else [[*trunk, *head]]
            for part in parts:
                torch.nn.utils.clip_grad_norm_(part, cell.clip)
        optimizer.step()
        decay = min(0.995, (i + 1) / (i + 10))
        with torch.no_grad():
            for name, p in net.named_parameters():
                average[name].lerp_(p, 1 - decay)
    facts = {"diverged_at": watch.at, "gradient_not_finite_at": not_finite, "curves": curves}
    return Trained(net, average, facts)


class Shared(nn.Module):
    """Nichol & Dhariwal's: an output layer for the prediction that returns the raw fraction too."""

    def __init__(self, out: nn.Module, detached: bool) -> None:
        super().__init__()
        self.out, self.raw, self.detached = out, copy.deepcopy(out), detached  # zero at first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raw = self.raw(x.detach() if self.detached else x)
        both = [part.unflatten(-1, (-1, MODEL.channels)) for part in (self.out(x), raw)]
        return torch.cat(both, dim=-1).flatten(-2)


def network(recipe: Recipe) -> Unet3D:
    """Before training; without conditions."""
    net = Unet3D(replace(MODEL, learned_variance=recipe.spectrum), 8, 8)
    if recipe.learned and not recipe.spectrum:
        net.out = Shared(net.out, recipe.detached)
        net.muon_exclude = (*net.muon_exclude, "out.out", "out.raw")
    return net


def term_of(
    recipe: Recipe,
    diffusion: DiffusionConfig,
    prediction: torch.Tensor,
    raw: torch.Tensor,
    noised: Noised,
    t: torch.Tensor,
    x0: torch.Tensor,
) -> torch.Tensor:
    """The variance's term (B,), as `variance_loss` but for what the recipe leaves out."""
    if recipe.spectrum:
        return variance_loss(diffusion, prediction, raw, noised, t, x0)
    prediction = prediction if recipe.attached else prediction.detach()
    estimate = to_x0(diffusion.prediction, prediction, noised.z, noised.log_snr)
    estimate = estimate.clamp(-1, 1) if recipe.clipped else estimate
    step = reverse_step(diffusion.schedule, t, diffusion.variance_steps)
    return recipe.bits(step, estimate, raw, x0) * (diffusion.variance_steps / 1000)


@torch.no_grad()
def judge(
    trained: Trained,
    cell: Cell,
    held_out: torch.Tensor,
    device: str = "cpu",
) -> dict:
    """L_simple and bits per dimension of the averaged weights on held-out clips."""
    net = trained.net
    net.load_state_dict(net.state_dict() | trained.average)
    diffusion = DIFFUSIONS[cell.diffusion]
    held_out, draws = (held_out[:64], 16) if cell.quality else (held_out[:32], 4)
    x0 = to_values(to_float(held_out.to(device), FRAMES, SIDE))
    simple, bits = [], {}
    for rows in torch.arange(len(x0)).split(32):

        def predict(z: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
            return net(z, log_snr, unconditional(len(z)).to(device))

        clean, generator = x0[rows], torch.Generator().manual_seed(int(rows[0]))
        for t in (torch.arange(8) + 0.5) / 8:
            noise = torch.randn(clean.shape, generator=generator).to(device)
            noised = add_noise(diffusion, clean, t.expand(len(clean)).to(device), noise)
            prediction, _ = split_output(predict(noised.z, noised.log_snr), 3)
            simple.append(per_sample_loss(diffusion, prediction, noised))
        for name, values in bits_of(
            predict, diffusion, clean, rows, 0, draws, cell.recipe.bits
        ).items():
            bits.setdefault(name, []).append(values)
    facts: dict = {"val_simple": float(torch.cat(simple).mean())}
    facts |= {f"bits_{name}": float(torch.cat(parts).mean()) for name, parts in bits.items()}
    return facts


@torch.no_grad()
def sample(
    net: Unet3D, cell: Cell, variance: str, steps: int, seed: int, device: str, number: int = 256
) -> torch.Tensor:
    """So many uint8 clips by ancestral sampling with one of the variances; the same noise for each
    variance.
    """
    fraction, diffusion = torch.zeros(()), DIFFUSIONS[cell.diffusion]
    generator = torch.Generator(device).manual_seed(seed)

    def denoise(z: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        nonlocal fraction
        # 32 clips stay in the caches of a core: 1.1 to 1.3 times as fast as 256
        parts = [(part, log_snr[: len(part)], unconditional(len(part))) for part in z.split(32)]
        out = torch.cat([net(part, level, told.to(device)) for part, level, told in parts])
        prediction, raw = split_output(out, 3)
        if raw is not None:
            fraction = cell.recipe.fraction(raw)
        return to_x0(diffusion.prediction, prediction, z, log_snr).clamp(-1, 1)

    def noise(_: int = 0) -> torch.Tensor:
        return torch.randn(number, 3, FRAMES, SIDE, SIDE, generator=generator, device=device)

    gamma = GAMMAS.get(variance, lambda: fraction)
    steps_of = sampler_steps(diffusion.schedule, steps, device)
    return to_uint8(ancestral(denoise, noise(), steps_of, noise, gamma))


def embedded(data_root: Path) -> Iterator[torch.Tensor]:
    """The views of the clips of train, and of the first 128 of val: uint8 (N, F, H, W, 3)."""
    store = store_of(settings_of(compose(f"faces.root={data_root}")))
    for split in ("train", "val"):
        dataset = CelebVTextDataset(store, split, 0, EvaluationCaptions())
        parts = []
        for batch in eval_loader(dataset, 64):
            assert batch.frames is not None
            parts.append(to_uint8(to_float(batch.frames, FRAMES, SIDE)))
        yield torch.cat(parts)[: None if split == "train" else 128]


def same_cell(path: Path, cell: Cell) -> bool:
    """Whether a run of this cell is there; one of other settings is run again."""
    if not path.exists():
        return False
    facts, settings = json.loads(path.read_text()), asdict(cell)
    return all(facts.get(name) == settings[name] for name in settings.keys() - {"seeds", "first"})


def run(names: str, data_root: Path, device: str, part: int, parts: int) -> None:
    """Every (cell, seed) of the cells whose names begin so that has no file yet."""
    wanted = [
        (name, cell, seed)
        for seed in range(max(cell.all_seeds.stop for cell in cells().values()))
        for name, cell in cells().items()
        if name.startswith(names) and seed in cell.all_seeds
    ]
    todo = [
        (name, cell, seed)
        for name, cell, seed in wanted[part::parts]
        if not same_cell(FOLDER / f"{name}_{seed}.json", cell)
    ]
    if not todo:
        return
    clips, held_out = embedded(data_root)
    bar = tqdm(todo, unit="run", dynamic_ncols=True)
    for name, cell, seed in bar:
        bar.set_postfix_str(f"{name} {seed}")
        trained = train(cell, seed, clips, device)
        facts = trained.facts | {"cell": name, "seed": seed, **asdict(cell)}
        if trained.facts["diverged_at"] is None and not name.startswith("search"):
            facts |= judge(trained, cell, held_out, device)
            if cell.quality:
                save_file(trained.average, FOLDER / f"{name}_{seed}{NETWORK}")
        write_json(FOLDER / f"{name}_{seed}.json", facts | provenance())


def run_samples(
    names: str, data_root: Path, device: str, part: int, parts: int, lengths: Sequence[int] = STEPS
) -> None:
    """Frechet distance of each trained network's samples to clips of train, by the probe's
    features, for each number of sampler steps; added to the files of the runs.
    """
    probe, features = load_probe().network, FOLDER / "real.safetensors"
    if not features.exists():
        clips, _ = embedded(data_root)
        with torch.no_grad():
            save_file(
                {"real": torch.cat(list(map(probe.features, clips[:1024].split(64))))}, features
            )
    real, probe = load_file(features)["real"], probe.to(device)
    runs = [
        (FOLDER / f"{name}_{seed}.json", cell, seed)
        for name, cell in cells().items()
        for seed in cell.all_seeds
        if cell.quality and name.startswith(names)
    ]
    runs = [one for one in runs if same_cell(*one[:2]) and one[0].with_suffix(NETWORK).exists()]
    todo = list(itertools.product(lengths, runs[part::parts]))
    for steps, (path, cell, seed) in tqdm(todo, dynamic_ncols=True):
        if f"frechet_{steps}_learned" in json.loads(path.read_text()):
            continue
        found = {"sampled_on": provenance()["hardware"]}
        net = network(cell.recipe)
        net.load_state_dict(net.state_dict() | load_file(path.with_suffix(NETWORK)))
        net.to(device)
        for name in (*GAMMAS, "learned"):
            with torch.no_grad():
                made = probe.features(sample(net, cell, name, steps, seed, device)).cpu()
            found[f"frechet_{steps}_{name}"] = frechet_distance(made, real)
        write_json(path, json.loads(path.read_text()) | found)  # another process may have written


def anatomy(data_root: Path) -> None:
    """How large the gradient at a clip's raw values is, by step, for three predictions."""
    clips, held_out = embedded(data_root)
    x0 = to_values(to_float(held_out[:64], FRAMES, SIDE))
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("x0", "v", "eps"):
        cell = Cell(RECIPES["fixed"], 3e-3, 1.0, "fp32", name, 300, 1)
        trained, diffusion = train(cell, 0, clips), DIFFUSIONS[name]
        for recipe in ("naive", "ours"):
            found[f"{name}_{recipe}"] = {"median": [], "largest": []}
        for number in NUMBERS:
            t = torch.full((len(x0),), number / diffusion.variance_steps)
            generator = torch.Generator().manual_seed(number)
            noised = add_noise(diffusion, x0, t, torch.randn(x0.shape, generator=generator))
            with torch.no_grad():
                prediction = trained.net(noised.z, noised.log_snr, unconditional(len(x0)))
            for recipe in ("naive", "ours"):
                raw = torch.zeros_like(x0, requires_grad=True)
                term = term_of(RECIPES[recipe], diffusion, prediction, raw, noised, t, x0)
                (gradient,) = torch.autograd.grad(term.sum(), raw)
                norms = gradient.flatten(1).norm(dim=1)
                found[f"{name}_{recipe}"]["median"].append(float(norms.median()))
                found[f"{name}_{recipe}"]["largest"].append(float(norms.max()))
    write_json(RESULTS / "learned_variance_anatomy.json", {"steps": NUMBERS} | found | provenance())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "sample", "anatomy"))
    parser.add_argument("--cells", default="", help="those whose names begin so")
    parser.add_argument("--data", type=Path, default=Path("data/faces"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of sampling")
    parser.add_argument("--part", default="1/1", help="of the runs, for several processes")
    given = parser.parse_args()
    if given.what == "anatomy":
        anatomy(given.data)
        return
    part, parts = map(int, given.part.split("/"))
    if given.what == "run":
        run(given.cells, given.data, given.device, part - 1, parts)
    else:
        run_samples(given.cells, given.data, given.device, part - 1, parts, given.steps)


if __name__ == "__main__":
    main()
