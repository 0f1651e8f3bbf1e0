"""What the tests share: real classes at tiny sizes, never stand-ins."""

import inspect
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(
    1
)  # at these sizes more are no faster, and test processes that share the cores wait for each other
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """The miniature is built into a folder of the test run's own."""
    if "TRFPP_CACHE" not in os.environ:
        os.environ["TRFPP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model():
    """Folder of a random-weight SVD of 0.64 M UNet parameters; see tests/golden/README.md."""
    return GOLDEN / "model"


@pytest.fixture
def make_patch(tiny_model, tmp_path):
    """Writes patches for the tiny model whose update is not zero, and returns their folders."""
    from trfpp.trf.base import essential_config, fingerprint, load_component
    from trfpp.trf.patch import PatchCard, inject_patch, patch_files, save_patch
    from trfpp.trf.variants import adapter_config

    known = set(inspect.signature(adapter_config).parameters)

    def make(name="patch", *, seed=1, size=0.3, **settings):
        unet = load_component(tiny_model, "unet")
        adapter = {"targets": "temporal", "rank": 4, "alpha": 8.0}
        adapter |= {key: settings.pop(key) for key in known & settings.keys()}
        card = settings
        own = inject_patch(unet, card.get("direction", "forward"), seed=seed, **adapter)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (one for parameters in own.values() for one in parameters):
                if not parameter.any():  # the factor that keeps the update at zero
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        defaults = {
            "trfpp_version": "0",
            "base_model": str(tiny_model),
            "unet_fingerprint": fingerprint(unet.config),
            "unet_config": essential_config(unet.config),
            "height": 32,
            "width": 48,
            "num_frames": 4,
            "fps": 9.0,
        }
        made = PatchCard(**{**defaults, **card})
        save_patch(tmp_path / name, patch_files(unet, made.direction), made)
        return tmp_path / name

    return make
