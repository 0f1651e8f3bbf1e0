"""Two UNets as one: every row as the UNet of its direction gives it, told by `Halves.rows`; the pipeline loads a folder of two."""

import PIL.Image
import pytest
import torch

from trfpp import TimeReversalFusionPipeline
from trfpp.trf.base import load_component
from trfpp.trf.halves import Halves
from trfpp.trf.two_unets import BACKWARD_FOLDER, TwoUNets

FORWARD, BACKWARD = slice(0, 1), slice(1, 4)
"""Rows of either direction."""


@pytest.fixture
def unets(tiny_model):
    one, other = (load_component(tiny_model, "unet").eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return one, other


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(4, *shape, generator=generator)

    return [normal(3, 8, 8, 12), normal(), normal(1, 32), 20 * normal(3).abs()]


@torch.no_grad()
@pytest.mark.parametrize("timestep", ["of each row", "of all"])
def test_one_call_equals_two(unets, rows, timestep):
    if timestep == "of all":
        rows[1] = torch.tensor(0.7)
    both = TwoUNets(*unets)
    with Halves(both).rows(1, 3):
        together = both(*rows).sample
        assert torch.equal(both(*rows, return_dict=False)[0], together)
    for unet, chosen in zip(unets, (FORWARD, BACKWARD)):
        part = unet(*(tensor[chosen] if tensor.ndim else tensor for tensor in rows)).sample
        assert torch.equal(together[chosen], part)
    assert not torch.allclose(unets[0](*rows).sample[BACKWARD], together[BACKWARD], rtol=0.01)


@torch.no_grad()
def test_rows_of_one_direction_need_one_unet(unets, rows):
    both = TwoUNets(*unets)
    with Halves(both).rows(0, 4):
        assert torch.equal(both(*rows).sample, unets[1](*rows).sample)


def test_it_must_be_told_the_rows(unets, rows):
    both = TwoUNets(*unets)
    with Halves(both).rows(1, 3):
        pass
    with pytest.raises(RuntimeError, match=r"inside `Halves\.rows`"):
        both(*rows)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_pipeline_samples_each_half_with_its_own(tiny_model, unets, tmp_path, low_memory):
    """Equal UNets give what one of them gives; with another backward UNet the video is another."""
    bound = PIL.Image.new("RGB", (32, 32), "teal"), PIL.Image.new("RGB", (32, 32), "coral")

    def sample(model):
        pipe = TimeReversalFusionPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        made = pipe(
            *bound, height=32, width=32, num_frames=3, num_inference_steps=2, generator=generator,
            output_type="latent", low_memory=low_memory,
        )  # fmt: skip
        return pipe, made.frames

    plain, one = sample(tiny_model)
    for name, backward in zip(("same", "other"), unets):
        plain.save_pretrained(tmp_path / name)
        backward.save_pretrained(tmp_path / name / BACKWARD_FOLDER)
    pipe, same = sample(tmp_path / "same")
    assert isinstance(pipe.unet, TwoUNets)
    assert float((same - one).norm() / one.norm()) < 1e-4
    _, other = sample(tmp_path / "other")
    assert float((other - one).norm() / one.norm()) > 0.01


def test_a_variant_is_that_of_both(tiny_model, tmp_path):
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    pipe.save_pretrained(tmp_path, variant="fp16")
    pipe.unet.save_pretrained(tmp_path / BACKWARD_FOLDER, variant="fp16")
    assert isinstance(TimeReversalFusionPipeline.from_pretrained(tmp_path, variant="fp16").unet, TwoUNets)


def test_patches_are_for_one_unet(tiny_model, unets, make_patch):
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    pipe.register_modules(unet=TwoUNets(*unets))
    with pytest.raises(ValueError, match="patches are for models with one"):
        pipe.load_patch(make_patch())
