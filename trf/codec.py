"""Between images and what the model works on: bounds encoded, films decoded, noise levels.

Shapes: B videos, F frames, latents `[B, F, C, h, w]`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .conditioning import encode_clip, encode_condition
from .images import Images, to_pixels, to_rgb
from .settings import SamplerSettings
from .tiles import in_tiles

DECODE_OVERLAP = 2
"""Frames beyond a chunk that its decoding sees: with one the seams are half as strong as without, with two a sixth."""
TILE_OVERLAP = 0.25
"""Share of a tile's side in which it fades into its neighbour."""


class CodecMixin:
    """What a pipeline with SVD's components needs of them."""

    vae: Any
    image_encoder: Any
    feature_extractor: Any
    unet: Any
    scheduler: Any
    video_processor: Any
    vae_scale_factor: int
    decode_tile_size: int | None = None
    """Pixels of the side of the tiles that frames are decoded in; whole frames by default.

    Tiles need less memory, and differ in tone: the decoder normalises over what it sees.
    """

    @property
    def native(self) -> dict[str, Any]:
        """Size and number of frames the base model was made for."""
        size = self.unet.config.sample_size
        frames = {"num_frames": self.unet.config.num_frames}
        # SVD's own config says 96 (768 x 768), but it was trained, and is used, at 576 x 1024: the default.
        if size is None or size == 96:
            return frames
        height, width = (size, size) if isinstance(size, int) else size
        return {**frames, "height": height * self.vae_scale_factor, "width": width * self.vae_scale_factor}

    def encode_bound(
        self, image: Images, settings: SamplerSettings, aug_noise: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """CLIP embedding `[B, 1, D]` and conditioning latents `[B, 1, C, h, w]` of a bound, in the UNet's dtype."""
        image = to_rgb(image)
        pixels = to_pixels(image).to(device)
        embedding = encode_clip(pixels, self.image_encoder, self.feature_extractor)
        resized = self.video_processor.preprocess(image, height=settings.height, width=settings.width).to(device)
        latents = encode_condition(resized + settings.noise_aug_strength * aug_noise, self.vae)
        return embedding.to(self.unet.dtype), latents.unsqueeze(1).to(self.unet.dtype)

    def encode_clean(self, image: Images, settings: SamplerSettings, device: torch.device) -> Tensor:
        """Scaled latents of a bound without noise, `[B, C, h, w]` float32: what a sampler anchors a frame to."""
        pixels = self.video_processor.preprocess(to_rgb(image), height=settings.height, width=settings.width).to(device)
        return encode_condition(pixels, self.vae) * self.vae.config.scaling_factor

    def decode_latents(
        self,
        latents: Tensor,
        decode_chunk_size: int,
        overlap: int = DECODE_OVERLAP,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Frames `[B, F, 3, H, W]` in [-1, 1], float32, `decode_chunk_size` of them at a time.

        The decoder mixes neighbouring frames, so a chunk is decoded with its neighbours, which are then left out.
        In the VAE's own precision, as stock SVD decodes: `force_upcast` concerns its encoder.

        Args:
            latents: scaled, `[B, F, C, h, w]`.
            decode_chunk_size: frames that come out at a time.
            overlap: frames decoded beyond them on either side.
            device: where the frames are collected; where the VAE is by default.
        """
        frames = []
        for video in (latents / self.vae.config.scaling_factor).to(self.vae.dtype):
            for start in range(0, len(video), decode_chunk_size):
                before = min(start, overlap)
                chunk = video[start - before : start + decode_chunk_size + overlap]
                decoded = self._decode(chunk)
                frames.append(decoded[before : before + decode_chunk_size].float().to(device or decoded.device))
        return torch.cat(frames).unflatten(0, latents.shape[:2])

    def _decode(self, chunk: Tensor) -> Tensor:
        """Neighbouring frames at once, `[N, 3, H, W]` from latents that are not scaled."""

        def decoded(part: Tensor) -> Tensor:
            frames: Tensor = self.vae.decode(part, num_frames=len(part)).sample
            return frames

        if self.decode_tile_size is None:
            return decoded(chunk)
        tile = max(1, self.decode_tile_size // self.vae_scale_factor)
        return in_tiles(decoded, chunk, tile, int(tile * TILE_OVERLAP), self.vae_scale_factor)

    def decode_film(self, latents: Tensor, decode_chunk_size: int, *, closed: bool) -> Tensor:
        """Frames of a film, see `decode_latents`, on the CPU; a closed one's first and last frames are neighbours."""
        if not closed:
            return self.decode_latents(latents, decode_chunk_size, device="cpu")
        around = torch.cat([latents[:, -DECODE_OVERLAP:], latents, latents[:, :DECODE_OVERLAP]], dim=1)
        return self.decode_latents(around, decode_chunk_size, device="cpu")[:, DECODE_OVERLAP:-DECODE_OVERLAP]

    def noise_levels(self, settings: SamplerSettings, device: torch.device) -> tuple[Any, Tensor, Tensor]:
        """A scheduler with its steps set, and its noise levels `[N + 1]` float32 and timesteps `[N]` on the device."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(settings.num_inference_steps, device=device)
        return scheduler, scheduler.sigmas.to(device, torch.float32), scheduler.timesteps.to(device)

    def latent_shape(self, settings: SamplerSettings, batch_size: int) -> torch.Size:
        """Shape of the latents, `[B, F, C, h, w]`.

        Raises:
            ValueError: if height or width is no multiple of the VAE's scale factor.
        """
        factor = self.vae_scale_factor
        if settings.height % factor or settings.width % factor:
            raise ValueError(f"height={settings.height}, width={settings.width}: both must be multiples of {factor}.")
        channels = self.unet.config.out_channels
        return torch.Size(
            (batch_size, settings.num_frames, channels, settings.height // factor, settings.width // factor)
        )
