"""Two ways to work on the same steps of LoRA training: the public trainer's of SVD, and ours.

The public way (SVD_Xtend's `train_svd_lora.py`, written here from its description): VAE and CLIP run in every step, all
frames in one VAE batch, the conditioning frame encoded once more; query, key, value and output of all attentions are
adapted, of which the cross-attention's query and key get no gradient. Ours reads the cache in the step, adapts the
rest, and does not compute those queries and keys. Whatever is unequal favours the public way: its frames lie decoded in
memory. Same UNet, same clips, same draws, same first weights: so the losses must be the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from trfpp.bench import svd_xt
from trfpp.configs.training import OptimSettings
from trfpp.data_prep.frames import to_tensor
from trfpp.data_prep.procedural import film
from trfpp.data_prep.shapes import Shape
from trfpp.train.data import CachedSamples, Clip, Sample, collate
from trfpp.train.objective import Objective
from trfpp.train.optim import make_optimizer
from trfpp.train.recompute import recompute_activations
from trfpp.trf.adapters import adapter_weights
from trfpp.trf.attention import attend_to_one_token
from trfpp.trf.base import load_component, load_config
from trfpp.trf.conditioning import clip_pixels, encode_clip, encode_condition, encode_posterior, micro_conditioning
from trfpp.trf.device import peak_memory
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
    device = torch.device(case.device)
    at_first = 0 if device.type == "cuda" else peak_memory(device) or 0
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
    return Run(
        seconds=seconds,
        conditioning=public.seconds if public else 0.0,
        losses=[float(loss) for loss in losses],
        memory=(peak_memory(device) or 0) - at_first,
        flops=counter.get_total_flops(),
    )


def scaling_of(model: str) -> float:
    """Factor on the latents."""
    return float(load_config(model, "vae")["scaling_factor"])
