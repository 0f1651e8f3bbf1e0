"""Adapters on one half of the batch: one call equals two calls of plain adapters, in value and in gradient, for every
kind of layer; nothing stays behind; what cannot be halved is refused."""

import copy
import pickle
from typing import get_args

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trfpp.trf import adapters
from trfpp.trf.base import load_component
from trfpp.trf.fusing import fuse, unfuse
from trfpp.trf.halves import Halves
from trfpp.trf.patch import inject_patch, load_patch
from trfpp.trf.quantization import quantize
from trfpp.trf.variants import TARGET_PRESETS, Kind

TWO = 2
"""Rows a half."""
HALVES = {"forward": slice(0, TWO), "backward": slice(TWO, None)}


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


def every_layer(unet):
    """Of all kinds: linear, spatial and temporal convolutions, embeddings of time and of frames, contexts."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return "|".join(name.replace(".", "[.]") for name, module in unet.named_modules() if isinstance(module, kinds))


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(2 * TWO, *shape, generator=generator)

    return normal(5, 8, 8, 12), normal(), normal(1, 32), 20 * normal(3).abs()


def output(unet, rows, part=slice(None)):
    return unet(*(tensor[part] for tensor in rows)).sample


def halved(unet, rows):
    with Halves(unet).rows(TWO, TWO):
        return output(unet, rows)


def relative(one, other):
    return float((one - other).norm() / other.norm())


def randomised(unet, size, seed=1):
    """Its updates are zero as they start, and differ between adapters from here on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in adapters.adapter_names(unet):
            for parameter in adapters.adapter_parameters(unet, name):
                if not parameter.any():  # the factor that keeps an update at zero
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return unet


def alone(model, unet, adapter, scale=1.0):
    """A UNet of its own with a copy of one adapter, which acts on every row."""
    config = copy.deepcopy(unet.peft_config[adapter])
    own = load_component(model, "unet").eval()
    adapters.add_adapter(own, config, adapters.adapter_state(unet, adapter), "it")
    adapters.set_scales(own, {"it": scale})
    return own


@torch.no_grad()
@pytest.mark.parametrize(
    ("targets", "kind"),
    [(targets, "lora") for targets in [*TARGET_PRESETS, every_layer]] + [("all", kind) for kind in get_args(Kind)[1:]],
)
def test_one_call_equals_two_calls_with_a_plain_adapter_each(unet, tiny_model, rows, targets, kind):
    base = output(unet, rows)
    targets, size = (targets, 0.3) if isinstance(targets, str) else (targets(unet), 0.05)
    inject_patch(unet, "both", targets=targets, kind=kind, rank=4, alpha=8)
    assert relative(halved(unet, rows), base) < (1e-9 if kind == "lora" else 1e-5)  # both start at zero
    randomised(unet, size)
    together = halved(unet, rows)
    for part, half in HALVES.items():
        apart = output(alone(tiny_model, unet, f"default/{part}"), rows, half)
        assert relative(together[half], apart) < 1e-5
        assert relative(base[half], apart) > 0.1


@torch.no_grad()
def test_any_pair_of_scales_and_patches_adds_up(unet, tiny_model, rows, make_patch):
    folders = {
        "one": make_patch("one", seed=1),
        "two": make_patch("two", seed=2, targets="motion", direction="backward"),
        "three": make_patch("three", seed=3, targets="spatial"),
    }
    pairs = {"one": (0.5, 1.5), "two": (0.0, 1.0), "three": (0.7, 0.7)}
    load_patch(unet, folders["one"], "one", (0.5, 1.5))
    load_patch(unet, folders["two"], "two")
    load_patch(unet, folders["three"], "three", 0.7)
    assert adapters.active_scales(unet) == {**pairs, "three": pytest.approx(0.7)}
    together = halved(unet, rows)
    for number, half in enumerate(HALVES.values()):
        own = load_component(tiny_model, "unet").eval()
        for name, folder in folders.items():
            load_patch(own, folder, name, (pairs[name][number],) * 2)
        assert relative(together[half], output(own, rows, half)) < 1e-5


