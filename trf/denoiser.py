"""The model between two bounds as a denoiser: what samplers call, over a UNet that sees all its rows in one batch.

Shapes: B videos, F frames, latents `[B, F, C, h, w]`. The rows of a call are `[directions asked for] x
[2 (unconditional, conditional)] x B`. A patch may act on the rows of one direction only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapters import at_factor
from .attention import rotated_attention
from .edm import denoised, preconditioning
from .frame_factors import on_frames
from .fusion import disagreement, frame_guidance, guide, reverse_time
from .halves import Halves
from .samplers import Estimate
from .schedule import Way, factor_at
from .settings import SamplerSettings
from .windows import Windows


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the model is told of the bound that a direction starts from."""

    embedding: Tensor
    """CLIP embedding, `[B, 1, D]`."""
    latents: Tensor
    """Conditioning latents, `[B, 1, C, h, w]`."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: how strong, and at which noise levels (arXiv 2404.07724)."""

    scale: Tensor
    """Per frame of a direction, `[1, F, 1, 1, 1]`."""
    sigmas: tuple[float, float]
    """Least and largest noise level at which it is done."""

    @classmethod
    def of(cls, settings: SamplerSettings, num_frames: int, device: torch.device) -> Guidance | None:
        """What the settings ask for, over so many frames of a direction; none if that guides nothing."""
        if not settings.guided:
            return None
        scale = frame_guidance(settings.min_guidance_scale, settings.max_guidance_scale, num_frames, device)
        return cls(scale=scale, sigmas=(settings.min_guidance_sigma, settings.max_guidance_sigma))

    def at(self, sigma: float) -> Tensor | None:
        """The scale at a noise level, if there is guidance."""
        return self.scale if self.sigmas[0] <= sigma <= self.sigmas[1] else None


