"""A film through any number of keyframes, and of any length: TRF's fusion over windows of the model's length.

Shapes: K keyframes, N frames of the film, F frames of a window, latents `[1, N, C, h, w]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .conditioning import micro_conditioning
from .denoiser import BoundedDenoiser, Condition, Guidance, WindowedDenoiser
from .draws import noise_source, unit_noise
from .frame_factors import factors_over
from .images import Images
from .samplers import sample
from .schedule import Way, count, unet_calls
from .settings import SamplerName, SamplerSettings
from .strategies import STRATEGIES
from .windows import Level, Windows, held, levels_of, places_of, ramps_of, starts_of, windows_of

LOWEST_FPS = 1.0
"""The model is told fps - 1, which is not negative."""
SAMPLERS: tuple[SamplerName, ...] = ("trf", "trf++")
"""The samplers that can: those that do nothing but fuse both directions."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a film goes through; made by `course_of`."""

    times: tuple[int, ...]
    """Frames that are keyframes, rising from 0."""
    frames: int
    """Of the film. After the last one a closed film begins again."""
    closed: bool

    def levels(self, length: int) -> list[Level]:
        """The films to make with windows of so many frames, one after the other."""
        return levels_of(self.times, self.frames, length, closed=self.closed)

    def unet_calls(self, settings: SamplerSettings) -> int:
        """What they cost."""
        windows = 0
        for level in self.levels(settings.num_frames):
            starts = starts_of(level.times, level.frames, settings.num_frames, closed=self.closed)
            windows += len(starts) - (not self.closed)
        return windows * unet_calls(STRATEGIES[settings.sampler].plan(settings))


def course_of(keyframes: int, times: Sequence[int], frames: int | None = None, *, closed: bool = False) -> Course:
    """The course of a film.

    Args:
        keyframes: how many there are.
        times: their frames, rising from 0.
        frames: of a closed film; an open one ends with its last keyframe.
        closed: whether the film goes on from its last frame to its first.

    Raises:
        ValueError: if there is no such film, with the reason.
    """
    if len(times) != keyframes:
        raise ValueError(f"{len(times)} times for {keyframes} keyframes: give one each.")
    if not all(isinstance(time, Integral) for time in times):
        raise ValueError(f"times={list(times)}: must be whole numbers, frames of the film.")
    if keyframes < 2 - closed:
        raise ValueError("a film needs two keyframes or more; a closed one needs one.")
    if times[0] != 0 or any(later <= earlier for earlier, later in pairwise(times)):
        raise ValueError(f"times={list(times)}: must begin with 0 and rise.")
    if closed and (frames is None or frames < times[-1] + 2):
        raise ValueError(
            f"frames={frames}: say how many a closed film has, {times[-1] + 2} or more with a keyframe at {times[-1]}, "
            "for after its last one it begins again."
        )
    if not closed and frames not in (None, times[-1] + 1):
        raise ValueError(f"frames={frames}: a film ends at its last keyframe, at {times[-1]}; leave frames out.")
    return Course(times=tuple(times), frames=times[-1] + 1 if frames is None else frames, closed=closed)


def check_settings(settings: SamplerSettings, *, closed: bool) -> None:
    """Refuse settings that no film, or no closed one, can be made with.

    Raises:
        ValueError: saying which.
    """
    if settings.sampler not in SAMPLERS:
        raise ValueError(f"sampler={settings.sampler!r}: a film through keyframes is made by {', '.join(SAMPLERS)}.")
    if settings.num_frames < 4:
        raise ValueError(f"num_frames={settings.num_frames}: windows of a film need at least 4 frames.")
    points = settings.patch_frames
    if closed and points and points[0][1] != points[-1][1]:
        raise ValueError(f"patch_frames={list(points)}: a closed film ends where it begins; end with the first factor.")


def told_fps(settings: SamplerSettings, level: Level) -> float:
    """Frames per second that the model is told of a level's film."""
    return max(LOWEST_FPS, settings.fps / level.stride)


