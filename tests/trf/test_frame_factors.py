"""Patches that are stronger in some frames than in others: every kind of layer, both halves, pairs and films."""

from typing import get_args

import pytest
import torch
from torch import nn

from trfpp.train.recompute import chunk_feed_forward
from trfpp.trf import adapters
from trfpp.trf.attention import one_token_attention
from trfpp.trf.base import load_component
from trfpp.trf.frame_factors import factors_over, on_frames
from trfpp.trf.halves import Halves
from trfpp.trf.patch import load_patch
from trfpp.trf.settings import SamplerSettings
from trfpp.trf.variants import Kind
from trfpp.trf.windows import levels_of, places_of

ROWS, FRAMES = 4, 5
"""Of the UNet's batch; two rows run forward and two backward."""


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(ROWS, *shape, generator=generator)

    return normal(FRAMES, 8, 8, 12), normal(), normal(1, 32), 20 * normal(3).abs()


def every_layer(unet):
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return "|".join(name.replace(".", "[.]") for name, module in unet.named_modules() if isinstance(module, kinds))


def output(unet, rows, factors=None):
    """As the pipeline calls the UNet."""
    with Halves(unet).rows(ROWS // 2, ROWS // 2), one_token_attention(unet):
        if factors is None:
            return unet(*rows).sample
        with on_frames(unet, factors):
            return unet(*rows).sample


def relative(one, other):
    return float((one - other).norm() / other.norm())


@torch.no_grad()
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_equal_factors_are_scales_and_rows_have_their_own(unet, rows, make_patch, kind, direction):
    base = output(unet, rows)
    load_patch(unet, make_patch(direction=direction, kind=kind), "it", 0.8)
    full = output(unet, rows)
    assert torch.equal(output(unet, rows, torch.ones(ROWS, FRAMES)), full)
    assert relative(output(unet, rows, torch.zeros(ROWS, FRAMES)), base) < 1e-6
    turns = output(unet, rows, torch.tensor([0.0, 1.0, 1.0, 0.0]).view(-1, 1).expand(-1, FRAMES))
    assert relative(turns[[0, 3]], base[[0, 3]]) < 1e-6
    assert relative(turns[[1, 2]], full[[1, 2]]) < 1e-6
    assert relative(full, base) > 1e-3
    if kind == "lora":  # what multiplies weights has no such thing as half of it
        halved = output(unet, rows, torch.full((ROWS, FRAMES), 0.5))
        with adapters.at_factor(unet, 0.5):
            assert relative(output(unet, rows), halved) < 1e-5


@torch.no_grad()
def test_every_layer_that_sees_frames_weighs_each(unet, rows, make_patch):
    """One frame of one row has the adapter: of each layer's output that is one part in rows times frames."""
    load_patch(unet, make_patch(targets=every_layer(unet), size=0.1), "it")
    inputs, shares = {}, {}

    def remember(name):
        return lambda module, args: inputs.setdefault(name, args[0].clone())

    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in adapters.lora_layers(unet)]
    output(unet, rows)
    for hook in hooks:
        hook.remove()
    factors = torch.zeros(ROWS, FRAMES)
    factors[2, 3] = 1
    for name in inputs:  # attention to one token has neither queries nor keys
        layer = unet.get_submodule(name)
        base, full = layer.get_base_layer()(inputs[name]), layer(inputs[name])
        with on_frames(unet, factors):
            shown = layer(inputs[name])
        assert ((shown == base) | torch.isclose(shown, full)).all() or name.startswith(("time_emb", "add_emb"))
        shares[name] = float((shown != base).float().mean())
    of_one_frame = {name for name, share in shares.items() if abs(share - 1 / ROWS / FRAMES) < 1e-2}
    of_one_row = {name for name, share in shares.items() if abs(share - 1 / ROWS) < 1e-2}
    assert of_one_frame | of_one_row == set(shares)
    assert of_one_row == {name for name in shares if name.startswith(("time_embedding", "add_embedding"))}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "folded", "unfolded"),
    [
        ("conv_in", "(b f) c h w", "b f c h w"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "(b f) l c", "b f l c"),
        ("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q", "(b l) f c", "b l f c"),
        ("down_blocks.0.resnets.0.spatial_res_block.conv1", "(b f) c h w", "b f c h w"),
        ("down_blocks.0.resnets.0.temporal_res_block.conv1", "b c f h w", "b c f h w"),
        ("down_blocks.0.resnets.0.temporal_res_block.time_emb_proj", "b f c", "b f c"),
        ("time_embedding.linear_1", "b c", "b c"),
    ],
)
def test_frames_lie_where_the_unet_has_them(unet, make_patch, name, folded, unfolded):
    """Against the layer at the scale of one frame of one row, put where diffusers has that frame."""
    load_patch(unet, make_patch(targets=name.replace(".", "[.]")), "it")
    layer = unet.get_submodule(name)
    weight = layer.get_base_layer().weight
    sizes = {"b": ROWS, "f": FRAMES, "l": 6, "h": 4, "w": 3, "c": weight.shape[1]}
    axes = unfolded.split()
    x = torch.randn([sizes[axis] for axis in axes], generator=torch.Generator().manual_seed(0))
    inner = x.flatten(0, 1) if folded.startswith("(") else x
    factors = torch.rand(ROWS, FRAMES, generator=torch.Generator().manual_seed(1))
    with on_frames(unet, factors):
        shown = layer(inner)
    whole, base = layer(inner), layer.get_base_layer()(inner)
    shown, whole, base = (one.unflatten(0, x.shape[:2]) if inner is not x else one for one in (shown, whole, base))
    for row in range(ROWS):
        for frame in range(FRAMES):
            place = [row] + [slice(None)] * (shown.ndim - 1)
            factor = factors[row].mean()
            if "f" in axes:
                place[axes.index("f")], factor = frame, factors[row, frame]
            expected = base[tuple(place)] + factor * (whole - base)[tuple(place)]
            assert torch.allclose(shown[tuple(place)], expected, atol=1e-5)


