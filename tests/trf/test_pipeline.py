"""The pipeline as people use it: loading, settings and their sources, batches, generators, outputs, callbacks, errors."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from trfpp import TimeReversalFusionPipeline
from trfpp.trf.adapters import active_scales, add_adapter, inject, lora_layers
from trfpp.trf.attention import rotated_attention
from trfpp.trf.base import load_component
from trfpp.trf.images import as_rgb
from trfpp.trf.settings import SamplerSettings

SMALL = {
    "sampler": "trf",
    "height": 32,
    "width": 48,
    "num_frames": 4,
    "num_inference_steps": 3,
    "jump_length": 1,
    "repeat_step_ratio": 0.3,
}


def picture(seed, size=(48, 32)):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def latents(pipe, *args, **kwargs):
    return pipe(*args, **{**SMALL, **kwargs}, output_type="latent").frames


def relative(one, other):
    return float((one - other).norm() / other.norm())


def test_same_seed_same_bits_and_another_seed_differs(pipe):
    one, two = (latents(pipe, picture(0), picture(1), generator=seeded(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, latents(pipe, picture(0), picture(1), generator=seeded(6)))


def test_the_global_random_stream_is_neither_read_nor_moved(pipe):
    torch.manual_seed(0)
    one = latents(pipe, picture(0), picture(1), generator=seeded(5))
    after = torch.randn(2)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(2), after)
    torch.manual_seed(1)
    assert torch.equal(latents(pipe, picture(0), picture(1), generator=seeded(5)), one)


def test_low_memory_gives_the_same_video_in_more_calls(pipe):
    arguments = {**SMALL, "output_type": "latent"}
    one = pipe(picture(0), picture(1), generator=seeded(5), **arguments)
    four = pipe(picture(0), picture(1), generator=seeded(5), low_memory=True, **arguments)
    assert relative(four.frames, one.frames) < 1e-4
    assert four.unet_forwards == 4 * one.unet_forwards
    assert four.unet_calls == one.unet_calls == 2 * one.unet_forwards


def test_a_pair_does_not_depend_on_its_batch(pipe):
    pairs = [(picture(0), picture(1)), (picture(2), picture(3))]
    together = latents(pipe, *map(list, zip(*pairs)), generator=[seeded(1), seeded(2)])
    for row, (pair, seed) in enumerate(zip(pairs, (1, 2))):
        assert relative(together[row : row + 1], latents(pipe, *pair, generator=seeded(seed))) < 1e-4


def test_several_videos_a_pair(pipe):
    frames = latents(pipe, picture(0), picture(1), num_videos_per_prompt=2, generator=[seeded(1), seeded(2)])
    assert frames.shape[0] == 2
    assert relative(frames[:1], latents(pipe, picture(0), picture(1), generator=seeded(1))) < 1e-4
    assert relative(frames[1:], frames[:1]) > 1e-2


def test_swapping_the_bounds_reverses_the_video(pipe):
    """With the noise reversed too: nothing in the method prefers a direction but the model."""
    noise, aug = torch.randn(1, 4, 4, 16, 24, generator=seeded(0)), torch.randn(1, 3, 32, 48, generator=seeded(1))
    still = {"jump_n_sample": 1, "aug_noise": aug}
    one = latents(pipe, picture(0), picture(1), latents=noise, **still)
    other = latents(pipe, picture(1), picture(0), latents=noise.flip(1), **still)
    assert relative(other.flip(1), one) < 1e-4


def test_output_types(pipe):
    arguments = {**SMALL, "num_inference_steps": 1}
    results = {
        kind: pipe(picture(0), picture(1), generator=seeded(0), output_type=kind, **arguments).frames
        for kind in ("pil", "np", "pt", "latent")
    }
    assert len(results["pil"]) == 1
    assert [image.size for image in results["pil"][0]] == [(48, 32)] * 4
    assert results["np"].shape == (1, 4, 32, 48, 3)
    assert results["pt"].shape == (1, 4, 3, 32, 48)
    assert results["latent"].shape == (1, 4, 4, 16, 24)
    assert np.allclose(results["np"], results["pt"].permute(0, 1, 3, 4, 2).numpy())
    assert np.abs(np.asarray(results["pil"][0][2]) / 255 - results["np"][0, 2]).max() < 0.5 / 255 + 1e-6
    assert 0 <= results["np"].min() <= results["np"].max() <= 1


def test_a_chunk_is_decoded_with_its_neighbours(pipe):
    """All of them, and the frames are those of one decoding; none, and each is the frame alone, as in the release."""
    arguments = {**SMALL, "num_inference_steps": 1, "decode_chunk_size": 1}
    latent = latents(pipe, picture(0), picture(1), generator=seeded(0), **arguments)
    whole = pipe.decode_latents(latent, 4)[0] / 2 + 0.5
    near, apart = (
        pipe(picture(0), picture(1), generator=seeded(0), **{**arguments, "sampler": sampler}, output_type="pt").frames[
            0
        ]
        for sampler in ("trf", "trf-reference")
    )
    for frame in range(4):
        alone = pipe.decode_latents(latent[:, frame : frame + 1], 1)[0, 0] / 2 + 0.5
        assert torch.allclose(apart[frame], alone.clamp(0, 1), atol=1e-5)
    assert torch.allclose(pipe.decode_latents(latent, 1, overlap=3)[0] / 2 + 0.5, whole, atol=1e-5)
    assert (near - whole.clamp(0, 1)).abs().mean() < 0.5 * (apart - whole.clamp(0, 1)).abs().mean()


def test_without_guidance_there_is_no_unconditional_half(pipe):
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    latents(pipe, picture(0), picture(1), max_guidance_scale=1.0, generator=seeded(0))
    latents(pipe, picture(0), picture(1), generator=seeded(0))
    handle.remove()
    assert set(rows) == {2, 4}


def test_callback_sees_and_may_replace_the_latents(pipe):
    seen = []

    def callback(pipeline, iteration, timestep, tensors):
        seen.append((iteration, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = latents(pipe, picture(0), picture(1), generator=seeded(0), callback_on_step_end=callback)
    assert torch.equal(result, torch.zeros_like(result))
    assert [iteration for iteration, _ in seen] == list(range(len(seen)))
    assert len(seen) > SMALL["num_inference_steps"]
    seen.clear()  # of a sampler that goes back from where no noise is left
    latents(pipe, picture(0), picture(1), sampler="vibid", generator=seeded(0), callback_on_step_end=callback)
    timesteps = [timestep for _, timestep in seen]
    assert len({*timesteps[-3:]}) == 1
    assert timesteps[-1] == min(timesteps) < max(timesteps)


def test_settings_come_from_caller_then_card_then_model_then_release(clean, make_patch, caplog):
    bare = clean(picture(0), picture(1), height=32, width=48, num_inference_steps=1, output_type="latent")
    assert (bare.settings.num_frames, bare.sources["num_frames"]) == (14, "model")
    assert (bare.settings.fps, bare.sources["fps"]) == (7, "default")
    motion = {"clips": 3, "score_median": 1, "score_p10": 0, "score_p90": 2, "motion_bucket_median": 61.0}
    clean.load_patch(make_patch(motion=motion, sampler={"num_inference_steps": 2, "jump_n_sample": 1}), "it")
    with caplog.at_level(logging.INFO):
        result = clean(picture(0), picture(1), fps=11, output_type="latent")
    expected = {"height": 32, "width": 48, "num_frames": 4, "motion_bucket_id": 61.0, "num_inference_steps": 2}
    assert {name: getattr(result.settings, name) for name in expected} == expected
    assert {result.sources[name] for name in expected} == {"patch card"}
    assert (result.settings.fps, result.sources["fps"]) == (11, "caller")
    assert "motion_bucket_id=61.0" in caplog.text


def test_patches_change_the_video_and_go_away_without_a_trace(clean, make_patch):
    base = latents(clean, picture(0), picture(1), generator=seeded(0))
    clean.load_patch(make_patch("a.b"), scale=0.5)
    assert list(clean.cards) == ["a_b"]
    half = latents(clean, picture(0), picture(1), generator=seeded(0))
    clean.set_patches(["a_b"])
    full = latents(clean, picture(0), picture(1), generator=seeded(0))
    assert min(relative(half, base), relative(full, half)) > 1e-3
    clean.fuse_patches()
    fused = latents(clean, picture(0), picture(1), generator=seeded(0))
    assert relative(fused, full) < 1e-3
    with pytest.raises(ValueError, match="unfuse_patches"):
        clean.unload_patches()
    clean.unfuse_patches()
    clean.unload_patches()
    assert clean.cards == {}
    assert relative(latents(clean, picture(0), picture(1), generator=seeded(0)), base) < 1e-3


@pytest.fixture
def apart(tiny_model, monkeypatch):
    """Makes a pipeline's UNet call two others in its place: one on the forward rows, one on the backward rows."""

    def use(pipe, folder, pairs, guidance):
        halves = [load_component(tiny_model, "unet").eval() for _ in range(2)]
        for unet, part in zip(halves, ("forward", "backward")):
            state = load_file(folder / part / "adapter_model.safetensors")
            add_adapter(unet, LoraConfig.from_pretrained(str(folder / part)), state, "it")

        def forward(sample, timestep, context, added_time_ids, return_dict):
            assert len(sample) == 2 * pairs * (2 if guidance else 1)
            parts = zip(halves, *(rows.chunk(2) for rows in (sample, context, added_time_ids)))
            return (torch.cat([unet(own, timestep, *told, return_dict=False)[0] for unet, own, *told in parts]),)

        monkeypatch.setattr(pipe.unet, "forward", forward)

    return use


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("low_memory", [False, True])
def test_each_adapter_acts_on_its_own_half(clean, make_patch, apart, guidance, low_memory):
    folder = make_patch(direction="both", size=0.1)
    pairs = [picture(0), picture(1)], [picture(2), picture(3)]
    draws = dict(generator=[seeded(i) for i in range(2)], max_guidance_scale=guidance)
    base = latents(clean, *pairs, **draws)
    clean.load_patch(folder)
    draws["generator"] = [seeded(i) for i in range(2)]
    ours = latents(clean, *pairs, low_memory=low_memory, **draws)
    clean.unload_patches()
    apart(clean, folder, 2, guidance > 1)
    draws["generator"] = [seeded(i) for i in range(2)]
    theirs = latents(clean, *pairs, **draws)
    assert relative(ours, theirs) < 1e-5
    assert relative(base, theirs) > 1e-2


