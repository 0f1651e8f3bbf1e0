"""SVD's objective: the loss is the error of v, its gradient flows to the adapter, and the model sees what SVD is fed."""

import pytest
import torch

from trfpp.train.data import Sample
from trfpp.train.objective import band_names, band_of, denoising_loss, predict
from trfpp.trf.adapters import inject
from trfpp.trf.base import load_component


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return Sample(
        latents=normal(2, 4, 4, 8, 8),
        noise=normal(2, 4, 4, 8, 8),
        sigma=torch.tensor([0.2, 5.0]),
        condition=normal(2, 4, 8, 8),
        embedding=normal(2, 1, 32),
        added_time_ids=torch.tensor([[6.0, 127.0, 0.02], [16.0, 10.0, 0.05]]),
    )


def test_loss_is_the_plain_error_of_v(batch):
    """With weight (1 + sigma^2) / sigma^2 the loss is |v - v*|^2 for v* = (eps - sigma x0) / sqrt(1 + sigma^2)."""
    given = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    target = (batch.noise - sigma * batch.latents) / (1 + sigma**2).sqrt()
    losses = denoising_loss(lambda *args, **kwargs: (given,), batch)
    assert torch.allclose(losses, (given - target).square().mean(dim=(1, 2, 3, 4)), rtol=1e-4)


def test_the_model_is_fed_as_at_inference(batch):
    seen = {}

    def unet(sample, timestep, encoder_hidden_states, added_time_ids, return_dict):
        seen.update(sample=sample, timestep=timestep, context=encoder_hidden_states, ids=added_time_ids)
        return (sample[:, :, :4],)

    estimate, target = predict(unet, batch, torch.float32)
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    noisy = batch.latents + sigma * batch.noise
    assert torch.allclose(seen["sample"][:, :, :4], noisy / (sigma**2 + 1).sqrt())
    assert all(torch.equal(seen["sample"][:, frame, 4:], batch.condition) for frame in range(4))
    assert torch.allclose(seen["timestep"], batch.sigma.log() / 4)
    assert torch.equal(seen["context"], batch.embedding)
    assert torch.equal(seen["ids"], batch.added_time_ids)
    assert torch.equal(target, batch.latents)
    assert estimate.shape == batch.latents.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_a_float32_adapter(tiny_model, batch, dtype):
    unet = load_component(tiny_model, "unet", dtype=dtype)
    parameters = inject(unet, targets="temporal", rank=2, alpha=2)
    losses = denoising_loss(unet, batch, dtype)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    grads = [parameter.grad for parameter in parameters[1::2]]  # lora_B: lora_A's is zero at the start
    assert all(grad.dtype == torch.float32 and float(grad.abs().max()) > 0 for grad in grads)


def test_checkpointing_changes_no_gradient(tiny_model, batch):
    results = []
    for checkpointing in (False, True):
        unet = load_component(tiny_model, "unet")
        parameters = inject(unet, targets="temporal", rank=2, alpha=2)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        denoising_loss(unet, batch).mean().backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-8)


def test_bands_split_at_their_borders():
    assert band_of(torch.tensor([0.1, 0.5, 2.0, 5.0, 100.0])).tolist() == [0, 1, 2, 3, 4]
    assert band_names()[0] == "sigma 0 to 0.3"
    assert len(band_names()) == 5
