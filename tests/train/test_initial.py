"""First weights: the residual branches of fresh networks add nothing, and a convolution over time passes everything."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn

from trfpp.train.autoencoder import LOG_VARIANCE, make_autoencoder
from trfpp.train.base import make_unet
from trfpp.train.initial import identity, zero_residuals

BLOCKS = (ResnetBlock2D, TemporalResnetBlock, TransformerSpatioTemporalModel)


def branches(network, call):
    """Of every residual block in a forward: its name, and whether its branch added exactly nothing."""
    found = {}

    def watch(name):
        def hook(module, given, out):
            straight = given[0] if getattr(module, "conv_shortcut", None) is None else module.conv_shortcut(given[0])
            out = out[0] if isinstance(out, tuple) else out
            found[name] = torch.equal(out, straight)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, BLOCKS):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        call()
    return found


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unet():
    config = {"block_out_channels": (32, 32), "layers_per_block": 1, "context_dim": 16}
    return make_unet(config, latent_channels=4, latent_side=8, num_frames=3, seed=0)


@pytest.fixture
def autoencoder():
    return make_autoencoder({"block_out_channels": (32, 32), "latent_channels": 4}, 16, seed=0)


def call_unet(unet):
    return unet(noise(1, 3, 8, 8, 8), torch.tensor(1.0), noise(1, 1, 16), torch.ones(1, 3)).sample


def test_a_fresh_unets_branches_are_zero_and_so_is_its_answer(unet):
    found = branches(unet, lambda: call_unet(unet))
    kinds = {type(unet.get_submodule(name)) for name in found}
    assert kinds == set(BLOCKS)
    assert all(found.values()), [name for name, nothing in found.items() if not nothing]
    with torch.no_grad():
        answer = call_unet(unet)
    assert torch.equal(answer, unet.conv_out.bias.view(1, 1, -1, 1, 1).expand_as(answer))


def test_a_fresh_autoencoders_branches_are_zero(autoencoder):
    def call():
        autoencoder.decode(autoencoder.encode(noise(2, 3, 16, 16)).latent_dist.mode(), num_frames=2)

    found = branches(autoencoder, call)
    assert {name.split(".")[0] for name in found} == {"encoder", "decoder"}
    assert all(found.values()), [name for name, nothing in found.items() if not nothing]


def test_zeroing_touches_the_last_layers_only():
    from diffusers import UNetSpatioTemporalConditionModel

    plain = UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 32), num_attention_heads=(1, 1), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, cross_attention_dim=16, layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
    )  # fmt: skip
    before = {name: value.clone() for name, value in plain.named_parameters()}
    zero_residuals(plain)
    changed = {name for name, value in plain.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.split(".")[-2] in ("conv2", "proj_out")}
    assert all(not value.any() for name, value in plain.named_parameters() if name in changed)


def test_identity_passes_everything_through():
    convolution = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))
    x = noise(2, 3, 5, 4, 4)
    assert not torch.allclose(convolution(x), x)
    identity(convolution)
    assert torch.equal(convolution(x), x)


def test_a_fresh_decoder_does_not_mix_frames_at_its_end(autoencoder):
    seen = []
    autoencoder.decoder.time_conv_out.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        autoencoder.decode(noise(3, 4, 8, 8), num_frames=3)
    (given, out) = seen[0]
    assert torch.equal(given, out)


def test_a_fresh_posterior_has_the_small_variance(autoencoder):
    with torch.no_grad():
        posterior = autoencoder.encode(noise(2, 3, 16, 16)).latent_dist
    assert torch.equal(posterior.logvar, torch.full_like(posterior.mean, LOG_VARIANCE))
    assert posterior.mean.std() > 0.01


def test_weights_depend_on_the_seed_alone():
    config = {"block_out_channels": (32,), "latent_channels": 4}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = make_autoencoder(config, 16, seed=0).encoder.conv_in.weight
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(make_autoencoder(config, 16, seed=0).encoder.conv_in.weight, one)
    assert not torch.equal(make_autoencoder(config, 16, seed=1).encoder.conv_in.weight, one)
