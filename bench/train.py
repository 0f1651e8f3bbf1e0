"""Steps of LoRA training from cached conditioning, against the way the public trainer of SVD works.

    python bench/train.py [MODEL] [PAIRS_OF_RUNS] [STEPS_A_RUN]

MODEL is `miniature` (the default; in float32), or `svd-xt`, which is SVD-XT's full size with random weights (for a GPU;
bfloat16, activations recomputed, 25 frames of 576x1024 and 14 of 320x576).

The public way (SVD_Xtend's `train_svd_lora.py`, written here from its description): VAE and CLIP run in every step, all
frames in one VAE batch, the conditioning frame encoded once more; query, key, value and output of all attentions are
adapted, of which the cross-attention's query and key get no gradient. Ours reads the cache in the step, adapts the
rest, and does not compute those queries and keys. Whatever is unequal favours the public way: its frames lie decoded in
memory. Same UNet, same clips, same draws, same first weights: so the losses must be the same, and are compared. Each
run starts from the first weights; runs of the ways alternate and ratios are taken pair by pair.

Prints one table and saves it beside this file.
"""

from __future__ import annotations

import gc
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from trfpp.bench import svd_xt
from trfpp.configs.training import OptimSettings, TrainConfig
from trfpp.data_prep.frames import to_tensor
from trfpp.data_prep.procedural import film
from trfpp.data_prep.shapes import Shape
from trfpp.train.data import CachedSamples, Clip, Sample, collate
from trfpp.train.memory import estimate
from trfpp.train.objective import Objective
from trfpp.train.optim import make_optimizer
from trfpp.train.recompute import recompute_activations
from trfpp.trf.adapters import adapter_weights
from trfpp.trf.attention import attend_to_one_token
from trfpp.trf.base import hide_loading_bars, load_component, load_config
from trfpp.trf.conditioning import clip_pixels, encode_clip, encode_condition, encode_posterior, micro_conditioning
from trfpp.trf.device import best_device
from trfpp.trf.edm import log_normal_sigmas
from trfpp.trf.patch import inject_patch
from trfpp.trf.quantization import quantize
from trfpp.trf.seeds import derived_seed

PUBLIC, OURS, PACKED = "public way", "ours", "ours, nf4"
TARGETS = {
    PUBLIC: r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    OURS: r".*\.(attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_v|to_out\.0))",
}
FPS, BUCKET, SCALE = 7.0, 127.0, {"sigma_mean": 0.7, "sigma_std": 1.6}
CLIPS, NOISES = 4, 2
TOLERANCE = 1e-4
"""On the losses in float32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on what."""

    model: str
    frames: int
    height: int
    width: int
    precision: str
    recomputed: bool
    folder: Path
    """Of the cache and the frames."""
    device: str
    steps: int
    """Timed ones of a run, after one that is not."""
    rank: int = 16

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen UNet."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def component(self, name: str, dtype: torch.dtype) -> Any:
        """Of the model, on the device."""
        if self.model == "svd-xt":
            return svd_xt.build(name, self.device, dtype)
        made = load_component(self.model, name, dtype=dtype)
        return made.to(self.device) if isinstance(made, torch.nn.Module) else made


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run of one way gave."""

    seconds: float
    """Of its timed steps."""
    conditioning: float
    """Of them in VAE and CLIP."""
    losses: list[float]
    memory: int
    """CUDA: peak of what is allocated; CPU: by how much the process grew, at its largest."""
    flops: int
    """Of a step, recomputation included."""


def noise_of(number: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Strengths and noises that a clip's first frame is shown with."""
    generator = torch.Generator().manual_seed(derived_seed(0, "bench", number))
    return log_normal_sigmas((NOISES,), -3.0, 0.5, generator), torch.randn((NOISES, *shape), generator=generator)


