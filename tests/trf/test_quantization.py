"""Quantised UNets: as small as said, close to the original, and passing gradients to the adapters beside them."""

import pytest
import torch
from torch import nn

from trfpp.trf import adapters
from trfpp.trf.base import load_component
from trfpp.trf.quantization import quantize


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


@pytest.mark.parametrize(("how", "error"), [("nf4", 0.25), ("int8", 0.02), ("fp8", 0.2)])
def test_a_quantised_unet_is_close_and_passes_gradients_to_its_adapter(unet, how, error, output):
    with torch.no_grad():
        exact = output(unet)
        quantize(unet, how)
        close = output(unet)
        assert 1e-4 < float((close - exact).norm() / exact.norm()) < error
        assert close.dtype == torch.float32
        parameters = adapters.inject(unet, targets="all", rank=2, alpha=2)
        assert torch.equal(output(unet), close)
    output(unet).square().mean().backward()
    assert all(bool(parameter.grad.any()) for parameter in parameters[1::2])
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == len(parameters)


def of_blocks(unet):
    return [m for name, m in unet.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in name]


def of_all(unet):
    return [module for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]


# nf4 keeps a float32 for every 64 weights, but its constants beside the parameters.
@pytest.mark.parametrize(("how", "layers", "bits"), [("nf4", of_blocks, 4), ("int8", of_blocks, 8), ("fp8", of_all, 8)])
def test_weights_take_as_few_bits_as_said(unet, how, layers, bits):
    weights = sum(layer.weight.numel() for layer in layers(unet))
    others = sum(parameter.nbytes for parameter in unet.parameters()) - 4 * weights
    quantize(unet, how)
    kept = sum(parameter.nbytes for parameter in unet.parameters()) - others
    assert 8 * kept / weights == pytest.approx(bits, rel=0.01)


def test_eight_bit_floats_are_scaled_to_their_range():
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 1.75, -3.5, 0.875], [3.5 / 2**14, 1.8, 0.4375, -0.25]]))
    quantize(linear, "fp8")
    # 3.5 becomes the largest, 448 = 1.75 x 2^8: what has three bits after the point there is kept, and 1.8 is rounded.
    expected = torch.tensor([[0.0, 1.75, -3.5, 0.875], [3.5 / 2**14, 1.75, 0.4375, -0.25]])
    torch.testing.assert_close(linear.weight, expected, rtol=1e-6, atol=0)
    assert linear.parametrizations.weight.original0.dtype == torch.uint8


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.3, 1.7])
def test_half_precision_holds_what_eight_bit_floats_keep(factor):
    """A scale that it rounded would be off for all of the weight, where the format is off to either side."""
    half = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        half.weight.copy_(factor * torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    full = nn.Linear(256, 256, bias=False)
    full.load_state_dict(half.state_dict())
    weight = full.weight.detach().clone()
    quantize(half, "fp8")
    quantize(full, "fp8")
    assert torch.equal(half.weight.float(), full.weight)
    assert float((full.weight - weight).norm() / weight.norm()) < 0.03