@dataclass(kw_only=True)
class BoundedDenoiser:
    """A `samplers.Denoise`."""

    unet: Any
    """`UNetSpatioTemporalConditionModel`, or `TwoUNets`."""
    conditions: Mapping[Way, Condition]
    """Of either direction, in the UNet's dtype."""
    ids: Tensor
    """Micro-conditioning of every video, `[B, 3]`."""
    sigmas: Tensor
    """Noise levels, `[N + 1]`."""
    timesteps: Tensor
    """What the UNet is told of them, `[N]`."""
    guidance: Guidance | None = None
    """None guides nothing."""
    free: bool = False
    """Estimate without conditions even where nothing is guided."""
    rotated: bool = False
    """Rotate the temporal attention of the backward rows."""
    patch_schedule: Sequence[tuple[float, float]] = ()
    """Factor on the scale of all patches over noise, see `schedule.factor_at`."""
    patch_frames: Mapping[Way, Tensor] | None = None
    """Factor on what all patches do in each frame of a direction, in its own order, `[B or 1, F]`; none is 1."""
    rows_per_forward: int | None = None
    """Rows that the UNet sees at a time; all by default."""
    on_calls: Callable[[int], Any] = lambda calls: None
    """Told the number of UNet calls that were done: directions, whatever was batched together."""
    calls: int = 0
    """UNet calls so far."""
    forwards: int = 0
    """Forward passes of the UNet so far."""
    disagreements: list[Tensor] = field(default_factory=list)
    """Of each time that both directions were asked for, `[B]`."""

    def __post_init__(self) -> None:
        self._halves = Halves(self.unet)

    def __call__(self, x: Tensor, level: int, ways: Sequence[Way], scaled_as: int) -> dict[Way, Estimate]:
        """Estimates of the directions asked for; see `samplers.Denoise`."""
        scaled = preconditioning(self.sigmas[scaled_as]).c_in * x
        scale = self.guidance.at(float(self.sigmas[level])) if self.guidance else None
        unconditional = scale is not None or self.free
        inputs, embeddings = zip(*(self._rows(way, scaled, unconditional=unconditional) for way in ways))
        with at_factor(self.unet, factor_at(self.patch_schedule, float(self.sigmas[level]))):
            v = self._forward(torch.cat(inputs), torch.cat(embeddings), level, ways)
        self.calls += len(ways)
        self.on_calls(len(ways))
        estimates: dict[Way, Estimate] = {}
        for way, rows in zip(ways, v.chunk(len(ways))):
            free, guided = rows.chunk(2) if unconditional else (None, rows)
            if scale is not None:
                assert free is not None
                guided = guide(free, guided, scale)
            own = x if way == "forward" else reverse_time(x)
            estimates[way] = Estimate(
                denoised(own, guided, self.sigmas[level]),
                None if free is None else denoised(own, free, self.sigmas[level]),
            )
        if len(ways) == 2:
            self.disagreements.append(disagreement(estimates["forward"].guided, estimates["backward"].guided))
        return estimates

    def _rows(self, way: Way, scaled: Tensor, *, unconditional: bool) -> tuple[Tensor, Tensor]:
        """Inputs and embeddings of a direction's rows, from latents in forward order that are scaled for the model."""
        condition = self.conditions[way]
        noisy = (scaled if way == "forward" else reverse_time(scaled)).to(condition.latents.dtype)
        latents, embedding = condition.latents.expand(-1, scaled.shape[1], -1, -1, -1), condition.embedding
        if unconditional:
            noisy = noisy.repeat(2, 1, 1, 1, 1)
            latents, embedding = (torch.cat([torch.zeros_like(one), one]) for one in (latents, embedding))
        return torch.cat([noisy, latents], dim=2), embedding

    def _forward(self, inputs: Tensor, embeddings: Tensor, level: int, ways: Sequence[Way]) -> Tensor:
        """The UNet's output for all rows, float32."""
        ids = self.ids.repeat(len(inputs) // len(self.ids), 1)
        running_forward = len(inputs) // len(ways) if ways[0] == "forward" else 0
        size = self.rows_per_forward or len(inputs)
        factors = None
        if self.patch_frames:
            of_ways = [self.patch_frames[way] for way in ways]
            factors = torch.cat([one.repeat(len(inputs) // len(ways) // len(one), 1) for one in of_ways])
        outputs = []
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            rows = len(inputs[part])
            forward = min(max(running_forward - start, 0), rows)
            halves = forward, rows - forward
            with ExitStack() as contexts:
                contexts.enter_context(self._halves.rows(*halves))
                if factors is not None:
                    contexts.enter_context(on_frames(self.unet, factors[part]))
                if self.rotated:
                    contexts.enter_context(rotated_attention(self.unet, *halves))
                outputs.append(self.unet(
                    inputs[part], self.timesteps[level], embeddings[part], added_time_ids=ids[part], return_dict=False
                )[0].float())  # fmt: skip
            self.forwards += 1
        return torch.cat(outputs)


@dataclass(kw_only=True)
class WindowedDenoiser:
    """A `samplers.Denoise` of one long film, `x` of `[1, N, C, h, w]`, seen through windows; see `windows`."""

    denoise: BoundedDenoiser
    """Its videos are the windows of a direction."""
    windows: Mapping[Way, Windows]
    on_calls: Callable[[int], Any] = lambda calls: None
    """Told the number of UNet calls that were done: windows, whatever was batched together."""

    def __call__(self, x: Tensor, level: int, ways: Sequence[Way], scaled_as: int) -> dict[Way, Estimate]:
        """Estimates of the film from the windows of each direction; frames that none of them sees are zero."""
        return {way: self._film(x, level, way, scaled_as) for way in ways}

    def _film(self, x: Tensor, level: int, way: Way, scaled_as: int) -> Estimate:
        windows = self.windows[way]
        seen = x[0][windows.frames]  # in the windows' own order; `denoise` wants the backward ones turned
        made = self.denoise(seen if way == "forward" else reverse_time(seen), level, (way,), scaled_as)[way]
        self.on_calls(len(seen))
        film = windows.mix(made.guided)
        return Estimate(film if way == "forward" else reverse_time(film))
