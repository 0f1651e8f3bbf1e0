"""A frozen UNet in fewer bits: weights are kept small and widened for each use; adapters beside them stay float32.

    nf4    the transformer blocks' linear layers in 4 bits, normal float (arXiv 2305.14314), by bitsandbytes
    int8   the same in 8 bits (arXiv 2208.07339), by bitsandbytes
    fp8    all linear layers and convolutions in 8-bit float (e4m3), each tensor with a scale of its own

Of SVD's 1.52 billion weights 646 million lie in linear layers of transformer blocks, 180 million in others, and
698 million in convolutions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Quantization = Literal["nf4", "int8", "fp8"]
FP8 = torch.float8_e4m3fn
SMALLEST_SCALE = 2.0**-24
"""The smallest number that half precision holds."""


def quantize(unet: Any, how: Quantization) -> None:
    """Quantise a UNet in place; its arithmetic stays in the precision that its weights have now.

    On a GPU, nf4 and int8 weights are packed when the UNet is moved there.
    """
    unet.requires_grad_(False)
    if how == "fp8":
        for _, module in narrowed_layers(unet, how):
            parametrize.register_parametrization(module, "weight", _Float8(module.weight.dtype), unsafe=True)
        return
    for name, module in narrowed_layers(unet, how):
        parent, _, child = name.rpartition(".")
        packed = _four_bits(module) if how == "nf4" else _eight_bits(module)
        # bitsandbytes rounds otherwise in training.
        setattr(unet.get_submodule(parent), child, packed.to(module.weight.device).train(module.training))
    # By which PEFT chooses its layers.
    setattr(unet, "is_loaded_in_4bit" if how == "nf4" else "is_loaded_in_8bit", True)


def quantizes(how: Quantization | None, name: str, module: nn.Module) -> bool:
    """Whether a quantised UNet keeps this module of it in fewer bits."""
    if how == "fp8":
        return isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    return how is not None and type(module) is nn.Linear and "transformer_blocks." in name


def narrowed_layers(unet: Any, how: Quantization) -> list[tuple[str, Any]]:
    """The layers that a quantised UNet keeps in fewer bits, by name."""
    return [(name, module) for name, module in unet.named_modules() if quantizes(how, name, module)]


def narrowed_size(linear: nn.Linear, how: Literal["nf4", "int8"]) -> int:
    """Bytes that a layer's weight takes once it is packed, without its bias."""
    values = linear.weight.numel()
    if how == "int8":
        return values + 4 * linear.out_features
    # Two to a byte; a scale in 8 bits for 64 of them, and one in 32 for 256 of those; two tables.
    blocks = -(-values // 64)
    return -(-values // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _four_bits(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = linear.bias is not None
    packed = Linear4bit(
        linear.in_features, linear.out_features, bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    packed.support_avx512bf16_for_cpu = False  # a format for inference, from which there is no way back to training
    packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=packed)
    packed.bias = linear.bias
    return packed


def _eight_bits(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    packed = Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    packed.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    packed.bias = linear.bias
    return packed


class _Float8(nn.Module):
    """Keeps a weight as 8-bit floats, scaled so that its largest is near the format's largest.

    The scale is a power of two, which every precision holds exactly: rounded, it would be off for all of the weight.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, kept: Tensor, scale: Tensor) -> Tensor:
        return kept.view(FP8).to(self.dtype) * scale.to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().max().float().clamp_min(SMALLEST_SCALE)
        scale = torch.exp2(torch.ceil(torch.log2(largest / torch.finfo(FP8).max))).clamp_min(SMALLEST_SCALE)
        # As plain bytes, which every backend can send between processes.
        return (weight.float() / scale).to(FP8).view(torch.uint8), scale