def test_swapping_bounds_and_adapters_reverses_the_video(clean, make_patch):
    noise, aug = torch.randn(1, 4, 4, 16, 24, generator=seeded(0)), torch.randn(1, 3, 32, 48, generator=seeded(1))
    still = {"jump_n_sample": 1, "aug_noise": aug}
    folder = make_patch("it", direction="both")
    clean.load_patch(folder)
    one = latents(clean, picture(0), picture(1), latents=noise, **still)
    unswapped = latents(clean, picture(1), picture(0), latents=noise.flip(1), **still)
    clean.unload_patches()
    (folder / "forward").rename(folder / "aside")
    (folder / "backward").rename(folder / "forward")
    (folder / "aside").rename(folder / "backward")
    clean.load_patch(folder)
    other = latents(clean, picture(1), picture(0), latents=noise.flip(1), **still)
    assert relative(other.flip(1), one) < 1e-4
    assert relative(unswapped.flip(1), one) > 1e-2


def test_scales_are_for_the_halves_a_patch_is_meant_for(clean, make_patch):
    folders = {way: make_patch(way, direction=way) for way in ("forward", "backward", "both", "either")}
    for way, folder in folders.items():
        clean.load_patch(folder, f"a {way} patch", 0.5)
    expected = {"forward": (0.5, 0.5), "backward": (0, 0.5), "both": (0.5, 0.5), "either": (0.5, 0.5)}
    assert clean.patch_scales == {f"a {way} patch": pair for way, pair in expected.items()}
    pairs = {f"a {way} patch": (1, 0.25) for way in folders}
    clean.set_patches(pairs)
    assert clean.patch_scales == pairs
    assert clean.recommended["fps"] == 9
    clean.set_patches(["a backward patch", "a both patch"])
    assert clean.patch_scales == {"a backward patch": (0, 1), "a both patch": (1, 1)}
    clean.load_patch(folders["either"], "v1.5")
    clean.set_patches({"v1.5": 0.5})
    assert clean.patch_scales == {"v1_5": (0.5, 0.5)}
    clean.unload_patches(["v1.5"])
    clean.set_patches(["a backward patch", "a both patch"])
    live = latents(clean, picture(0), picture(1), generator=seeded(0))
    clean.fuse_patches()
    assert clean.patch_scales == {"a backward patch": (0, 1), "a both patch": (1, 1)}
    assert relative(latents(clean, picture(0), picture(1), generator=seeded(0)), live) < 1e-4
    clean.unfuse_patches()
    with pytest.raises(
        ValueError, match=r"no patch named 'other' is loaded; there are: a forward patch, a backward .*"
    ):
        clean.set_patches({"other": 1.0})
    clean.unload_patches(["a both patch"])
    assert clean.patch_scales == {"a backward patch": (0, 1)}
    clean.set_patches({"a either patch": (2, 2)})
    clean.fuse_patches()
    clean.unfuse_patches()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pair_may_have_its_own_fps_and_motion(pipe, guidance):
    """What the UNet is told is looked at: this small model hardly heeds it."""
    pairs = [picture(0), picture(2)], [picture(1), picture(3)]
    told, own = [], torch.tensor([[4, 30, 0.02]] * 2 + [[20.5, 200, 0.02]] * 2)
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_time_ids"]), with_kwargs=True
    )
    arguments = {**SMALL, "max_guidance_scale": guidance, "num_videos_per_prompt": 2, "output_type": "latent"}
    result = pipe(*pairs, **arguments, fps=[5, 21.5], motion_bucket_id=(30, 200.0), generator=seeded(0))
    plain = pipe(
        *pairs, **arguments, fps=np.float32(21.5), motion_bucket_id=torch.tensor([200, 200]), generator=seeded(0)
    )
    handle.remove()
    assert torch.equal(told[0], own.repeat(4 if guidance > 1 else 2, 1))
    assert torch.equal(told[-1], own[-1:].expand(len(told[0]), -1))
    assert [(each.fps, each.motion_bucket_id) for each in result.pair_settings] == [(5, 30), (21.5, 200)]
    assert result.settings == result.pair_settings[0]
    assert {result.sources["fps"], result.sources["motion_bucket_id"]} == {"caller"}
    assert plain.pair_settings == [plain.settings] * 2


