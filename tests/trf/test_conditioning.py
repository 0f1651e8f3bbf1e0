"""What the model is told of a bound, against what diffusers' own SVD pipeline tells it."""

from pathlib import Path

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline

from trfpp.trf.base import load_component
from trfpp.trf.conditioning import encode_clip, encode_condition, encode_posterior, micro_conditioning, upcast


@pytest.fixture(scope="module")
def stock():
    return StableVideoDiffusionPipeline.from_pretrained(Path(__file__).parents[1] / "golden" / "model")


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 255, (250, 300, 3), dtype=np.uint8))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", [(300, 250), (500, 128), (40, 24)])
def test_clip_embedding_is_that_of_the_stock_pipeline(stock, image, size):
    image = image.resize(size)
    theirs = stock._encode_image(image, "cpu", 1, False)
    ours = encode_clip(as_tensor(image), stock.image_encoder, stock.feature_extractor)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_condition_is_the_unscaled_mode(stock, image):
    pixels = as_tensor(image.resize((48, 32))) * 2 - 1
    theirs = stock._encode_vae_image(pixels, "cpu", 1, False)
    assert torch.equal(encode_condition(pixels, stock.vae), theirs)


def test_posterior_does_not_depend_on_the_chunk(stock):
    frames = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for one, other in zip(encode_posterior(frames, stock.vae, 2), encode_posterior(frames, stock.vae, 5)):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vae_encodes_in_float32_and_comes_back(tiny_model, dtype):
    vae = load_component(tiny_model, "vae", dtype=dtype)
    same_weights = load_component(tiny_model, "vae", dtype=dtype).float()
    frames = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(encode_condition(frames, vae), encode_condition(frames, same_weights))
    assert vae.dtype == dtype
    vae.register_to_config(force_upcast=False)
    with upcast(vae):
        assert vae.dtype == dtype


def test_an_offloaded_vae_encodes_where_the_images_are(tiny_model):
    """The weights lie elsewhere until the VAE is called; the meta device stands for the GPU they then move to."""
    vae = load_component(tiny_model, "vae")
    accelerate.cpu_offload_with_hook(vae, execution_device="meta")
    assert encode_condition(torch.zeros(1, 3, 32, 48, device="meta"), vae).is_meta


def test_fps_is_given_less_one():
    assert micro_conditioning(7, 127, 0.02, 2).tolist() == [[6.0, 127.0, pytest.approx(0.02)]] * 2
    ids = micro_conditioning(torch.tensor([7.0, 25.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]), 2)
    assert ids[:, 0].tolist() == [6.0, 24.0]
