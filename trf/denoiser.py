"""The model between two bounds as a denoiser: what samplers call, over a UNet that sees all its rows in one batch.

Shapes: B videos, F frames, latents `[B, F, C, h, w]`. The rows of a call are `[2 (unconditional, conditional)] x
[directions asked for] x B`. A patch may act on the rows of one direction only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import rotated_attention
from .edm import denoised, preconditioning
from .fusion import disagreement, guide, reverse_time
from .halves import on_halves
from .samplers import Estimate
from .schedule import Way


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the model is told of the bound that a direction starts from."""

    embedding: Tensor
    """CLIP embedding, `[B, 1, D]`."""
    latents: Tensor
    """Conditioning latents, `[B, 1, C, h, w]`."""


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
    guidance: Tensor | None = None
    """Guidance scale per frame of a direction, `[1, F, 1, 1, 1]`; none guides nothing."""
    free: bool = False
    """Estimate without conditions even where nothing is guided."""
    rotated: bool = False
    """Rotate the temporal attention of the backward rows."""
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

    def __call__(self, x: Tensor, level: int, ways: Sequence[Way], scaled_as: int) -> dict[Way, Estimate]:
        """Estimates of the directions asked for; see `samplers.Denoise`."""
        both = self.guidance is not None or self.free
        scaled = preconditioning(self.sigmas[scaled_as]).c_in * x
        noisy = torch.cat([scaled if way == "forward" else reverse_time(scaled) for way in ways])
        embeddings = torch.cat([self.conditions[way].embedding for way in ways])
        latents = torch.cat([self.conditions[way].latents for way in ways]).expand(-1, x.shape[1], -1, -1, -1)
        backward = torch.tensor([way == "backward" for way in ways], device=x.device).repeat_interleave(len(x))
        ids = self.ids.repeat(len(ways), 1)
        if both:
            noisy, backward, ids = noisy.repeat(2, 1, 1, 1, 1), backward.repeat(2), ids.repeat(2, 1)
            embeddings, latents = (torch.cat([torch.zeros_like(one), one]) for one in (embeddings, latents))
        v = self._forward(torch.cat([noisy.to(latents.dtype), latents], dim=2), level, embeddings, ids, backward)
        free, guided = v.chunk(2) if both else (None, v)
        if self.guidance is not None:
            assert free is not None
            guided = guide(free, guided, self.guidance)
        self.calls += len(ways)
        self.on_calls(len(ways))
        estimates: dict[Way, Estimate] = {}
        for number, way in enumerate(ways):
            rows = slice(number * len(x), (number + 1) * len(x))
            own = x if way == "forward" else reverse_time(x)
            estimates[way] = Estimate(
                denoised(own, guided[rows], self.sigmas[level]),
                None if free is None else denoised(own, free[rows], self.sigmas[level]),
            )
        if len(ways) == 2:
            self.disagreements.append(disagreement(estimates["forward"].guided, estimates["backward"].guided))
        return estimates

    def _forward(self, inputs: Tensor, level: int, embeddings: Tensor, ids: Tensor, backward: Tensor) -> Tensor:
        """The UNet's output for all rows, float32."""
        outputs = []
        for rows in torch.arange(len(inputs)).split(self.rows_per_forward or len(inputs)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with ExitStack() as contexts:
                contexts.enter_context(on_halves(self.unet, backward[part]))
                if self.rotated:
                    contexts.enter_context(rotated_attention(self.unet, backward[part]))
                outputs.append(self.unet(
                    inputs[part], self.timesteps[level], embeddings[part], added_time_ids=ids[part], return_dict=False
                )[0].float())  # fmt: skip
            self.forwards += 1
        return torch.cat(outputs)