def test_guidance_is_done_at_some_noise_levels_only(pipe):
    """Steps outside of the interval have half of the rows; a level on its end is inside."""
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    arguments = dict(sampler="trf++", num_inference_steps=4)
    sigmas = pipe.noise_levels(SamplerSettings(**{**SMALL, "num_inference_steps": 4}), torch.device("cpu"))[1].tolist()

    def made(**guidance):
        rows.clear()
        return latents(pipe, picture(0), picture(1), **{**arguments, "generator": seeded(0), **guidance}), [*rows]

    free, calls = made(max_guidance_scale=1.0)
    assert calls == [2] * 4
    everywhere, calls = made(min_guidance_sigma=0.0, max_guidance_sigma=1000.0)
    assert calls == [4] * 4
    inside, calls = made(min_guidance_sigma=sigmas[2], max_guidance_sigma=sigmas[1])
    assert calls == [2, 4, 4, 2]
    nowhere, calls = made(min_guidance_sigma=sigmas[0] * 2, max_guidance_sigma=sigmas[0] * 3)
    assert calls == [2] * 4
    with pytest.raises(ValueError, match="nothing would be guided"):
        made(min_guidance_sigma=30.0)  # the largest stays at the sampler's own
    handle.remove()
    assert torch.equal(nowhere, free)
    assert not torch.equal(inside, free)
    assert not torch.equal(inside, everywhere)


