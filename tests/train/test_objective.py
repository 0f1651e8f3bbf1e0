"""SVD's objective: the loss is the error of v, its gradient flows to the adapter, and the model sees what SVD is fed."""

from dataclasses import fields, replace

import pytest
import torch

from trfpp.train.data import Sample
from trfpp.train.objective import Objective, band_names, band_of, denoising_loss, fused_loss, predict, weighted_error
from trfpp.trf.adapters import adapter_parameters, inject
from trfpp.trf.attention import rotated_attention
from trfpp.trf.base import load_component
from trfpp.trf.fusion import reverse_time
from trfpp.trf.halves import Halves
from trfpp.trf.patch import inject_patch


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


@pytest.fixture
def both(batch):
    """The batch's clips as filmed and, under the same noise, reversed; with conditions of their own."""
    turned = replace(
        batch, latents=reverse_time(batch.latents), noise=reverse_time(batch.noise), condition=batch.condition.flip(1)
    )
    pair = [{f.name: getattr(one, f.name) for f in fields(one)} for one in (batch, turned)]
    joined = {name: torch.cat([pair[0][name], pair[1][name]]) for name in pair[0] if name not in ("backward", "number")}
    return Sample(**joined, backward=torch.tensor([False, False, True, True]), number=torch.tensor([7, 8]).repeat(2))


@pytest.fixture
def patched(tiny_model):
    """A UNet with a forward and a backward adapter that are not zero."""
    unet = load_component(tiny_model, "unet").eval()
    adapters = inject_patch(unet, "both", targets="temporal", rank=2, alpha=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (one for own in adapters.values() for one in own):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def gradients(unet):
    return {
        way: [None if one.grad is None else one.grad.clone() for one in adapter_parameters(unet, f"default/{way}")]
        for way in ("forward", "backward")
    }


def relative(some, others):
    one, other = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (some, others))
    return float((one - other).norm() / other.norm())


def test_the_fused_loss_is_that_of_the_samplers_mixture(both):
    clean, sigma = both.latents[:2], both.sigma[:2]
    shift = torch.arange(4.0).view(1, 4, 1, 1, 1)  # of 4 frames the forward estimate counts 1, 2/3, 1/3, 0
    losses = fused_loss(clean + shift, reverse_time(clean), clean, sigma)
    expected = weighted_error(clean + shift * torch.tensor([3, 2, 1, 0]).view(1, 4, 1, 1, 1) / 3, clean, sigma)
    torch.testing.assert_close(losses, expected)
    assert torch.allclose(fused_loss(clean, reverse_time(clean), clean, sigma), torch.zeros(2), atol=1e-6)


def test_the_total_mixes_denoising_and_fused_loss(patched, both):
    """Of two adapters the sum, so that without fusion each has the gradient it would have alone."""
    with Halves(patched).rows(2, 2):
        estimate, _ = predict(patched, both, torch.float32)
    rows = weighted_error(estimate, both.latents, both.sigma)
    fused = fused_loss(*estimate.chunk(2), both.latents[:2], both.sigma[:2])
    for share in (0.0, 0.3, 1.0):
        objective = Objective(direction="both", dtype=torch.float32, fusion=share)
        with objective.losses(patched, patched, both, 0) as losses:
            assert float(losses.total) == pytest.approx(
                float((1 - share) * (rows[:2].mean() + rows[2:].mean()) + share * fused.mean()), rel=1e-5
            )
        torch.testing.assert_close(losses.rows, rows.detach())
        torch.testing.assert_close(losses.fused, fused.detach())


@pytest.mark.parametrize("step", [0, 1])
def test_alternating_gives_the_gradient_of_one_direction(patched, both, step):
    share, trained, resting = 0.4, *(("backward", "forward") if step else ("forward", "backward"))
    objective = Objective(direction="both", dtype=torch.float32, fusion=share, alternate=True)
    with objective.losses(patched, patched, both, step) as losses:
        losses.total.backward()
    alternated = gradients(patched)
    assert all(one is None for one in alternated[resting])
    assert losses.backward.tolist() == [trained == "backward"] * 2

    patched.zero_grad()
    with Halves(patched).rows(2, 2):
        estimate, _ = predict(patched, both, torch.float32)
        halves = list(estimate.chunk(2))
        rows = weighted_error(estimate, both.latents, both.sigma).chunk(2)[step].mean()
        halves[1 - step] = halves[1 - step].detach()
        fused = fused_loss(*halves, both.latents[:2], both.sigma[:2]).mean()
        ((1 - share) * rows + share * fused).backward()
    assert relative(alternated[trained], gradients(patched)[trained]) < 1e-4
    torch.testing.assert_close(losses.fused.mean(), fused.detach())


def test_rotated_backward_rows_are_trained_and_forward_rows_only_guide(patched, both):
    objective = Objective(direction="backward", dtype=torch.float32, rotated=True)
    with objective.losses(patched, patched, both, 0) as losses:
        losses.total.backward()
    assert losses.backward.all()
    assert losses.numbers.tolist() == [7, 8]
    assert losses.fused is None
    with Halves(patched).rows(2, 2), rotated_attention(patched, 2, 2):
        rows = denoising_loss(patched, both)
    torch.testing.assert_close(losses.rows, rows[2:].detach())
    assert float(losses.total) == pytest.approx(float(rows[2:].mean()))
    found = gradients(patched)
    assert any(bool(one.any()) for one in found["backward"])
    assert not any(bool(one.any()) for one in found["forward"] if one is not None)
