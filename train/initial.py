"""First weights of a miniature: every residual branch starts at zero, so a fresh network is a chain of plain layers.

Worth 4 dB to the autoencoder at equal steps (docs/experiments.md); what diffusion UNets commonly do (arXiv 2105.05233).
"""

from __future__ import annotations

import torch
from torch import nn

LAST_OF_BRANCH = ("conv2", "proj_out")
"""Names of the last layers of residual branches: of residual blocks, and of transformers in the UNet."""


@torch.no_grad()
def zero_residuals(network: nn.Module) -> None:
    """Zero the last layer of every residual branch of an SVD autoencoder or UNet, in place."""
    for name, module in network.named_modules():
        attention_of_autoencoder = name.endswith("to_out.0") and "transformer_blocks" not in name
        if name.rpartition(".")[2] in LAST_OF_BRANCH or attention_of_autoencoder:
            for parameter in module.parameters():
                parameter.zero_()


@torch.no_grad()
def identity(convolution: nn.Conv3d) -> None:
    """Make a convolution over time with as many outputs as inputs pass everything through, in place."""
    convolution.weight.zero_()
    convolution.bias.zero_()  # type: ignore[union-attr]
    for channel in range(convolution.out_channels):
        convolution.weight[channel, channel, convolution.kernel_size[0] // 2, 0, 0] = 1