@torch.no_grad()
def test_swapping_the_scales_swaps_the_halves(unet, rows, make_patch):
    """To the bit: nothing but the scale tells a row of one half from a row of the other."""
    load_patch(unet, make_patch(direction="both"), "it")
    same = tuple(torch.cat([tensor[:TWO]] * 2) for tensor in rows)
    one = halved(unet, same)
    adapters.set_scales(unet, {"it/forward": (0.0, 1.0), "it/backward": (1.0, 0.0)})
    assert torch.equal(halved(unet, same), one.roll(TWO, 0))
    assert relative(one[:TWO], one[TWO:]) > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["all", every_layer])
def test_each_adapter_gets_the_gradient_of_its_own_rows(unet, tiny_model, rows, preset, checkpointing):
    targets, size = (preset, 0.3) if isinstance(preset, str) else (preset(unet), 0.05)
    parameters = inject_patch(unet, "both", targets=targets, rank=2, alpha=2)
    randomised(unet, size)
    apart = {part: alone(tiny_model, unet, f"default/{part}") for part in HALVES}
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with Halves(unet).rows(TWO, TWO):
        output(unet, rows).square().mean().backward()
    for part, half in HALVES.items():
        own = adapters.adapter_parameters(apart[part], "it")
        for parameter in own:
            parameter.requires_grad_()
        (output(apart[part], rows, half).square().mean() / 2).backward()
        ours = torch.cat([parameter.grad.flatten() for parameter in parameters[f"default/{part}"]])
        theirs = torch.cat([parameter.grad.flatten() for parameter in own])
        assert relative(ours, theirs) < 1e-5


@torch.no_grad()
def test_nothing_stays_behind(unet, rows, make_patch):
    def replaced():
        return sum("forward" in vars(module) for module in unet.modules())

    load_patch(unet, make_patch("even"), "even")
    before = output(unet, rows)
    with Halves(unet).rows(TWO, TWO):
        assert replaced() == 0  # the same scale for both halves costs nothing
        assert torch.equal(output(unet, rows), before)
    load_patch(unet, make_patch("uneven", direction="backward"), "uneven")
    with Halves(unet).rows(TWO, TWO):
        assert replaced() == 40
    assert replaced() == 0
    with pytest.raises(RuntimeError, match="expected input"), Halves(unet).rows(TWO, TWO):
        output(unet, [rows[0][:, :, :3], *rows[1:]])  # channels that the model has not
    assert replaced() == 0
    assert adapters.active_scales(copy.deepcopy(unet)) == {"even": 1.0, "uneven": (0.0, 1.0)}
    restored = pickle.loads(pickle.dumps(unet))
    assert torch.equal(halved(restored, rows), halved(unet, rows))
    adapters.remove_adapters(unet, ["uneven"])
    assert torch.equal(halved(unet, rows), before)
    adapters.remove_adapters(unet)
    assert not hasattr(unet, "uneven_scales")


def test_halves_in_half_precision(tiny_model, rows, make_patch):
    """An adapter in float32 on a base in bfloat16, and one that was cast along with it."""
    unet = load_component(tiny_model, "unet", dtype=torch.bfloat16).eval()
    load_patch(unet, make_patch(direction="both"))
    rows = tuple(tensor.bfloat16() for tensor in rows)
    with torch.no_grad():
        live = halved(unet, rows)
        assert live.dtype == torch.bfloat16
        cast = halved(unet.to(torch.bfloat16), rows)
    assert relative(cast.float(), live.float()) < 0.1


