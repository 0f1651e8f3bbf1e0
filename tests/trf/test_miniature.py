"""The shipped miniature: plain files that stock diffusers loads, and weights that know what films look like."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from trfpp.data_prep.motion import motion_score
from trfpp.data_prep.procedural import WORLDS, film
from trfpp.trf.base import model_location
from trfpp.trf.miniature import FOLDER, MINIATURE, make_feature_extractor, make_scheduler

HELD_OUT = 2_000_000
"""Number of a film that no run trains on."""


@pytest.fixture(scope="module")
def pipeline():
    made = StableVideoDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def psnr(one, other):
    return 10 * np.log10(255**2 / np.square(one.astype(float) - other).mean())


def test_it_is_small_and_holds_safetensors_only():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    weights = {path.parent.name for path in files if path.suffix == ".safetensors"}
    assert weights == {"unet", "vae", "image_encoder"}
    assert model_location(MINIATURE) == str(FOLDER)


def test_its_classes_and_settings_are_those_of_svd(pipeline):
    assert type(pipeline.unet) is UNetSpatioTemporalConditionModel
    assert type(pipeline.vae) is AutoencoderKLTemporalDecoder
    assert type(pipeline.image_encoder) is CLIPVisionModelWithProjection
    assert (pipeline.unet.config.num_frames, pipeline.unet.config.sample_size * pipeline.vae_scale_factor) == (12, 64)
    # What SVD-XT's scheduler_config.json says.
    published = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
        "timestep_spacing": "leading", "timestep_type": "continuous", "steps_offset": 1, "use_karras_sigmas": True,
        "sigma_min": 0.002, "sigma_max": 700.0, "num_train_timesteps": 1000, "interpolation_type": "linear",
    }  # fmt: skip
    saved = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert {key: saved[key] for key in published} == published
    made, loaded = (dict(scheduler.config) for scheduler in (make_scheduler(), pipeline.scheduler))
    assert {key: loaded[key] for key in made if not key.startswith("_")} == {
        key: value for key, value in made.items() if not key.startswith("_")
    }
    assert pipeline.feature_extractor.image_mean == make_feature_extractor().image_mean
    assert pipeline.feature_extractor.crop_size == {"height": 224, "width": 224}


@pytest.mark.parametrize("world", WORLDS)
def test_its_autoencoder_knows_every_world(pipeline, world):
    likeness = []
    for index in range(HELD_OUT, HELD_OUT + 3):
        frames = film(world, 0, index).frames
        pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.mode()
            shown = pipeline.vae.decode(latents, num_frames=len(frames)).sample
        shown = ((shown.clamp(-1, 1) + 1) * 127.5).movedim(1, -1).numpy()
        likeness.append(psnr(frames, shown))
        # The factor brings latents to the unit variance that the noise levels are made for.
        assert float(latents.std()) * pipeline.vae.config.scaling_factor == pytest.approx(1, abs=0.35)
    assert np.mean(likeness) >= 28


def test_its_image_encoder_tells_films_apart(pipeline):
    shown = [film("base", 0, HELD_OUT + index).frames for index in range(12)]

    def embedded(number):
        with torch.no_grad():
            images = [Image.fromarray(frames[number]) for frames in shown]
            vectors = pipeline._encode_image(images, "cpu", 1, False)[:, 0]
        return torch.nn.functional.normalize(vectors, dim=-1)

    scores = embedded(0) @ embedded(-1).T
    assert (scores.argmax(1) == torch.arange(12)).float().mean() > 0.9


def test_it_animates_a_frame_it_never_saw(pipeline):
    shown = film("base", 0, HELD_OUT + 1)
    videos = {}
    for bucket in (20, 120):
        made = pipeline(
            Image.fromarray(shown.frames[0]), height=64, width=64, num_inference_steps=8, max_guidance_scale=1.0,
            fps=10, motion_bucket_id=bucket, generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames  # fmt: skip
        videos[bucket] = (np.asarray(made)[0] * 255).round().astype(np.uint8)
    for video in videos.values():
        assert video.shape == shown.frames.shape
        assert psnr(video[0], shown.frames[0]) > 22  # it begins with the frame that it was given
        assert psnr(video[-1], shown.frames[0]) > 14  # and stays in its scene
    still, moving = (motion_score(videos[bucket], 10) for bucket in (20, 120))
    assert moving > 1.5 * still


def test_it_heeds_the_frame_rate(pipeline):
    """At one bucket, which is motion a second, less of it falls to a frame of a faster film."""
    a_frame = {}
    for fps in (6, 24):
        scores = []
        for index in range(3):
            made = pipeline(
                Image.fromarray(film("base", 0, HELD_OUT + index).frames[0]), height=64, width=64, num_inference_steps=8,
                max_guidance_scale=1.0, fps=fps, motion_bucket_id=80, generator=torch.Generator().manual_seed(index),
                output_type="np",
            ).frames  # fmt: skip
            scores.append(motion_score((np.asarray(made)[0] * 255).round().astype(np.uint8), fps) / fps)
        a_frame[fps] = np.mean(scores)
    assert a_frame[6] > 1.5 * a_frame[24]
