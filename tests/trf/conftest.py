"""What the tests of adapters share: the tiny UNet's answer to one fixed input."""

import pytest
import torch


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
