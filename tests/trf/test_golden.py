"""The sampler against outputs of TRF's official code (tests/golden/README.md says how they were made)."""

import json
from pathlib import Path

import PIL.Image
import pytest
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4


def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def run(pipe, name, sampler, **kwargs):
    settings, case = load(name)
    return pipe(
        PIL.Image.fromarray(case["start_image"].numpy()),
        PIL.Image.fromarray(case["end_image"].numpy()),
        latents=case["init_latents"],
        aug_noise=case["aug_noise"],
        renoise_noise=case.get("renoise"),
        sampler=sampler,
        output_type="latent",
        **settings,
        **kwargs,
    ).frames, case


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", ["plain", "loop", "renoise", "renoise_twice"])
def test_reference_sampler_reproduces_the_release(pipe, name):
    ours, case = run(pipe, name, "trf-reference")
    assert relative(ours, case["final_latents"]) <= TOLERANCE


def test_reference_sampler_follows_every_iteration(pipe):
    seen = []
    _, case = run(pipe, "renoise", "trf-reference", callback_on_step_end=lambda p, i, t, kw: seen.append(kw["latents"]))
    assert len(seen) == len(case["trace"])
    assert max(relative(ours, theirs) for ours, theirs in zip(seen, case["trace"])) <= TOLERANCE


def test_mended_scaling_differs_from_the_release_as_documented(pipe):
    ours, case = run(pipe, "renoise", "trf")
    assert relative(ours, case["final_latents"]) == pytest.approx(5.8e-2, abs=0.1e-2)


def test_mended_and_reference_agree_where_nothing_is_renoised(pipe):
    ours, case = run(pipe, "plain", "trf")
    assert relative(ours, case["final_latents"]) <= TOLERANCE
