"""Every sampler through the pipeline on the tiny model: draws, anchors, patches, memory, settings, and what cannot work."""

import itertools
import logging
from dataclasses import replace
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch

from trfpp.trf.settings import CFG_PLUS, SamplerSettings, resolve
from trfpp.trf.strategies import STRATEGIES
from trfpp.trf.two_unets import TwoUNets

SMALL = {"height": 32, "width": 48, "num_frames": 4, "num_inference_steps": 3, "output_type": "latent"}
OTHERS = ("trf++", "gi", "vibid", "mpd-seq", "mpd-par")


def picture(seed):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def run(pipe, name, seed=5, **more):
    generator = torch.Generator().manual_seed(seed)
    return pipe(picture(0), picture(1), sampler=name, generator=generator, **{**SMALL, **more})


def relative(one, other):
    return float((one - other).norm() / other.norm())


def test_the_same_seed_gives_the_same_bits_and_no_two_samplers_the_same_film(pipe):
    films = {name: run(pipe, name).frames for name in STRATEGIES if name != "trf-reference"}
    for name in OTHERS:
        assert torch.equal(run(pipe, name).frames, films[name])
        assert torch.isfinite(films[name]).all()
    names = list(films)
    assert all(relative(films[a], films[b]) > 1e-2 for a in names for b in names if a != b)


@pytest.mark.parametrize("name", ["trf++", "vibid", "mpd-seq"])
def test_first_and_last_frame_are_the_bounds(pipe, name):
    film = run(pipe, name).frames
    for number, frame in ((0, 0), (1, -1)):
        pixels = torch.from_numpy(np.array(picture(number))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        assert torch.allclose(film[:, frame], latents, atol=1e-5)


@pytest.mark.parametrize("name", ["vibid", "mpd-par"])
def test_rows_one_at_a_time_give_the_same_film(pipe, name):
    one, apart = run(pipe, name), run(pipe, name, low_memory=True)
    assert relative(apart.frames, one.frames) < 1e-4
    assert (apart.unet_calls, apart.unet_forwards) == (one.unet_calls, 2 * one.unet_calls)


def test_calls_are_those_of_the_plan_and_the_bar_counts_them(pipe, monkeypatch):
    bars, counted, usual = [], [], pipe.progress_bar

    def progress_bar(**told):
        bars.append(usual(**told))
        monkeypatch.setattr(bars[-1], "update", counted.append)
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    settings = {name: SamplerSettings(sampler=name, num_inference_steps=3) for name in OTHERS}
    for name in OTHERS:
        counted.clear()
        result = run(pipe, name)
        expected = sum({"fused": 2, "renoise": 0}.get(i.kind, 1) for i in STRATEGIES[name].plan(settings[name]))
        assert result.unet_calls == expected == bars[-1].total == sum(counted)
        assert (result.disagreement is None) == (name in ("vibid", "mpd-seq"))


def test_gi_rotates_by_itself_as_it_would_for_a_patch_that_asks_for_it(clean, make_patch, monkeypatch):
    own = run(clean, "gi").frames
    plain = {**STRATEGIES, "gi": replace(STRATEGIES["gi"], rotated=False)}
    monkeypatch.setattr("trfpp.trf.pipeline.STRATEGIES", plain)
    assert relative(run(clean, "gi").frames, own) > 1e-2
    clean.load_patch(make_patch(direction="both", rotated_attention=True, size=0.0), "still")
    assert relative(run(clean, "gi").frames, own) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_each_adapter_acts_on_its_own_direction(clean, make_patch, name):
    """Each of a pair matters; and where one direction is asked for alone, the other's adapter does nothing."""
    films, firsts = {}, {}

    def sample(what):
        def first(pipeline, iteration, timestep, tensors):
            firsts.setdefault(what, tensors["latents"])

        films[what] = run(clean, name, callback_on_step_end=first).frames

    sample("base")
    clean.load_patch(make_patch("pair", direction="both", size=0.1), "pair")
    sample("pair")
    for what, scales in (("forward", (1.0, 0.0)), ("backward", (0.0, 1.0))):
        clean.set_patches({"pair": scales})
        sample(what)
    for one, other in itertools.combinations(films, 2):
        assert relative(films[one], films[other]) > 1e-3
    if name not in ("gi", "trf++"):  # which begin with both; the others begin forward
        assert relative(firsts["forward"], firsts["pair"]) < 1e-6
        assert relative(firsts["backward"], firsts["base"]) < 1e-6
        assert relative(firsts["forward"], firsts["base"]) > 1e-4


def test_a_sampler_brings_its_own_settings_and_leaves_those_of_another_aside():
    card = {"sampler": "trf", "num_inference_steps": 40, "max_guidance_scale": 2.5, "fps": 11, "jump_n_sample": 1}
    settings, sources = resolve({}, card, {"num_frames": 14})
    assert (settings.num_inference_steps, sources["num_inference_steps"]) == (40, "patch card")
    settings, sources = resolve({"sampler": "vibid"}, card, {"num_frames": 14})
    assert (settings.num_inference_steps, sources["num_inference_steps"]) == (25, "sampler")
    assert (settings.max_guidance_scale, settings.fps, sources["fps"]) == (1.0, 11, "patch card")
    settings, _ = resolve({"sampler": "trf-reference"}, card, {})
    assert settings.num_inference_steps == 40
    settings, sources = resolve({"num_inference_steps": 7}, {"sampler": "gi", "max_guidance_scale": 1.5}, {})
    assert (settings.sampler, settings.num_inference_steps, settings.max_guidance_scale) == ("gi", 7, 1.5)
    assert (settings.min_guidance_scale, sources["min_guidance_scale"]) == (2.0, "sampler")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (
            {"sampler": "trf", "num_inference_steps": 40, "max_guidance_scale": 4.0},
            {"sampler": "vibid"},
            ("vibid", 25, 1),
        ),
        ({"sampler": "vibid"}, {"num_inference_steps": 7}, ("trf++", 7, 3)),
        ({"noise_aug_strength": 0.1}, {"sampler": "gi", "max_guidance_scale": 2.5}, ("gi", 50, 2.5)),
    ],
)
def test_of_several_cards_the_last_one_decides(clean, make_patch, first, last, expected):
    def decided():
        settings, _ = resolve({}, clean.recommended, clean.native)
        assert settings.noise_aug_strength == 0.02
        return settings.sampler, settings.num_inference_steps, settings.max_guidance_scale

    clean.load_patch(make_patch("first", sampler=first, fps=5.0), "first")
    clean.load_patch(make_patch("last", sampler=last), "last", 0.5)
    assert decided() == expected
    clean.set_patches({"last": 1.0, "first": 1.0})  # named in another order than loaded
    assert decided() == expected
    clean.set_patches(["first"])
    assert clean.recommended["fps"] == 5


