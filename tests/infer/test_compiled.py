"""Compiled blocks sample as others do, in whole graphs that are made once; a record repeats them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from trfpp.configs.schema import InferConfig
from trfpp.infer.models import load_pipeline
from trfpp.infer.record import recipe


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled, without a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    return counters


def config(model, patches, **more):
    return InferConfig(
        model=str(model), output=Path("out"), start=Path("a.png"), end=Path("b.png"), patches=patches, **more
    )


@pytest.mark.parametrize(("direction", "fuse"), [(None, False), ("forward", False), ("both", False), ("both", True)])
def test_blocks_are_whole_graphs_made_once(tiny_model, make_patch, graphs, direction, fuse):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    bounds = [Image.fromarray(image) for image in pixels]
    patches = [] if direction is None else [make_patch(seed=1, direction=direction)]

    def videos(compile):
        pipe = load_pipeline(config(tiny_model, patches, compile=compile, fuse=fuse))
        pipe.set_progress_bar_config(disable=True)
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            yield pipe(
                *bounds,
                height=32,
                width=48,
                num_frames=4,
                num_inference_steps=2,
                generator=generator,
                output_type="latent",
            ).frames

    usual = list(videos(False))
    assert not graphs["frames"]
    compiled = videos(True)
    first = next(compiled)
    made = dict(graphs["frames"])
    assert made["ok"] == made["total"] > 0
    assert not graphs["graph_break"]
    second = next(compiled)
    assert dict(graphs["frames"]) == made  # for the next pair nothing is compiled anew
    torch.testing.assert_close(first, usual[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, usual[1], rtol=1e-4, atol=1e-4)


def test_it_is_on_record_where_it_was_used(tiny_model):
    """A record from before there was the setting stands for a result without it."""
    from trfpp.trf.settings import SamplerSettings

    def recorded(**more):
        return recipe(config(tiny_model, [], **more), {}, SamplerSettings(), 0, [])["config"]

    assert recorded(compile=True) == {**recorded(), "compile": True}
