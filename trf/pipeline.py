"""`TimeReversalFusionPipeline`: bounded generation as a diffusers pipeline.

Shapes: B pairs times videos per pair, F frames, latents `[B, F, C, h, w]`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from .attention import one_token_attention
from .base import model_location
from .codec import DECODE_OVERLAP, CodecMixin
from .conditioning import micro_conditioning
from .denoiser import BoundedDenoiser, Condition, Guidance
from .draws import Generators, noise_source, unit_noise
from .film_mixin import FilmsMixin
from .frame_factors import factors_over
from .images import Images, count_pairs
from .output import OUTPUT_TYPES, TimeReversalFusionOutput
from .patch_mixin import PatchesMixin
from .samplers import Bounds, anchored, sample
from .schedule import WAYS, Iteration, count, unet_calls
from .settings import SamplerSettings, check_counts, resolve
from .strategies import STRATEGIES, warn_of_what_is_left_out
from .two_unets import BACKWARD_FOLDER, TwoUNets

logger = logging.getLogger(__name__)


class TimeReversalFusionPipeline(PatchesMixin, FilmsMixin, CodecMixin, DiffusionPipeline):
    """Generates the video between two given frames with Stable Video Diffusion (TRF, arXiv 2403.14611).

    Loads any SVD model: `TimeReversalFusionPipeline.from_pretrained(folder_or_hub_id_or_"miniature")`.

    Args:
        vae: `AutoencoderKLTemporalDecoder`.
        image_encoder: `CLIPVisionModelWithProjection`.
        unet: `UNetSpatioTemporalConditionModel`.
        scheduler: `EulerDiscreteScheduler`; its noise levels are used, its state is left alone.
        feature_extractor: `CLIPImageProcessor`; its normalisation is used.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, vae: Any, image_encoder: Any, unet: Any, scheduler: Any, feature_extractor: Any) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler, feature_extractor=feature_extractor
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(do_resize=True, vae_scale_factor=self.vae_scale_factor)
        self.cards = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TimeReversalFusionPipeline:
        """Load the components of an SVD model: a hub id, a local folder, or `miniature`. Keywords as in diffusers.

        Only safetensors files are read. Without a `dtype` every component is float32, whatever its files hold. A local
        folder may hold a second UNet, `unet_backward/`, for the half that runs backward.
        """
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.float32  # said, or transformers would take the CLIP tower's from its config
        location = model_location(pretrained_model_name_or_path)
        pipe = super().from_pretrained(location, **{"use_safetensors": True, **kwargs})
        if (Path(location) / BACKWARD_FOLDER).is_dir():
            second = UNetSpatioTemporalConditionModel.from_pretrained(
                location, subfolder=BACKWARD_FOLDER, dtype=pipe.unet.dtype, variant=kwargs.get("variant"),
                use_safetensors=True,
            )  # fmt: skip
            pipe.register_modules(unet=TwoUNets(pipe.unet, second))
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        start_image: Images,
        end_image: Images,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: float | Sequence[float] | None = None,
        motion_bucket_id: float | Sequence[float] | None = None,
        noise_aug_strength: float | None = None,
        min_guidance_scale: float | None = None,
        max_guidance_scale: float | None = None,
        min_guidance_sigma: float | None = None,
        max_guidance_sigma: float | None = None,
        jump_length: int | None = None,
        jump_n_sample: int | None = None,
        repeat_step_ratio: float | None = None,
        noise_scale_ratio: float | None = None,
        patch_schedule: Sequence[tuple[float, float]] | None = None,
        patch_frames: Sequence[tuple[float, float]] | None = None,
        sampler: str | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        aug_noise: Tensor | None = None,
        renoise_noise: Tensor | None = None,
        low_memory: bool = False,
        decode_chunk_size: int = 8,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> Any:
        """Generate the video from `start_image` to `end_image`.

        A setting left at `None` comes from the active patch's card, else from the model (size, frames), else from the
        sampler's authors, else from TRF's release; see `SamplerSettings` for meanings, units and defaults. The output
        says which it was.

        Args:
            start_image: first frame: a PIL image, a list of B, or a tensor `[B, 3, H, W]` in [0, 1].
            end_image: last frame, likewise. The same image twice makes a loop.
            height: see `SamplerSettings`; so for all parameters up to `sampler`.
            width: pixels.
            num_frames: frames, both bounds included.
            num_inference_steps: denoising steps.
            fps: frames per second; a number, or one for each pair.
            motion_bucket_id: amount of motion, 0 to 255; a number, or one for each pair.
            noise_aug_strength: noise on the bounds.
            min_guidance_scale: guidance at the condition's frame.
            max_guidance_scale: guidance at the far frame.
            min_guidance_sigma: least noise level with guidance.
            max_guidance_sigma: largest one.
            jump_length: levels a re-noising run goes back.
            jump_n_sample: times the levels after an anchor are denoised.
            repeat_step_ratio: re-noise while this fraction of the steps remains.
            noise_scale_ratio: factor on the re-noising noise.
            patch_schedule: strength of all patches over noise.
            patch_frames: strength of all patches over the film.
            sampler: see `SamplerSettings`; `docs/sampling.md` says what each does.
            num_videos_per_prompt: videos for each pair.
            generator: source of every draw (start noise, augmentation, re-noising), or one per video; with one per
                video the result of a pair does not depend on the others in its batch.
            latents: unit-variance start noise `[B, F, C, h, w]`, in place of a draw.
            aug_noise: unit noise for the bounds `[B or 1, 3, H, W]`, in place of a draw; both bounds get the same.
            renoise_noise: unit noise of the re-noising iterations in their order, `[number, B, F, C, h, w]`, in place
                of draws.
            low_memory: forward passes of B rows each, in place of one of all rows of an iteration (4 B, guided).
            decode_chunk_size: frames the VAE decodes at a time, besides two neighbours on either side.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called as `callback(pipe, iteration, timestep, {"latents": ...})` after every
                iteration, re-noising ones included; may return replaced latents.
            callback_on_step_end_tensor_inputs: only `latents` can be asked for.
            return_dict: return a `TimeReversalFusionOutput`, else the tuple `(frames,)`.

        Raises:
            ValueError: for bounds, settings or noise that cannot work.
        """
        # 1. Settings and checks
        check_counts(num_videos_per_prompt=num_videos_per_prompt, decode_chunk_size=decode_chunk_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        num_pairs = count_pairs(start_image, end_image)
        told = dict(
            height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
            noise_aug_strength=noise_aug_strength, min_guidance_scale=min_guidance_scale,
            max_guidance_scale=max_guidance_scale, min_guidance_sigma=min_guidance_sigma,
            max_guidance_sigma=max_guidance_sigma, jump_length=jump_length, jump_n_sample=jump_n_sample,
            repeat_step_ratio=repeat_step_ratio, noise_scale_ratio=noise_scale_ratio, patch_schedule=patch_schedule,
            patch_frames=patch_frames, sampler=sampler,
        )  # fmt: skip
        recommended, native = self.recommended, self.native
        resolved = [
            resolve({**told, "fps": own_fps, "motion_bucket_id": own_motion}, recommended, native)
            for own_fps, own_motion in zip(
                _of_pairs("fps", fps, num_pairs), _of_pairs("motion_bucket_id", motion_bucket_id, num_pairs)
            )
        ]
        settings, sources = resolved[0]
        pair_settings = [own for own, _ in resolved]
        from_card = [name for name, source in sources.items() if source == "patch card"]
        if from_card:
            values = asdict(settings)
            logger.info("from the patch card: %s", ", ".join(f"{name}={values[name]}" for name in from_card))
        batch_size = num_pairs * num_videos_per_prompt
        shape = self.latent_shape(settings, batch_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} videos: give one, or one per video.")
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: only 'latents' exists."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: choose {', '.join(OUTPUT_TYPES)}.")
        self.check_directions(settings, low_memory=low_memory)
        self.check_patches(settings)
        strategy = STRATEGIES[settings.sampler]
        plan = strategy.plan(settings)
        one_way = _asks_for_one(plan)
        device = self._execution_device

        # 2. Noise levels and plan; the scheduler is copied, for it keeps state
        scheduler, sigmas, timesteps = self.noise_levels(settings, device)
        warn_of_what_is_left_out(settings, plan)

        # 3. Draws, in a fixed order: augmentation, start noise, then re-noising as it comes
        of_pairs = generator[::num_videos_per_prompt] if isinstance(generator, list) else generator
        aug_shape = (num_pairs, 3, settings.height, settings.width)
        aug_noise = unit_noise("aug_noise", aug_noise, aug_shape, of_pairs, device, shared=True)
        latents = unit_noise("latents", latents, shape, generator, device)
        renoising = noise_source("renoise_noise", renoise_noise, count(plan, "renoise"), shape, generator, device)

        # 4. Condition on both bounds
        bounds = [self.encode_bound(image, settings, aug_noise, device) for image in (start_image, end_image)]
        conditions = {
            way: Condition(
                embedding=embedding.repeat_interleave(num_videos_per_prompt, 0),
                latents=condition.repeat_interleave(num_videos_per_prompt, 0),
            )
            for way, (embedding, condition) in zip(WAYS["fused"], bounds)
        }
        clean = None
        if one_way or strategy.anchored:
            clean = Bounds(*(
                self.encode_clean(image, settings, device).repeat_interleave(num_videos_per_prompt, 0)
                for image in (start_image, end_image)
            ))  # fmt: skip
        ids = torch.cat([
            micro_conditioning(own.fps, own.motion_bucket_id, own.noise_aug_strength, num_videos_per_prompt)
            for own in pair_settings
        ]).to(device)  # fmt: skip

        # 5. The model as a denoiser
        places = torch.linspace(0, 1, settings.num_frames, device=device).unsqueeze(0)
        denoise = BoundedDenoiser(
            unet=self.unet,
            conditions=conditions,
            ids=ids,
            sigmas=sigmas,
            timesteps=timesteps,
            guidance=Guidance.of(settings, settings.num_frames, device),
            patch_schedule=settings.patch_schedule,
            patch_frames=factors_over(settings.patch_frames, {"forward": places, "backward": places.flip(1)}),
            free=strategy.cfg_plus,
            rotated=strategy.rotated or self.rotated_attention,
            rows_per_forward=batch_size if low_memory else None,
        )

        def observe(number: int, iteration: Iteration, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            at = min(iteration.start, len(timesteps) - 1)  # re-noised from where there is no noise left
            returned = callback_on_step_end(self, number, timesteps[at], {"latents": x})
            return (returned or {}).get("latents", x)

        # 6. Sample
        with self.progress_bar(total=unet_calls(plan)) as progress, one_token_attention(self.unet):
            denoise.on_calls = progress.update
            x = sample(
                denoise, latents * scheduler.init_noise_sigma, sigmas, plan, renoising,
                weights=strategy.weights(settings.num_frames, device), bounds=clean, cfg_plus=strategy.cfg_plus,
                noise_scale=settings.noise_scale_ratio, stale_scaling=strategy.as_released,
                hold=partial(anchored, **clean._asdict()) if clean and strategy.anchored else lambda film: film,
                observe=observe,
            )  # fmt: skip

        # 7. Decode
        frames: Any = x
        if output_type != "latent":
            decoded = self.decode_latents(x, decode_chunk_size, 0 if strategy.as_released else DECODE_OVERLAP)
            frames = self.video_processor.postprocess_video(decoded.transpose(1, 2), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return TimeReversalFusionOutput(
            frames=frames, settings=settings, pair_settings=pair_settings, sources=sources, unet_calls=denoise.calls,
            unet_forwards=denoise.forwards,
            disagreement=torch.stack(denoise.disagreements).mean(0) if denoise.disagreements else None,
        )  # fmt: skip

    def check_directions(self, settings: SamplerSettings, *, low_memory: bool = False) -> None:
        """Whether the sampler can have the directions as the model and its patches give them. No weights are needed.

        Raises:
            ValueError: if rotated attention cannot have the rows of both directions in one call of one UNet, or
                `patch_frames` not the one UNet.
        """
        if settings.patch_frames and isinstance(self.unet, TwoUNets):
            raise ValueError("patch_frames is for models with one UNet, and this one has two.")
        strategy = STRATEGIES[settings.sampler]
        if not strategy.rotated and not self.rotated_attention:
            return
        if isinstance(self.unet, TwoUNets):
            raise ValueError("rotated attention needs one UNet for both directions, and this model has two.")
        if low_memory:
            raise ValueError("rotated attention needs both directions in one UNet call; no low_memory.")
        if _asks_for_one(strategy.plan(settings)):
            raise ValueError(
                f"rotated attention needs both directions in one UNet call, and sampler={settings.sampler!r} asks for "
                "one at a time; choose trf++, trf or gi, or another patch."
            )


def _asks_for_one(plan: Sequence[Iteration]) -> bool:
    """Whether a plan has iterations of one direction alone."""
    return any(len(WAYS[iteration.kind]) == 1 for iteration in plan)


def _of_pairs(name: str, value: float | Sequence[float] | None, num_pairs: int) -> Sequence[float | None]:
    """A setting of each pair, from one number for all of them or one for each."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r}: give numbers; docs/sampling.md shows how to measure them of the bounds.")
    given: Any = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    values: list[Any] = [given] * num_pairs if given is None or isinstance(given, Real) else list(given)
    if len(values) != num_pairs:
        raise ValueError(f"{name}: {len(values)} numbers for {num_pairs} pairs; give one, or one for each.")
    return values