def prepare(case: Case) -> float:
    """Make clips and their cache, as `trfpp cache` does; returns seconds of encoding a clip."""
    vae, clip = (case.component(name, torch.float32).eval() for name in ("vae", "image_encoder"))
    extractor = case.component("feature_extractor", torch.float32)
    spent = 0.0
    for number in range(CLIPS):
        if case.model == "svd-xt":
            generator = torch.Generator().manual_seed(number)
            frames = torch.rand(case.frames, 3, case.height, case.width, generator=generator) * 2 - 1
        else:
            frames = to_tensor(film("linear", 0, number, case.frames, case.height).frames)
        began = time.perf_counter()
        mean, std = encode_posterior(frames, vae)
        strengths, noises = noise_of(number, frames.shape[1:])
        shown = [encode_condition((frames[:1] + s * n).to(case.device), vae).cpu() for s, n in zip(strengths, noises)]
        embedding = encode_clip((frames[:1].to(case.device) + 1) / 2, clip, extractor)[0].float().cpu()
        spent += time.perf_counter() - began
        cached = {
            "mean": mean, "std": std, "start.condition": torch.cat(shown), "start.noise_aug": strengths,
            "start.embedding": embedding,
        }  # fmt: skip
        save_file({key: value.contiguous() for key, value in cached.items()}, case.folder / f"{number}.safetensors")
        save_file({"frames": frames.contiguous()}, case.folder / f"{number}.frames.safetensors")
    return spent / CLIPS


def samples_of(case: Case, scaling: float) -> CachedSamples:
    """The cached samples of a run."""
    shape = Shape(case.frames, case.height, case.width)
    clips = [Clip(str(number), FPS, BUCKET, shape) for number in range(CLIPS)]
    return CachedSamples(
        clips, case.folder, scaling_factor=scaling, conditioning_dropout=0.1, seed=0, per_step=1, **SCALE
    )


class PublicWay:
    """Batches made of decoded frames in the step; the draws are those of `CachedSamples`."""

    def __init__(self, case: Case, samples: CachedSamples) -> None:
        self.case, self.samples = case, samples
        self.vae, self.clip = (case.component(name, case.dtype).eval() for name in ("vae", "image_encoder"))
        self.extractor = case.component("feature_extractor", case.dtype)
        self.frames = [load_file(case.folder / f"{n}.frames.safetensors")["frames"] for n in range(CLIPS)]
        self.noises = [noise_of(number, self.frames[number].shape[1:]) for number in range(CLIPS)]
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, n: int) -> Sample:
        """The batch of sample `n`."""
        began = time.perf_counter()
        number = int(self.samples.clip_of(n).clip_id)
        frames = self.frames[number].to(self.case.device)
        strengths, noises = self.noises[number]
        posterior = self.vae.encode(frames.to(self.case.dtype)).latent_dist
        generator = torch.Generator().manual_seed(derived_seed(0, "sample", n))
        eps, noise = (torch.randn(posterior.mean.shape, generator=generator) for _ in range(2))
        sigma = log_normal_sigmas((), SCALE["sigma_mean"], SCALE["sigma_std"], generator)
        which = int(torch.randint(NOISES, (), generator=generator))
        kept = float(torch.rand((), generator=generator) >= 0.1)
        noisy = frames[:1] + (strengths[which] * noises[which]).to(self.case.device)
        condition = self.vae.encode(noisy.to(self.case.dtype)).latent_dist.mode()[0].float()
        pixels = clip_pixels((frames[:1] + 1) / 2, self.clip, self.extractor)
        embedding = self.clip(pixels.to(self.case.dtype)).image_embeds.float()
        latents = (
            posterior.mean.float() + posterior.std.float() * eps.to(self.case.device)
        ) * self.samples.scaling_factor
        made = Sample(
            latents=latents,
            noise=noise,
            sigma=sigma,
            condition=condition * kept,
            embedding=embedding * kept,
            added_time_ids=micro_conditioning(FPS, BUCKET, strengths[which], 1)[0],
        )
        batch = collate([made.to(self.case.device)])
        synchronise(self.case.device)
        self.seconds += time.perf_counter() - began
        return batch


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def first_weights(case: Case) -> dict[str, Tensor]:
    """Of the public way's adapter, of which ours takes its share: PEFT draws weights in the order of modules."""
    unet = case.component("unet", case.dtype)
    inject_patch(unet, targets=TARGETS[PUBLIC], rank=case.rank, alpha=float(case.rank))
    return {key: value.detach().clone() for key, value in adapter_weights(unet).items()}


