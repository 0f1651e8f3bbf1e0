"""The best approximation of a weight by a low-rank product, which is what an adapter may start from."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16
ITERATIONS = 8
"""On a matrix of pure noise, the worst case, these keep at least 0.95 of what the best product holds of it."""


@torch.no_grad()
def principal_factors(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """The adapter whose update is nearest to a weight: its leading singular vectors, found by subspace iteration.

    The iteration is randomised (Halko et al., arXiv 0909.4061, algorithm 4.4) and in float32: at rank 16 a layer of
    1280 x 5120 takes 0.2 s of a CPU core, where a whole decomposition takes many seconds.

    Args:
        weight: `[out, in, ...]` of a linear layer or a convolution, of any floating type.
        rank: of the product, at most `most_rank(weight)`.
        scale: that the adapter multiplies its product by.
        generator: of the CPU.

    Returns:
        A `[rank, in, ...]` and B `[out, rank, 1...]`, of equal norm, so that `scale B A` approximates the weight;
        float32, on the CPU. `None` for a weight that is zero: nothing could be learnt from zero factors.
    """
    matrix = weight.detach().to("cpu", torch.float32).flatten(1)
    if not matrix.any():
        return None
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    columns = min(rank + OVERSAMPLING, tall.shape[1])
    basis = torch.linalg.qr(tall @ torch.randn(tall.shape[1], columns, generator=generator)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    left, right = (basis @ u[:, :rank]) * root, v[:rank].T * root
    b, a = (left, right) if tall is matrix else (right, left)
    ones = [1] * (weight.ndim - 2)
    return a.T.reshape(rank, *weight.shape[1:]).contiguous(), b.reshape(-1, rank, *ones).contiguous()


def most_rank(weight: Tensor) -> int:
    """The rank of a weight `[out, in, ...]` as a matrix, if nothing in it is redundant."""
    return min(len(weight), weight[0].numel())


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A of an adapter, in the shape of the weight it acts on."""
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