@pytest.mark.parametrize(
    ("direction", "kind"), [("forward", "lora"), ("both", "lora"), ("both", "dora"), ("forward", "lokr")]
)
def test_patches_are_as_strong_as_a_schedule_says(clean, make_patch, direction, kind):
    pipe = clean
    pipe.load_patch(make_patch(direction=direction, kind=kind), "one", 0.7)
    scaling = [dict(layer.scaling) for _, layer in lora_layers(pipe.unet)]
    scales = active_scales(pipe.unet)
    sigmas = pipe.noise_levels(SamplerSettings(**SMALL), torch.device("cpu"))[1].tolist()

    def made(*points):
        return latents(pipe, picture(0), picture(1), patch_schedule=points, generator=seeded(0))

    usual, halved, none = made(), made((1.0, 0.5)), made((1.0, 0.0))
    mostly, first = made((sigmas[1] * 0.999, 0.0), (sigmas[1], 1.0)), made((sigmas[0] * 0.999, 0.0), (sigmas[0], 1.0))
    assert active_scales(pipe.unet) == scales
    assert [dict(layer.scaling) for _, layer in lora_layers(pipe.unet)] == scaling
    assert torch.equal(made(), usual)
    pipe.set_patches({"one": 0.35})
    assert relative(made(), halved) < 1e-5
    pipe.unload_patches()
    base = made((1.0, 0.5))  # which has nothing to act on
    assert relative(none, base) < 1e-5
    apart = [relative(one, base) for one in (usual, halved, mostly, first)]
    assert min(apart) > 1e-3
    assert len({round(one, 5) for one in apart}) == 4
    for points in ([(0.0, 1.0)], [(2.0, 1.0), (1.0, 0.5)], [(1.0, 1.0, 2.0)], [()], [1.0, 2.0]):
        with pytest.raises(ValueError, match="patch_schedule"):
            made(*points)