def train(way: str, case: Case) -> Run:
    """A run of one way, from the first weights."""
    at_first = largest()
    first = first_weights(case)
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    scaling = svd_xt.VAE["scaling_factor"] if case.model == "svd-xt" else scaling_of(case.model)
    samples = samples_of(case, scaling)
    public = PublicWay(case, samples) if way == PUBLIC else None

    def cached(n: int) -> Sample:
        return collate([samples[n]]).to(case.device)

    make: Callable[[int], Sample] = public or cached
    unet = case.component("unet", case.dtype)
    if way == PACKED:
        quantize(unet, "nf4")
    adapted = TARGETS[PUBLIC if way == PUBLIC else OURS]
    inject_patch(unet, targets=adapted, rank=case.rank, alpha=float(case.rank))
    weights = adapter_weights(unet)
    with torch.no_grad():
        for key, value in weights.items():
            value.copy_(first[key])
    if way != PUBLIC:
        attend_to_one_token(unet)
    if case.recomputed and way == PUBLIC:
        unet.enable_gradient_checkpointing()
    elif case.recomputed:
        recompute_activations(unet)
    unet.train()
    optimizer = make_optimizer(weights, OptimSettings(name="adamw", lr=1e-4))
    objective = Objective(direction="forward", dtype=case.dtype)
    autocast = torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")
    losses: list[Tensor] = []

    def step(n: int) -> None:
        batch = make(n)
        with objective.losses(unet, unet, batch, n) as found:
            losses.append(found.total.detach())
            found.total.backward()
        clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter, autocast:
        step(0)
    synchronise(case.device)
    if public:
        public.seconds = 0.0
    began = time.perf_counter()
    with autocast:
        for n in range(1, case.steps + 1):
            step(n)
    synchronise(case.device)
    seconds = time.perf_counter() - began
    on_gpu = case.device == "cuda"
    return Run(
        seconds=seconds,
        conditioning=public.seconds if public else 0.0,
        losses=[float(loss) for loss in losses],
        memory=torch.cuda.max_memory_allocated() if on_gpu else largest() - at_first,
        flops=counter.get_total_flops(),
    )


