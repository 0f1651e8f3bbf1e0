"""The draws of a generation: unit noise that is given, or comes from the caller's generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .samplers import NoiseSource

Generators = torch.Generator | list[torch.Generator] | None


def unit_noise(
    name: str,
    given: Tensor | None,
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    *,
    shared: bool = False,
) -> Tensor:
    """Noise of a shape, float32 on the device.

    Args:
        name: of the argument, for errors.
        given: noise in place of a draw.
        shape: that it has, `[B, ...]`.
        generator: one for all, or one for each of B.
        device: that the noise is wanted on.
        shared: whether given noise of one row serves all.

    Raises:
        ValueError: if given noise has another shape.
    """
    shape = tuple(shape)
    if given is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(given.shape) != shape and not (shared and tuple(given.shape) == (1, *shape[1:])):
        raise ValueError(f"{name} is {tuple(given.shape)}, must be {shape}.")
    return given.to(device, torch.float32)


def noise_source(
    name: str, given: Tensor | None, times: int, shape: Sequence[int], generator: Generators, device: torch.device
) -> NoiseSource:
    """Noise as it is asked for, so many times: rows of what is given, or draws; see `unit_noise`."""
    if given is None:
        return lambda: unit_noise(name, None, shape, generator, device)
    rows = iter(unit_noise(name, given, (times, *shape), generator, device))
    return lambda: next(rows)