def test_a_schedule_leaves_what_is_trained_trainable(tiny_model):
    """Validation samples in the middle of a training."""
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    own = inject(pipe.unet, targets="temporal", rank=2, alpha=2.0)
    latents(pipe, picture(0), picture(1), patch_schedule=[(1.0, 0.0), (10.0, 0.5)], generator=seeded(0))
    assert own
    assert all(parameter.requires_grad for parameter in own)


def test_a_schedule_without_effect_is_said(tiny_model, make_patch, caplog):
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    with caplog.at_level(logging.WARNING):
        latents(pipe, picture(0), picture(1), patch_schedule=[(1.0, 0.5)], generator=seeded(0))
    assert "patch_schedule has no effect" in caplog.text
    pipe.load_patch(make_patch())
    pipe.fuse_patches()
    called = []
    pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(ValueError, match="fused into the weights"):
        latents(pipe, picture(0), picture(1), patch_schedule=[(1.0, 0.5)], generator=seeded(0))
    with pytest.raises(ValueError, match="fused into the weights"):
        pipe.through([picture(0), picture(1)], [0, 3], **{**SMALL, "jump_n_sample": 1}, patch_schedule=[(1.0, 0.5)])
    assert not called


def test_offload_hooks_change_nothing(tiny_model, make_patch):
    """With a CPU as the device the hooks run as they do on a GPU, and move what they would move."""
    arguments = {**SMALL, "num_inference_steps": 1, "output_type": "pt"}
    results = []
    for offload in (False, True):
        pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_patch(make_patch(f"patch{offload}"))
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
        results.append(pipe(picture(0), picture(1), generator=seeded(0), **arguments).frames)
    assert torch.equal(*results)