@torch.no_grad()
def test_nothing_stays_behind(unet, rows, make_patch):
    load_patch(unet, make_patch(direction="both"), "it")
    before = output(unet, rows)
    broken = unet.get_submodule("mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_out.0")
    hook = broken.lora_A["it/forward"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(unet, rows, torch.ones(ROWS, FRAMES))
    hook.remove()
    assert not any("forward" in vars(module) or module._forward_hooks for module in unet.modules())
    assert torch.equal(output(unet, rows), before)


def test_factors_are_linear_between_points():
    places = {"forward": torch.tensor([[0.0, 0.25, 0.5, 1.0]]), "backward": torch.tensor([[1.0, 0.5, 0.25, 0.0]])}
    found = factors_over([(0.25, 2.0), (0.75, 1.0)], places)
    assert found["forward"].tolist() == [[2.0, 2.0, 1.5, 1.0]]
    assert torch.equal(found["backward"], found["forward"].flip(1))
    assert factors_over([], places) is None


SMALL = {"sampler": "trf", "height": 32, "width": 48, "num_frames": 4, "num_inference_steps": 2, "jump_n_sample": 1}


def seeded():
    return torch.Generator().manual_seed(0)


def images(number):
    return [torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]


def pair(pipe, *points, **changes):
    changes = {**SMALL, "patch_frames": points, "generator": seeded(), **changes}
    return pipe(*images(2), output_type="latent", **changes).frames


def test_a_pair_follows_the_points_in_both_directions(clean, make_patch):
    base = pair(clean)
    clean.load_patch(make_patch(direction="both"), "it", 0.7)
    usual = pair(clean)
    assert torch.equal(pair(clean, (0.0, 1.0)), usual)
    assert relative(pair(clean, (0.5, 0.0)), base) < 1e-5
    rising, falling = pair(clean, (0.0, 0.0), (1.0, 1.0)), pair(clean, (0.0, 1.0), (1.0, 0.0))
    apart = [(one - base).flatten(2).norm(dim=2)[0] for one in (rising, falling)]
    assert apart[0][0] / apart[0][-1] < apart[1][0] / apart[1][-1]
    few = pair(clean, (0.0, 0.0), (1.0, 1.0), low_memory=True)
    assert relative(few, rising) < 1e-5
    for points in ([(-0.1, 1.0)], [(0.0, 1.0), (1.1, 1.0)], [(0.5, 1.0), (0.5, 2.0)], [(1.0,)], ["ab"], [0.5]):
        with pytest.raises(ValueError, match="patch_frames"):
            pair(clean, *points)


def test_the_reversed_film_has_the_reversed_points(clean, make_patch):
    """Of a patch equally strong on both halves, and of noise that is reversed too."""
    clean.load_patch(make_patch())
    noise = torch.randn(1, 4, *clean.latent_shape(SamplerSettings(**SMALL), 1)[2:], generator=seeded())
    points = [(0.0, 0.2), (1.0, 1.4)]
    one, other = images(2)
    settings = {**SMALL, "output_type": "latent", "generator": seeded()}
    there = clean(one, other, patch_frames=points, latents=noise, **settings).frames
    settings["generator"] = seeded()
    back = clean(other, one, patch_frames=[(0.0, 1.4), (1.0, 0.2)], latents=noise.flip(1), **settings).frames
    assert relative(back.flip(1), there) < 1e-4


@pytest.mark.parametrize(("closed", "frames"), [(False, None), (True, 6)])
def test_a_film_follows_the_points(clean, make_patch, closed, frames):
    def film(*points):
        return clean.through(
            images(3), [0, 2, 4], film_frames=frames, closed=closed, patch_frames=points, generator=seeded(),
            output_type="latent", **{**SMALL, "num_frames": 5, "num_inference_steps": 1},
        ).frames  # fmt: skip

    def bump(at):
        return (at - 0.25, 0.0), (at, 1.0), (at + 0.25, 0.0)

    base = film()
    clean.load_patch(make_patch(direction="both"))
    assert relative(film((0.0, 0.0)), base) < 1e-5
    usual, early, late = film((0.3, 1.0)), film(*bump(0.25)), film(*bump(0.75))
    assert relative(usual, base) > 1e-3
    sooner, later = ((one - base).flatten(2).norm(dim=2)[0] for one in (early, late))
    assert sooner[1] / later[1] > 2 * sooner[3] / later[3]


def test_cross_attention_in_time_has_a_value_for_each_frame(clean, make_patch):
    """Though its context is one token: rising and falling points are then not the same."""
    clean.load_patch(make_patch(targets=r".*temporal_transformer_blocks\.\d+\.attn2\.(to_v|to_out\.0)", size=1.0))
    rising, falling = pair(clean, (0.0, 0.0), (1.0, 1.0)), pair(clean, (0.0, 1.0), (1.0, 0.0))
    assert relative(rising, falling) > 1e-3


def test_frames_in_chunks_are_refused(unet, tiny_model, rows, make_patch):
    load_patch(unet, make_patch(), "it")
    unet.enable_forward_chunking(dim=1)
    with pytest.raises(ValueError, match="without enable_forward_chunking"):
        output(unet, rows, torch.ones(ROWS, FRAMES))
    unet = load_component(tiny_model, "unet").eval()
    load_patch(unet, make_patch("again"), "it")
    chunk_feed_forward(unet, 2)
    with pytest.raises(ValueError, match="needs all 5 frames in a layer"), torch.no_grad():
        output(unet, rows, torch.ones(ROWS, FRAMES))


def test_places_of_coarse_films_are_those_of_the_whole_one():
    levels = levels_of((0, 12, 60, 61), 62, 8, closed=False)
    places = places_of(levels, closed=False)
    assert len(levels) > 2
    for level, own in zip(levels, places):
        assert len(own) == level.frames
        assert (own[0], own[-1]) == (0, 1)
        assert torch.equal(own, own.sort().values)
    keyframes = list(levels[0].times)
    assert places[0][keyframes].tolist() == pytest.approx([0, 12 / 61, 60 / 61, 1])
    closed = places_of(levels_of((0, 10), 40, 8, closed=True), closed=True)
    assert all(own[-1] < 1 for own in closed)


def test_a_closed_film_ends_as_strong_as_it_begins(clean, make_patch):
    clean.load_patch(make_patch())
    with pytest.raises(ValueError, match="ends where it begins"):
        clean.through(images(2), [0, 2], film_frames=5, closed=True, patch_frames=[(0.0, 1.0), (1.0, 0.5)], **SMALL)
