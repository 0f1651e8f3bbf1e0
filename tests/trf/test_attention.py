"""Rotated attention against its definition: attention maps written out, turned by 180 degrees, times the backward values;
and attention to one token against diffusers'."""

import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from trfpp.trf.attention import (
    OneTokenAttention,
    RotatedAttention,
    attend_to_one_token,
    one_token_attention,
    rotated_attention,
)
from trfpp.trf.base import load_component
from trfpp.trf.patch import inject_patch

TWO = 2
"""Rows a half."""
PIXELS, FRAMES = 6, 5


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


@pytest.fixture
def attention(unet):
    return next(module for module in unet.modules() if isinstance(module, TemporalBasicTransformerBlock)).attn1


@pytest.fixture
def hidden(attention):
    return torch.randn(2 * TWO * PIXELS, FRAMES, attention.to_q.in_features, generator=torch.Generator().manual_seed(0))


def heads(attention, tensor):
    return tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


@torch.no_grad()
def test_it_is_the_forward_map_turned_by_180_degrees(attention, hidden):
    forward, backward = hidden.chunk(2)
    query, key = (heads(attention, project(forward)) for project in (attention.to_q, attention.to_k))
    maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    values = heads(attention, attention.to_v(backward))
    expected = attention.to_out[0]((maps.flip(-1, -2) @ values).transpose(1, 2).flatten(2))
    ours = RotatedAttention()(attention, hidden)
    torch.testing.assert_close(ours[len(backward) :], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[: len(forward)], attention(forward), rtol=1e-5, atol=1e-6)
    assert float((ours - attention(hidden))[len(backward) :].norm() / expected.norm()) > 0.01


@torch.no_grad()
def test_of_a_film_and_its_reverse_nothing_changes(attention, hidden):
    """Attention commutes with reversal, so the rotated map is then the backward film's own."""
    forward = hidden.chunk(2)[0]
    both = torch.cat([forward, forward.flip(1)])
    ours = RotatedAttention()(attention, both)
    torch.testing.assert_close(ours, attention(both), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[len(forward) :].flip(1), ours[: len(forward)], rtol=1e-5, atol=1e-6)


def test_gradients_of_backward_rows_stay_out_of_the_forward_queries(attention, hidden):
    hidden = hidden.requires_grad_()
    ours = RotatedAttention()(attention, hidden)
    ours[len(ours) // 2 :].sum().backward()
    forward, backward = hidden.grad.chunk(2)
    assert not forward.any()
    assert backward.any()


@torch.no_grad()
def test_in_the_unet_only_the_backward_rows_change_and_nothing_stays(unet):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(2 * TWO, *shape, generator=generator)

    rows = normal(5, 8, 8, 12), normal(), normal(1, 32), 20 * normal(3).abs()
    usual = unet(*rows).sample
    with rotated_attention(unet, TWO, TWO):
        rotated = unet(*rows).sample
    assert torch.equal(unet(*rows).sample, usual)
    torch.testing.assert_close(rotated[:2], usual[:2], rtol=1e-4, atol=1e-5)
    assert float((rotated - usual)[2:].norm() / usual[2:].norm()) > 1e-3
    with (
        pytest.raises(ValueError, match="rows of both directions in one UNet call"),
        rotated_attention(unet, 0, 2),
    ):
        pass


def test_attention_to_one_token_is_its_value(tiny_model):
    """Outputs and gradients, for both halves' adapters; where a query is adapted nothing is changed."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, *shape, generator=generator) for shape in ((5, 8, 8, 12), (), (1, 32), (3,))]
    found = []
    for short in (False, True):
        unet = load_component(tiny_model, "unet")
        (own,) = inject_patch(unet, targets="all", rank=2, alpha=2.0).values()
        with torch.no_grad():
            for number, parameter in enumerate(own):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        if short:
            attend_to_one_token(unet)
        video = unet(*rows).sample
        video.square().sum().backward()
        found.append([video.detach(), *(parameter.grad for parameter in own)])
    for usual, ours in zip(*found):
        torch.testing.assert_close(ours, usual, rtol=1e-3, atol=1e-4 * float(usual.abs().max()))
    assert all(
        isinstance(block.attn2.processor, OneTokenAttention) for block in unet.modules() if hasattr(block, "attn2")
    )
    adapted = load_component(tiny_model, "unet")
    inject_patch(adapted, targets=r".*attn2\.to_q", rank=2, alpha=2.0)
    before = [block.attn2.processor for block in adapted.modules() if hasattr(block, "attn2")]
    attend_to_one_token(adapted)
    assert before == [block.attn2.processor for block in adapted.modules() if hasattr(block, "attn2")]


@torch.no_grad()
def test_sampling_attends_to_one_token_and_leaves_everything_as_it_was(unet):
    rows = [
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        for shape in ((5, 8, 8, 12), (), (1, 32), (3,))
    ]
    layers = [block.attn2 for block in unet.modules() if hasattr(block, "attn2")]

    class OneOfOnesOwn(AttnProcessor2_0):
        pass

    own = layers[0].processor = OneOfOnesOwn()
    before, usual = [layer.processor for layer in layers], unet(*rows).sample
    with one_token_attention(unet):
        assert layers[0].processor is own
        assert all(isinstance(layer.processor, OneTokenAttention) for layer in layers[1:])
        torch.testing.assert_close(unet(*rows).sample, usual, rtol=1e-4, atol=1e-5)
    assert [layer.processor for layer in layers] == before