def largest() -> int:
    """Bytes of memory this process had at its largest (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def scaling_of(model: str) -> float:
    """Factor on the latents."""
    return float(load_config(model, "vae")["scaling_factor"])


def try_train(way: str, case: Case) -> Run | None:
    """A run, or nothing where it does not fit the GPU."""
    try:
        return train(way, case)
    except torch.OutOfMemoryError:
        return None


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of ten."""
    side = 8192 if device == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    rates = []
    for _ in range(11):
        synchronise(device)
        began = time.perf_counter()
        one @ one
        synchronise(device)
        rates.append(2 * side**3 / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def in_own_process(way: str, case: Case) -> Run:
    """A run in a fresh process, whose growth tells what this way takes on a CPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(train, (way, case))


def measure(case: Case, pairs: int) -> list[str]:
    """Time the ways in turn, `pairs` times each; returns the lines of the table."""
    encoding = prepare(case)
    ways = [PUBLIC, OURS] + ([PACKED] if case.device == "cuda" else [])
    runs: dict[str, list[Run | None]] = {way: [] for way in ways}
    for number in range(pairs):
        for way in ways if number % 2 else ways[::-1]:
            runs[way].append(try_train(way, case))
    if case.device == "cpu":
        once = replace(case, steps=1)
        memory = {way: in_own_process(way, once).memory for way in ways}
    else:
        memory = {way: max((run.memory for run in own if run), default=0) for way, own in runs.items()}
    rate = matmul_rate(case.device, case.dtype)
    lines = [
        f"{case.model}, {case.frames} frames of {case.height}x{case.width}, rank {case.rank}, "
        + f"precision {case.precision}"
        + (", activations recomputed" if case.recomputed else "")
        + f"; {pairs} alternating runs of {case.steps} steps of one clip; encoding a clip once for the cache took "
        f"{encoding:.2f} s",
        "",
        "| way | clips/s, median | min | max | of it VAE and CLIP | peak memory, MiB | share of the matmul rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, own in runs.items():
        done = [run for run in own if run is not None]
        if not done:
            lines.append(f"| {way} | out of memory | | | | | |")
            continue
        speeds = [case.steps / run.seconds for run in done]
        inside = statistics.median(run.conditioning / run.seconds for run in done)
        share = statistics.median(run.flops * case.steps / run.seconds for run in done) / rate
        lines.append(
            f"| {way} | {statistics.median(speeds):.3f} | {min(speeds):.3f} | {max(speeds):.3f} | {inside:.0%} "
            f"| {memory[way] / 2**20:,.0f} | {share:.0%} |"
        )
    lines.append("")
    for way in ways[1:]:
        both = [(one, other) for one, other in zip(runs[PUBLIC], runs[way]) if one is not None and other is not None]
        if not both:
            continue
        ratios = [public.seconds / ours.seconds for public, ours in both]
        apart = max(abs(a - b) for public, ours in both for a, b in zip(public.losses, ours.losses))
        lines.append(
            f"{way} against the public way: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); largest difference of a step's loss {apart:.1e}"
        )
        if case.precision == "no" and apart > TOLERANCE:
            raise AssertionError(f"{way}: losses differ by {apart:.1e}, more than {TOLERANCE:g}: not the same work.")
    lines += [f"matmul rate {rate / 1e12:.3g} TFLOP/s; memory {_MEMORY[case.device]}"]
    if case.device == "cuda":
        for way in ways[1:]:
            lines.append(
                f"{way}: estimated {_estimated(way, case) / 2**20:,.0f} MiB, {memory[way] / 2**20:,.0f} measured"
            )
    return lines


_MEMORY = {
    "cuda": "is torch.cuda.max_memory_allocated",
    "cpu": "is by how much a process of its own grew (peak RSS) from the libraries' import on",
}


def _estimated(way: str, case: Case) -> int:
    config = TrainConfig(
        model="miniature",
        data=case.folder,
        output=case.folder,
        precision=case.precision,
        gradient_checkpointing=case.recomputed,
        quantization="nf4" if way == PACKED else None,
        lora={"targets": TARGETS[OURS], "rank": case.rank, "alpha": float(case.rank)},
    )  # type: ignore[arg-type]
    unet = svd_xt.UNET if case.model == "svd-xt" else dict(case.component("unet", case.dtype).config)
    channels = unet["in_channels"] // 2
    return estimate(config, unet, (case.frames, channels, case.height // 8, case.width // 8)).total


def main(model: str = "miniature", pairs: int = 5, steps: int = 8) -> str:
    """The whole table."""
    device = best_device().type
    big = model == "svd-xt"
    if big and device != "cuda":
        raise SystemExit("svd-xt is for a GPU; there is none here.")
    shapes = [(14, 320, 576), (25, 576, 1024)] if big else [(12, 64, 64)]
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    lines = [f"{name}, torch {torch.__version__}, {date.today()}", ""]
    for frames, height, width in shapes:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(
                model=model, frames=frames, height=height, width=width, precision="bf16" if big else "no",
                recomputed=big, folder=Path(folder), device=device, steps=steps,
            )  # fmt: skip
            lines += [*measure(case, pairs), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    hide_loading_bars()
    table = main(*sys.argv[1:2], *map(int, sys.argv[2:4]))
    print(table)
    (Path(__file__).parent / f"train-{best_device().type}.md").write_text(table, encoding="utf-8")