def test_images_of_any_mode_are_taken_as_rgb(pipe):
    colours = picture(0).quantize(32)
    expected = latents(pipe, colours.convert("RGB"), picture(1), generator=seeded(0))
    for mode in ("P", "RGBA"):
        image = colours if mode == "P" else colours.convert("RGBA")
        assert torch.equal(latents(pipe, image, picture(1), generator=seeded(0)), expected)
    clear = picture(0).convert("RGBA")
    clear.putalpha(picture(1).convert("L"))
    levels = np.asarray(picture(0).convert("L"))
    deep = PIL.Image.fromarray(levels.astype(np.uint16) << 8)
    dark = PIL.Image.composite(picture(0), PIL.Image.new("RGB", picture(0).size), picture(1).convert("L"))
    for image, plain in ((clear, dark), (deep, PIL.Image.fromarray(levels))):
        one, other = (np.asarray(as_rgb(each), dtype=float) for each in (image, plain))
        assert np.abs(one - other).max() <= 1
    grey = picture(0).convert("L")
    one = latents(pipe, grey, picture(1), generator=seeded(0))
    assert torch.equal(one, latents(pipe, grey.convert("RGB"), picture(1), generator=seeded(0)))


def test_too_few_steps_to_renoise_is_a_warning(pipe, caplog):
    latents(pipe, picture(0), picture(1), num_inference_steps=2, jump_length=5, generator=seeded(0))
    assert "2 denoising steps are too few to re-noise" in caplog.text
    caplog.clear()
    latents(pipe, picture(0), picture(1), num_inference_steps=2, jump_n_sample=1, generator=seeded(0))
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0: must be a whole number"),
        ({"decode_chunk_size": 0}, "decode_chunk_size=0: must be"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: must be"),
        ({"num_frames": "4"}, "num_frames='4': must be"),
        ({"height": -32}, "height=-32: must be"),
        ({"max_guidance_scale": float("nan")}, "max_guidance_scale=nan: give a number"),
        ({"noise_aug_strength": float("inf")}, "noise_aug_strength=inf: give a number"),
        ({"patch_frames": [(0.0, float("nan"))]}, "patch_frames"),
    ],
)
def test_numbers_that_cannot_be_are_said_before_anything_is_done(pipe, changes, said):
    with pytest.raises(ValueError, match=said):
        latents(pipe, picture(0), picture(1), **changes)


def test_generators_may_be_a_tuple(pipe):
    one, two = (
        latents(pipe, [picture(0)], [picture(1)], generator=kind([seeded(5)]), num_inference_steps=1)
        for kind in (list, tuple)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_that_are_away_suit_plain_adapters_only(tiny_model, make_patch, kind):
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    pipe.load_patch(make_patch(kind=kind), "it")
    pipe.load_patch(make_patch("elsewhere", targets="spatial"), "elsewhere")
    pipe.unet.to("meta")  # as accelerate's hooks leave it between calls
    with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
        pipe.fuse_patches()
    if kind == "lora":
        pipe.check_patches(SamplerSettings(**SMALL))
    else:
        with pytest.raises(ValueError, match="use enable_model_cpu_offload"):
            latents(pipe, picture(0), picture(1))


def test_patches_come_before_sequential_offload(tiny_model, make_patch):
    pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
        pipe.load_patch(make_patch())


def test_the_scheduler_is_left_alone(pipe):
    before = pipe.scheduler.timesteps.clone()
    latents(pipe, picture(0), picture(1), generator=seeded(0))
    assert torch.equal(pipe.scheduler.timesteps, before)
    assert pipe.scheduler.step_index is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"end_image": None}, "end_image"),
        ({"start_image": []}, "start_image"),
        ({"start_image": [picture(0), picture(1)]}, "2 start images but 1 end"),
        ({"height": 33}, "multiples of 2"),
        ({"num_frames": 1}, "num_frames=1"),
        ({"sampler": "best"}, "sampler='best'"),
        ({"start_image": torch.full((1, 3, 32, 48), -0.5)}, r"lie in \[0, 1\]"),
        ({"latents": torch.zeros(1, 2, 3)}, "latents is"),
        ({"aug_noise": torch.zeros(1, 3, 8, 8)}, "aug_noise is"),
        ({"renoise_noise": torch.zeros(9, 1)}, "renoise_noise is"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators"),
        ({"output_type": "gif"}, "output_type='gif'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "only 'latents'"),
        ({"fps": [7, 8]}, "fps: 2 numbers for 1 pairs"),
        ({"fps": [0]}, "fps=0"),
        ({"motion_bucket_id": []}, "motion_bucket_id: 0 numbers for 1 pairs"),
        ({"fps": "auto"}, "fps='auto': give numbers;"),
    ],
)
def test_bad_calls_say_what_is_wrong(pipe, arguments, named):
    bounds = {"start_image": picture(0), "end_image": picture(1)}
    with pytest.raises(ValueError, match=named):
        pipe(**{**bounds, **SMALL, "output_type": "latent", **arguments})


