"""The pure functions: EDM's preconditioning and loss weight, fusion, re-noising."""

import diffusers
import pytest
import torch

from trfpp.trf.edm import denoised, log_normal_sigmas, loss_weight, preconditioning, step_towards
from trfpp.trf.fusion import disagreement, frame_guidance, fuse, linear_weights, renoise, reverse_time


def video(seed, frames=5):
    return torch.randn(2, frames, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_preconditioning_is_that_of_diffusers_scheduler():
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    scheduler.set_timesteps(6)
    x, v = video(0) * 9, video(1)
    for index, t in enumerate(scheduler.timesteps):
        sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        assert torch.allclose(preconditioning(sigma).c_noise, t)
        assert torch.allclose(preconditioning(sigma).c_in * x, scheduler.scale_model_input(x, t))
        ours = step_towards(x, denoised(x, v, sigma), sigma, sigma_next)
        assert torch.allclose(ours, scheduler.step(v, t, x).prev_sample, rtol=1e-4, atol=1e-4)


def test_loss_weight_makes_the_loss_the_error_of_v():
    # v* = (eps - sigma x0) / sqrt(1 + sigma^2) is the output that denoises exactly.
    x0, eps, wrong = video(0).double(), video(1).double(), video(2).double()
    for sigma in torch.tensor([0.01, 0.5, 2.0, 50.0], dtype=torch.float64):
        x = x0 + sigma * eps
        exact = (eps - sigma * x0) / (1 + sigma**2).sqrt()
        assert torch.allclose(denoised(x, exact, sigma), x0)
        weighted = loss_weight(sigma) * (denoised(x, exact + wrong, sigma) - x0) ** 2
        assert torch.allclose(weighted, wrong**2)


def test_training_noise_levels_have_svds_distribution():
    drawn = log_normal_sigmas((200_000,), 0.7, 1.6, torch.Generator().manual_seed(0)).log()
    assert drawn.mean() == pytest.approx(0.7, abs=0.02)
    assert drawn.std() == pytest.approx(1.6, abs=0.02)


def test_reversing_twice_is_identity_and_bounds_are_kept_by_fusion():
    forward, backward = video(0), video(1)
    assert torch.equal(reverse_time(reverse_time(forward)), forward)
    fused = fuse(forward, backward, linear_weights(5))
    assert torch.equal(fused[:, 0], forward[:, 0])
    assert torch.equal(fused[:, -1], backward[:, 0])
    assert torch.allclose(fuse(forward, reverse_time(forward), linear_weights(5)), forward)


def test_disagreement_is_relative_and_of_each_video():
    forward, backward = video(0), video(1)
    assert torch.equal(disagreement(forward, reverse_time(forward)), torch.zeros(len(forward)))
    # Of independent halves of one size the difference has the variance of both.
    many = disagreement(video(0, frames=500), video(1, frames=500))
    assert torch.allclose(many, torch.tensor(2**0.5), atol=0.03)
    assert torch.allclose(disagreement(7 * forward, 7 * backward), disagreement(forward, backward))
    assert torch.allclose(disagreement(backward, forward), disagreement(forward, backward))
    assert torch.allclose(disagreement(forward, 1.1 * reverse_time(forward)), torch.tensor(0.1), atol=0.01)
    together = disagreement(torch.cat([forward, forward]), torch.cat([backward, reverse_time(forward)]))
    assert torch.allclose(together, torch.cat([disagreement(forward, backward), torch.zeros(len(forward))]))


def test_guidance_rises_linearly_from_the_condition():
    assert frame_guidance(1, 3, 5).flatten().tolist() == [1, 1.5, 2, 2.5, 3]


def test_renoising_reaches_the_variance_of_the_level():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 64, 64, generator=generator) * 2
    noise = torch.randn(x.shape, generator=generator)
    assert renoise(x, torch.tensor(2.0), torch.tensor(5.0), noise).std() == pytest.approx(5, rel=0.02)


def test_fusing_estimates_is_fusing_steps():
    x, forward, backward, weights = video(0), video(1), video(2), linear_weights(5)
    sigma, lower = torch.tensor(3.0), torch.tensor(1.2)
    stepped = fuse(
        step_towards(x, forward, sigma, lower), step_towards(reverse_time(x), backward, sigma, lower), weights
    )
    assert torch.allclose(step_towards(x, fuse(forward, backward, weights), sigma, lower), stepped, atol=1e-6)
