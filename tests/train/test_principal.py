"""The best low-rank product for a weight: as good as the whole decomposition's, of any layer, seeded, at any scale."""

import pytest
import torch

from trfpp.train.principal import most_rank, principal_factors, product


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def best_error(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (64, 12, 3, 3), (24, 24, 3, 1, 1)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_a_spectrum_that_falls_is_taken_as_by_the_whole_decomposition(shape, rank):
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator()).flatten(1), full_matrices=False)
    weight = ((u * s * 0.8 ** torch.arange(len(s))) @ v).view(shape)
    a, b = principal_factors(weight, rank, 0.25, generator(1))
    assert a.shape == (rank, *shape[1:])
    assert b.shape == (shape[0], rank, *[1] * (len(shape) - 2))
    error = float((weight - 0.25 * product(a, b)).norm())
    assert error == pytest.approx(best_error(weight.flatten(1), rank), rel=1e-4, abs=1e-4)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-4)


def test_of_noise_nearly_as_much_is_taken():
    weight = torch.randn(512, 384, generator=generator())
    a, b = principal_factors(weight, 16, 1.0, generator(1))
    whole = torch.linalg.svdvals(weight)[:16].square().sum()
    assert 0.95 < float(product(a, b).square().sum() / whole) < 1.0


def test_half_precision_is_decomposed_in_float32_and_draws_are_the_generators():
    weight = torch.randn(64, 48, generator=generator()).to(torch.bfloat16)
    one, same = (principal_factors(weight, 4, 2.0, generator(3)) for _ in range(2))
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(one, same))
    assert not torch.equal(one[0], principal_factors(weight, 4, 2.0, generator(4))[0])


def test_zero_has_no_principal_part():
    assert principal_factors(torch.zeros(8, 8), 2, 1.0, generator()) is None


def test_most_rank_is_that_of_the_matrix():
    assert most_rank(torch.empty(40, 3, 3, 3)) == 27
    assert most_rank(torch.empty(8, 100)) == 8