def test_cfg_plus_has_one_scale_and_guides_unless_it_is_one(pipe):
    assert {name for name, strategy in STRATEGIES.items() if strategy.cfg_plus} == {*CFG_PLUS}
    short = partial(run, pipe, "vibid", num_inference_steps=1)
    usual = short().frames
    assert torch.equal(short(max_guidance_scale=1.0).frames, usual)
    for scale in (0.6, 2.0):
        made = short(max_guidance_scale=scale)
        assert (made.settings.min_guidance_scale, made.sources["min_guidance_scale"]) == (scale, "caller")
        assert relative(made.frames, usual) > 1e-3
        assert torch.equal(short(min_guidance_scale=scale).frames, made.frames)
    card = {"sampler": "mpd-seq", "min_guidance_scale": 0.8}
    settings, sources = resolve({}, card, {})
    assert (settings.max_guidance_scale, sources["max_guidance_scale"]) == (0.8, "patch card")
    settings, _ = resolve({"max_guidance_scale": 0.6}, card, {})
    assert (settings.min_guidance_scale, settings.max_guidance_scale) == (0.6, 0.6)
    with pytest.raises(
        ValueError, match=r"_scale=1, max_guidance_scale=2: sampler='mpd-par' has one scale .*; give one"
    ):
        resolve({"sampler": "mpd-par", "min_guidance_scale": 1, "max_guidance_scale": 2}, {}, {})


def test_without_a_word_it_is_ours():
    settings, sources = resolve({}, {}, {})
    assert (settings.sampler, sources["sampler"], settings.num_inference_steps) == ("trf++", "default", 12)
    settings, sources = resolve({}, {"sampler": "trf"}, {})
    assert (settings.sampler, sources["sampler"], settings.num_inference_steps) == ("trf", "patch card", 50)


def test_what_has_no_effect_is_said(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        run(pipe, "vibid", jump_length=3)
    assert "sampler=vibid has re-noising of its own, or none: jump_length is left aside." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(pipe, "vibid", min_guidance_sigma=4.0, num_inference_steps=2)
        run(pipe, "trf++", max_guidance_scale=1.0, max_guidance_sigma=5.0, num_inference_steps=2)
    said = [line for line in caplog.messages if "nothing is guided" in line]
    assert [line.split(": ")[1] for line in said] == [
        "nothing is guided, so min_guidance_sigma is left aside.",
        "nothing is guided, so max_guidance_sigma is left aside.",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(pipe, "trf++", max_guidance_scale=1.0, num_inference_steps=2)
        run(pipe, "vibid", max_guidance_scale=0.6, min_guidance_sigma=4.0, num_inference_steps=2)
    assert not caplog.messages


def test_what_cannot_work_is_refused(clean, make_patch, monkeypatch):
    with pytest.raises(ValueError, match="no low_memory"):
        run(clean, "gi", low_memory=True)
    with pytest.raises(ValueError, match="choose one of trf, trf\\+\\+, trf-reference, gi, vibid, mpd-seq, mpd-par"):
        run(clean, "ddim")
    clean.load_patch(make_patch(direction="both", rotated_attention=True), "rotated")
    with pytest.raises(ValueError, match="sampler='vibid' asks for one at a time; choose trf\\+\\+, trf or gi"):
        run(clean, "vibid")
    clean.unload_patches()
    monkeypatch.setattr(clean, "unet", TwoUNets(clean.unet, clean.unet))
    with pytest.raises(ValueError, match="this model has two"):
        run(clean, "gi")
