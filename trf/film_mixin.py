"""Films through keyframes, as a method of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .attention import one_token_attention
from .images import Images, count_pairs
from .output import OUTPUT_TYPES, TimeReversalFusionOutput
from .settings import check_counts, resolve
from .strategies import STRATEGIES, warn_of_what_is_left_out
from .through import FilmSampler, check_settings, course_of


class FilmsMixin:
    """What a pipeline with `CodecMixin` and `PatchesMixin` needs to make films."""

    @torch.no_grad()
    def through(
        self: Any,
        keyframes: Sequence[Images],
        times: Sequence[int],
        *,
        film_frames: int | None = None,
        closed: bool = False,
        generator: torch.Generator | None = None,
        low_memory: bool = False,
        decode_chunk_size: int = 8,
        output_type: str = "pil",
        **settings: Any,
    ) -> TimeReversalFusionOutput:
        """Generate one film, of any length, through any number of keyframes.

        The model sees windows of `num_frames` frames, which begin at keyframes, run either way and pass their
        neighbours, so motion goes on through them (see `windows`). Where keyframes are too far apart for that, a film
        with fewer frames is made first. The keyframes are exactly in place, in latents.

        Args:
            keyframes: K images: PIL, or tensors `[1, 3, H, W]` in [0, 1]. Of those nearer than half a window some are
                held in place without a window of their own.
            times: their frames in the film, rising from 0.
            film_frames: frames of the film, N; a closed one's are said, another's end with the last keyframe.
            closed: after its last frame the film goes on with its first.
            generator: source of every draw.
            low_memory: forward passes of one row each, in place of up to four.
            decode_chunk_size: see `__call__`; so for `output_type`.
            output_type: `pil`, `np`, `pt` or `latent`.
            settings: fields of `SamplerSettings`, resolved as by `__call__`.

        Raises:
            ValueError: for keyframes, times or settings that cannot work.
        """
        check_counts(decode_chunk_size=decode_chunk_size)
        course = course_of(len(keyframes), times, film_frames, closed=closed)
        if any(count_pairs(keyframe, keyframe) != 1 for keyframe in keyframes):
            raise ValueError("a keyframe holds several images: give a list of single ones.")
        resolved, sources = resolve(settings, self.recommended, self.native)
        self.latent_shape(resolved, 1)
        check_settings(resolved, closed=closed)
        self.check_patches(resolved)
        self.check_windows()
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: choose {', '.join(OUTPUT_TYPES)}.")
        warn_of_what_is_left_out(resolved, STRATEGIES[resolved.sampler].plan(resolved))

        calls = course.unet_calls(resolved)
        with self.progress_bar(total=calls) as progress, one_token_attention(self.unet):
            sampler = FilmSampler(
                pipe=self, settings=resolved, generator=generator, rows_per_forward=1 if low_memory else 4,
                decode_chunk_size=decode_chunk_size, on_calls=progress.update,
            )  # fmt: skip
            x = sampler.film(keyframes, course)
        frames: Any = x
        if output_type != "latent":
            decoded = self.decode_film(x, decode_chunk_size, closed=closed)
            frames = self.video_processor.postprocess_video(decoded.transpose(1, 2), output_type=output_type)
        self.maybe_free_model_hooks()
        return TimeReversalFusionOutput(
            frames=frames, settings=resolved, pair_settings=[resolved], sources=sources, unet_calls=calls,
            unet_forwards=sampler.forwards, disagreement=None,
        )  # fmt: skip

    def check_windows(self: Any) -> None:
        """Refuse patches that cannot act on the windows of a film.

        Raises:
            ValueError: for one with rotated attention.
        """
        if self.rotated_attention:
            raise ValueError("a patch with rotated attention needs pairs; a film through keyframes has other windows.")
