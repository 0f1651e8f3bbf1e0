"""What these tests share: the tiny model as a pipeline, and its UNet's answer to one fixed input."""

import pytest
import torch

from trfpp import TimeReversalFusionPipeline


@pytest.fixture(scope="module")
def pipe(tiny_model):
    """The tiny model; not for tests that load patches."""
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def clean(pipe):
    """The same, without patches again afterwards."""
    yield pipe
    pipe.unload_patches()


@pytest.fixture
def output():
    """Calls a UNet of the tiny model on 8 frames, always the same."""

    def call(unet):
        generator = torch.Generator().manual_seed(0)
        return unet(
            torch.randn(1, 4, 8, 8, 8, generator=generator),
            torch.tensor(0.3),
            torch.randn(1, 1, 32, generator=generator),
            torch.tensor([[6.0, 127.0, 0.02]]),
        ).sample

    return call