class Widest(TorchDispatchMode):
    """Remembers the size of the largest float32 tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", ["temporal_transformer_blocks.0.ff.net.0.proj", "spatial_res_block.conv1"])
@torch.no_grad()
def test_a_half_precision_layer_keeps_its_width(tiny_model, make_patch, direction, name):
    """Neither evenly nor unevenly scaled adapters make a float32 tensor as large as the layer's output."""
    unet = load_component(tiny_model, "unet", dtype=torch.bfloat16).eval()
    load_patch(unet, make_patch(direction=direction, targets=rf".*{name}", rank=2, size=0.1), "it")
    layer = next(layer for _, layer in adapters.lora_layers(unet))
    weight = layer.get_base_layer().weight
    shape = (2 * TWO, 4, weight.shape[1]) if weight.ndim == 2 else (2 * TWO, weight.shape[1], 6, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = layer(x)  # PEFT's own way, in float32
    before = layer.get_base_layer()(x)
    with Halves(unet).rows(TWO, TWO), Widest() as widest:
        shown = layer(x)
    assert shown.dtype == torch.bfloat16
    assert widest.elements < shown.numel()
    assert torch.equal(layer.get_base_layer()(x), before)
    if direction == "forward":
        assert relative((shown - before).float(), (usual - before).float()) < 0.02
    assert relative(shown.float(), before.float()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("targets", "kind"), [(every_layer, "lora"), *(("all", kind) for kind in get_args(Kind))])
def test_a_fused_pair_gives_each_half_weights_of_its_own(unet, rows, targets, kind):
    weights = {key: value.clone() for key, value in unet.state_dict().items()}
    targets, size = (targets, 0.3) if isinstance(targets, str) else (targets(unet), 0.05)
    inject_patch(unet, "both", targets=targets, kind=kind, rank=4, alpha=8)
    live = halved(randomised(unet, size), rows)
    fuse(unet)
    assert adapters.is_fused(unet)
    assert adapters.active_scales(unet) == {"default/forward": (1, 0), "default/backward": (0, 1)}
    assert relative(halved(unet, rows), live) < 1e-5
    for part, sizes in {"forward": (2 * TWO, 0), "backward": (0, 2 * TWO)}.items():  # all rows one way
        with Halves(unet).rows(*sizes):
            assert relative(output(unet, rows)[HALVES[part]], live[HALVES[part]]) < 1e-5
    with pytest.raises(ValueError, match="unfuse_patches"):
        adapters.set_scales(unet, {"default/forward": 1.0})
    unfuse(unet)
    assert not adapters.is_fused(unet)
    assert relative(halved(unet, rows), live) < 1e-5
    adapters.remove_adapters(unet)
    assert unet.state_dict().keys() == weights.keys()
    assert all(relative(value, weights[key]) < 1e-4 for key, value in unet.state_dict().items() if weights[key].any())


@torch.no_grad()
def test_fusing_again_or_in_vain_leaves_the_weights_alone(unet, rows, make_patch):
    load_patch(unet, make_patch(direction="both"), "it")
    live = halved(unet, rows)
    fuse(unet)
    with pytest.raises(ValueError, match="fused already"):
        fuse(unet)
    unfuse(unet)
    assert relative(halved(unet, rows), live) < 1e-5
    last = adapters.adapter_parameters(unet, "it/backward")[-1]
    kept = last.clone()
    last.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        fuse(unet)
    assert not adapters.is_fused(unet)
    last.copy_(kept)
    assert relative(halved(unet, rows), live) < 1e-5
    fuse(unet)
    assert relative(halved(unet, rows), live) < 1e-5


@torch.no_grad()
def test_weights_in_fewer_bits_are_not_fused(unet, make_patch):
    quantize(unet, "fp8")
    load_patch(unet, make_patch(), "it")
    with pytest.raises(ValueError, match="quantised"):
        fuse(unet)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("fused", [False, True])
def test_patches_act_alike_while_weights_are_away(tiny_model, rows, make_patch, dtype, direction, fused):
    """As `enable_sequential_cpu_offload` does it: a layer's weights come when it is called, and go again."""
    unet = load_component(tiny_model, "unet", dtype=dtype).eval()
    rows = [value.to(dtype) for value in rows]
    load_patch(unet, make_patch(direction=direction, targets=every_layer(unet), size=0.05), "it")
    if fused:
        fuse(unet)
    live = halved(unet, rows).float()
    cpu_offload(unet, torch.device("cpu"))
    assert next(unet.parameters()).is_meta
    assert relative(halved(unet, rows).float(), live) < (1e-5 if dtype == torch.float32 else 0.03)
    for change in (fuse, unfuse):
        with pytest.raises(ValueError, match="are away" if change is unfuse or not fused else "fused already"):
            change(unet)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_a_pair_acts_alike_under_autocast(unet, rows, make_patch, fused):
    load_patch(unet, make_patch(direction="both"), "it")
    live = halved(unet, rows)
    if fused:
        fuse(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(halved(unet, rows).float(), live) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", get_args(Kind))
def test_at_scale_zero_it_is_the_base(unet, rows, kind):
    """Also what multiplies weights, and once it is fused."""
    base = halved(unet, rows)
    inject_patch(unet, "forward", targets="all", kind=kind, rank=4, alpha=8)
    for name, value in adapters.adapter_weights(randomised(unet, 0.3)).items():
        if name.endswith("magnitude_vector"):
            value.mul_(1.3)
    assert relative(halved(unet, rows), base) > 0.1
    adapters.set_scales(unet, {"default": 0.0})
    assert relative(halved(unet, rows), base) < 1e-6
    fuse(unet)
    assert relative(halved(unet, rows), base) < 1e-6


@torch.no_grad()
def test_any_scales_are_fused(unet, rows, make_patch):
    """One patch on the backward half only, another on both but not alike, a third alike: layers may have any of them."""
    load_patch(unet, make_patch("one", seed=1, targets="motion", direction="backward"), "one")
    load_patch(unet, make_patch("two", seed=2), "two", (0.5, 1.5))
    load_patch(unet, make_patch("three", seed=3, targets="spatial"), "three", 0.7)
    assert max(fused_and_back(unet, rows)) < 1e-5


def fused_and_back(unet, rows):
    """How far the UNet is from its live patches with them fused, and unfused again."""
    live = halved(unet, rows)
    fuse(unet)
    fused = halved(unet, rows)
    unfuse(unet)
    return [relative(made, live) for made in (fused, halved(unet, rows))]


@torch.no_grad()
def test_fused_beside_one_at_scale_zero_a_patch_acts_once(unet, rows, make_patch):
    """That one is left out of the layer's weights, and of what is done beside them."""
    load_patch(unet, make_patch("one", seed=1), "one")
    load_patch(unet, make_patch("two", seed=2), "two", 0.0)
    assert max(fused_and_back(unet, rows)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("lora", "dora"), ("dora", "lora"), ("dora", "dora")])
def test_kinds_on_one_layer_are_fused(unet, rows, make_patch, kinds):
    """A DoRA's norm is that of the base, whatever else was added to it."""
    for number, kind in enumerate(kinds):
        load_patch(unet, make_patch(f"patch{number}", seed=number, kind=kind), f"patch{number}")
    assert max(fused_and_back(unet, rows)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_fused_in_half_precision_it_acts_once(tiny_model, rows, make_patch, direction):
    unet = load_component(tiny_model, "unet", dtype=torch.bfloat16).eval()
    rows = [value.bfloat16() for value in rows]
    base = halved(unet, rows).float()
    load_patch(unet, make_patch(direction=direction), "it")
    live = halved(unet, rows).float()
    fuse(unet)
    assert relative(halved(unet, rows).float(), live) < 0.3 * relative(live, base)


@pytest.mark.parametrize("scale", [(1.0,), (1, 2, 3), "ab", ("1", "0")])
def test_a_scale_is_a_number_or_a_pair(unet, make_patch, scale):
    with pytest.raises(ValueError, match="give a number, or a pair"):
        load_patch(unet, make_patch(), "it", scale)
    assert adapters.adapter_names(unet) == []


def test_batches_cut_apart_are_refused(unet, rows, make_patch):
    load_patch(unet, make_patch(direction="backward"))
    unet.enable_forward_chunking(dim=0)
    with pytest.raises(ValueError, match="call it with dim=1"), Halves(unet).rows(TWO, TWO):
        pass
    unet.enable_forward_chunking(dim=1)
    with Halves(unet).rows(TWO, TWO):
        pass