@dataclass(kw_only=True)
class FilmSampler:
    """Samples films with a pipeline's components."""

    pipe: Any
    """A `TimeReversalFusionPipeline`."""
    settings: SamplerSettings
    """Of which `num_frames` is F."""
    generator: torch.Generator | None
    """Source of every draw."""
    rows_per_forward: int
    """Rows that the UNet sees at a time."""
    decode_chunk_size: int
    """Frames the VAE decodes at a time."""
    on_calls: Callable[[int], Any] = lambda calls: None
    """Told the number of UNet calls that were done."""
    forwards: int = 0
    """Forward passes of the UNet so far."""

    def film(self, keyframes: Sequence[Images], course: Course) -> Tensor:
        """Latents of the film through keyframes, one image each: level by level, each through the last one's frames."""
        device = self.pipe._execution_device
        known = torch.cat([self.pipe.encode_clean(image, self.settings, device) for image in keyframes]).unsqueeze(0)
        images, places = list(keyframes), list(range(len(keyframes)))
        levels = course.levels(self.settings.num_frames)
        for number, (level, over_film) in enumerate(zip(levels, places_of(levels, closed=course.closed))):
            if number:
                decoded = self.pipe.decode_film(known, self.decode_chunk_size, closed=course.closed)[0]
                images = list((decoded / 2 + 0.5).clamp(0, 1).unsqueeze(1))
                for place, keyframe in zip(places, keyframes):
                    images[place] = keyframe
            known = self._level(images, known, level, over_film, device, closed=course.closed)
            places = [level.times[place] for place in places]
        return known

    def _level(
        self,
        images: Sequence[Images],
        known: Tensor,
        level: Level,
        places: Tensor,
        device: torch.device,
        *,
        closed: bool,
    ) -> Tensor:
        """A level's film through images whose clean latents are `known`, `[1, K, C, h, w]`.

        `places` are those of its frames in the whole film, from 0 to 1, `[frames]`.
        """
        pipe, own = self.pipe, self.settings
        forward, backward, (before, after) = windows_of(level.times, level.frames, own.num_frames, closed=closed)
        both: dict[Way, Windows] = {"forward": forward.to(device), "backward": backward.to(device)}
        num_windows, length = forward.frames.shape  # in a closed film that is short, fewer than the model's own
        scheduler, sigmas, timesteps = pipe.noise_levels(own, device)
        plan = STRATEGIES[own.sampler].plan(own)

        shape = (1, forward.total, *known.shape[2:])
        aug_noise = unit_noise("aug_noise", None, (1, 3, own.height, own.width), self.generator, device)
        x = unit_noise("latents", None, shape, self.generator, device) * scheduler.init_noise_sigma
        renoising = noise_source("renoise_noise", None, count(plan, "renoise"), shape, self.generator, device)

        starts = sorted({*forward.keyframes, *backward.keyframes})
        shown = {number: pipe.encode_bound(images[number], own, aug_noise, device) for number in starts}
        conditions: dict[Way, Condition] = {}
        for way, windows in both.items():
            embeddings, latents = zip(*(shown[number] for number in windows.keyframes))
            conditions[way] = Condition(embedding=torch.cat(embeddings), latents=torch.cat(latents))
        inside = {way: (windows.frames - before).clamp(0, level.frames - 1) for way, windows in both.items()}
        fps = told_fps(own, level)
        denoise = BoundedDenoiser(
            unet=pipe.unet,
            conditions=conditions,
            ids=micro_conditioning(fps, own.motion_bucket_id, own.noise_aug_strength, num_windows).to(device),
            sigmas=sigmas,
            timesteps=timesteps,
            guidance=Guidance.of(own, length, device),
            patch_schedule=own.patch_schedule,
            patch_frames=factors_over(own.patch_frames, {way: places.to(device)[at] for way, at in inside.items()}),
            rows_per_forward=self.rows_per_forward,
        )
        windowed = WindowedDenoiser(denoise=denoise, windows=both, on_calls=self.on_calls)
        at = torch.tensor(level.times, device=device) + before
        ramps = ramps_of(level.times, level.frames, (before, after), closed=closed).to(device)
        film = sample(
            windowed, x, sigmas, plan, renoising,
            weights=both["forward"].share, noise_scale=own.noise_scale_ratio,
            hold=lambda film: held(film, at, known, ramps),
        )  # fmt: skip
        self.forwards += denoise.forwards
        return film[:, before : before + level.frames]
