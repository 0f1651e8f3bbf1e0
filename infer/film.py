"""A film through keyframes to files: the output folder holds what `generate` writes of a pair."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data_prep.frames import fit_image, load_image
from ..trf.pipeline import TimeReversalFusionPipeline
from ..trf.settings import SamplerSettings
from ..trf.through import Course, check_settings, course_of, told_fps
from .models import load_pipeline, outline_of
from .pair_settings import settings_of
from .record import (
    RECORD_FILE,
    device_of,
    differences,
    dtype_name,
    on_its_model,
    patch_sha256,
    read_record,
    recipe,
    versions,
)
from .results import finite_frames, is_unfinished, make_folder, write_into

if TYPE_CHECKING:
    from ..configs.schema import FilmConfig


def film(config: FilmConfig) -> bool:
    """Generate the film, unless it is there; returns whether it was generated.

    Settings are decided as by `generate`. The same seed gives the same bits on the same machine.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a keyframe cannot be read, a patch does not fit, a setting cannot work, the output cannot be
            written to, something else than a film is there, or its record is broken.
    """
    config = on_its_model(config, config.patches)
    outline = outline_of(config)
    settings, sources, course = _decided(config, outline)
    images = {"keyframes": config.keyframes}
    made_with = recipe(config, images, settings, config.seed, [patch_sha256(folder) for folder in config.patches])
    made_with["config"] |= {"times": list(course.times), "closed": course.closed, "frames": course.frames}
    there = _is_film(config.output)
    ours = there or is_unfinished(config.output)
    # What is hidden may be left of a film whose process was killed, and stays if not.
    others = config.output.iterdir() if config.output.is_dir() and not ours else ()
    if any(not other.name.startswith(".") for other in others):
        raise ValueError(f"output={str(config.output)!r}: something else than a film is there; choose another folder.")
    if there and not config.overwrite:
        changed = differences(config.output, made_with)
        print(f"kept {config.output}" + (f", though made with another {', '.join(changed)}" if changed else ""))
        return False
    size = (settings.height, settings.width, config.fit)
    keyframes = [fit_image(load_image(path), *size) for path in config.keyframes]

    make_folder(config.output)  # now: that it cannot be is better known before hours
    began = time.perf_counter()
    pipe = load_pipeline(config)
    pipe.set_progress_bar_config(desc="film", disable=None)
    result = pipe.through(
        keyframes,
        course.times,
        film_frames=course.frames,
        closed=course.closed,
        generator=torch.Generator("cpu").manual_seed(config.seed),
        low_memory=config.low_memory,
        decode_chunk_size=config.decode_chunk_size,
        output_type="np",
        **asdict(settings),
    )
    record = {
        **made_with,
        "sources": sources,
        "dtype": dtype_name(config),
        "versions": versions(),
        "unet_calls": result.unet_calls,
        "unet_forwards": result.unet_forwards,
        "seconds": round(time.perf_counter() - began, 3),
    }
    frames = finite_frames(result.frames[0], config)
    write_into(config.output, frames, settings.fps, record, save_frames=config.save_frames)
    print(f"{config.output}: {course.frames} frames through {len(course.times)} keyframes.")
    return True


def plan(config: FilmConfig) -> str:
    """What `film` would do, in words; the weights are not loaded.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit or a setting cannot work.
    """
    config = on_its_model(config, config.patches)
    settings, sources, course = _decided(config, outline_of(config))
    lines = [f"model: {config.model} on {device_of(config)}, {dtype_name(config)}", "sampler:"]
    lines += [f"  {name} = {value} ({sources[name]})" for name, value in asdict(settings).items()]
    lines.append("keyframes:")
    lines += [f"  frame {time}: {path}" for time, path in zip(course.times, config.keyframes)]
    for number, level in enumerate(course.levels(settings.num_frames), start=1):
        lines.append(
            f"pass {number}: {level.frames} frames through {len(level.times)}, at {told_fps(settings, level):.3g} fps"
        )
    # An open film that is shorter than a window is the middle of one.
    length = min(settings.num_frames, course.frames + 1) if course.closed else settings.num_frames
    kind = "closed film" if course.closed else "film"
    lines.append(f"{kind} of {course.frames} frames: {course.unet_calls(settings)} UNet calls of {length} frames")
    return "\n".join(lines)


def _decided(config: FilmConfig, outline: TimeReversalFusionPipeline) -> tuple[SamplerSettings, dict[str, str], Course]:
    if config.sampler.measured:
        raise ValueError(f"sampler.{config.sampler.measured[0]}=auto is for pairs; give a number.")
    settings, sources = settings_of(config, outline)
    outline.latent_shape(settings, 1)
    outline.check_windows()
    check_settings(settings, closed=config.closed)
    course = course_of(len(config.keyframes), config.times, config.frames, closed=config.closed)
    return settings, sources, course


def _is_film(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() and "keyframes" in read_record(folder)["config"]