@pytest.mark.parametrize(
    ("model", "said"),
    [("./nowhere", "no such folder"), ("nowhere", "no such folder"), (".", "no model_index.json")],
)
def test_bad_models_say_what_is_wrong(model, said):
    with pytest.raises(ValueError, match=said):
        TimeReversalFusionPipeline.from_pretrained(model)


def test_every_component_is_float32_unless_told_otherwise(tiny_model):
    def dtypes(**kwargs):
        pipe = TimeReversalFusionPipeline.from_pretrained(tiny_model, **kwargs)
        return {part.dtype for part in (pipe.unet, pipe.vae, pipe.image_encoder)}

    assert dtypes() == {torch.float32}
    assert dtypes(dtype=torch.bfloat16) == {torch.bfloat16}


def test_the_miniature_has_svds_classes_and_runs_in_plain_diffusers():
    from diffusers import StableVideoDiffusionPipeline

    from trfpp.trf.miniature import FOLDER

    ours = TimeReversalFusionPipeline.from_pretrained("miniature")
    stock = StableVideoDiffusionPipeline.from_pretrained(FOLDER)
    assert {n: type(c) for n, c in ours.components.items()} == {n: type(c) for n, c in stock.components.items()}
    assert all(torch.equal(a, b) for a, b in zip(ours.unet.parameters(), stock.unet.parameters()))
    stock.set_progress_bar_config(disable=True)
    frames = stock(picture(0, (64, 64)), 64, 64, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 12, 64, 64, 3)


def test_disagreement_is_reported_of_each_video(pipe):
    arguments = {**SMALL, "output_type": "latent"}
    pairs = [(picture(0), picture(1)), (picture(2), picture(2))]
    both = pipe(*map(list, zip(*pairs)), generator=[seeded(1), seeded(2)], **arguments).disagreement
    assert both.shape == (2,)
    assert (both > 0.01).all()
    for row, (pair, seed) in enumerate(zip(pairs, (1, 2))):
        alone = pipe(*pair, generator=seeded(seed), **arguments).disagreement
        assert relative(alone, both[row : row + 1]) < 1e-3


def test_a_patch_with_rotated_attention_is_sampled_so(clean, make_patch):
    """As the plain patch whose pipeline's UNet is called inside the block; not where the patch leaves the backward half."""
    draws = dict(max_guidance_scale=3.0)
    plain, turned = (
        make_patch("plain", direction="both"),
        make_patch("turned", direction="both", rotated_attention=True),
    )
    clean.load_patch(plain)
    usual = latents(clean, picture(0), picture(1), generator=seeded(5), **draws)
    with rotated_attention(clean.unet, 2, 2):  # forward and backward, each without and with conditions
        expected = latents(clean, picture(0), picture(1), generator=seeded(5), **draws)
    clean.unload_patches()
    clean.load_patch(turned)
    assert torch.equal(latents(clean, picture(0), picture(1), generator=seeded(5), **draws), expected)
    assert relative(usual, expected) > 1e-3
    with pytest.raises(ValueError, match="no low_memory"):
        latents(clean, picture(0), picture(1), generator=seeded(5), low_memory=True)
    clean.set_patches({"turned": (1.0, 0.0)})
    forward = latents(clean, picture(0), picture(1), generator=seeded(5), low_memory=True)
    clean.unload_patches()
    clean.load_patch(plain, scale=(1.0, 0.0))
    assert relative(latents(clean, picture(0), picture(1), generator=seeded(5)), forward) < 1e-4
