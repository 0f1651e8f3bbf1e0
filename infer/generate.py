"""Bounded generation to files: one pair of images, a loop, or every pair of a manifest.

Each pair gets a folder `<output>/<id>/`, whole or not there at all:

video.mp4           the video, at the fps the model was told
frames/00000.png    its frames, first and last included
generation.json     the record: `config` holds the settings of `trfpp infer` that repeat it to the bit
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data_prep.bounds import Pair, read_manifest
from ..data_prep.frames import fit_image, load_image
from ..trf.pipeline import TimeReversalFusionPipeline
from ..trf.scarcity import lacks_memory
from ..trf.schedule import unet_calls
from ..trf.strategies import STRATEGIES
from .claims import claims
from .models import load_pipeline, outline_of
from .pair_settings import settings_of
from .record import (
    RECORD_FILE,
    Digest,
    Job,
    device_of,
    differences,
    dtype_name,
    on_its_model,
    patch_sha256,
    patches_of,
    recipe,
    versions,
    written_at,
)
from .results import finite_frames, write_result

if TYPE_CHECKING:
    from ..configs.schema import InferConfig


class PairsFailed(ValueError):
    """Some pairs could not be generated; `folders` are the results of the others."""

    def __init__(self, folders: list[Path], failures: dict[str, str]) -> None:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{len(failures)} of {len(folders) + len(failures)} pairs failed:\n{reasons}")
        self.folders = folders


def generate(config: InferConfig) -> list[Path]:
    """Generate every pair that is not there yet.

    A sampler setting comes from the command line, else from the manifest, else from the patch card, else from the
    model, else from the sampler's authors, else from TRF's release; `auto` on the command line is measured of each
    pair. A seed in the manifest is that pair's own and goes before `seed`. Each pair starts a new generator from its
    seed, on the CPU, so that a result depends neither on the order of the pairs nor on the device's random numbers.

    A pair that cannot be generated does not keep the rest from going on. Results are written while the next pairs are
    sampled; what is sampled when the run is interrupted is written before it ends, and stays. Processes that are
    started with the same settings, on one machine or on several that see the output folder, share the pairs: each takes
    the next one that no other is at.

    Returns:
        Folders of the results in the pairs' order, those that were there already included.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit, a setting cannot work, a record that is there is broken, or the output
            cannot be written to.
        PairsFailed: at the end, if some pairs could not be generated, with their reasons.
    """
    config = on_its_model(config, config.patches)
    print(f"model: {config.model}")
    outline = outline_of(config)
    pairs = _pairs(config)
    failures: dict[str, str] = {}
    look = load_image if config.sampler.measured else _check_header  # measuring decodes them in any case
    for pair in pairs:  # before the weights are loaded, which takes long
        try:
            for image in {pair.start, pair.end}:
                look(image)
        except ValueError as error:
            failures[pair.id] = str(error)
    jobs = _jobs(config, outline, [pair for pair in pairs if pair.id not in failures])
    for job in jobs[:1]:
        if from_card := _from(job, "patch card"):
            print("from the patch card:", ", ".join(from_card))

    patches_sha256 = [patch_sha256(folder) for folder in config.patches]
    for job in jobs:
        if job.done and (
            others := differences(job.folder, recipe(config, job.images, job.settings, job.seed, patches_sha256))
        ):
            print(f"kept    {job.folder}, though made with another {', '.join(others)}; see overwrite=true")
    todo, failed_before = [job for job in jobs if not job.done], len(failures)
    made: list[Job] = []
    if todo:
        # Claims first: that the output cannot be written to is better known before the weights are loaded.
        with (
            claims(todo, config.batch, config.output) as batches,
            tqdm(total=len(todo), desc="pairs", unit="pair", disable=True if len(jobs) < 2 else None) as bar,
            ThreadPoolExecutor(1) as writer,  # which ends, also at an error or interrupt, with all it was given written
        ):

            def write(sampled: Sequence[Sampled], claim: ExitStack) -> None:
                with claim:  # until the results are there
                    for job, video, facts in sampled:
                        failure = video if isinstance(video, str) else _write(config, job, video, facts, patches_sha256)
                        if failure is None:
                            made.append(job)
                        else:
                            failures[job.pair.id] = failure
                            tqdm.write(f"failed  {job.pair.id}")
                settled = sum(job.made_since for job in todo) + len(failures) - failed_before  # by all processes
                bar.update(settled - bar.n)

            pipe = load_pipeline(config)
            writing: Future[None] | None = None
            for batch, claim in batches:
                for job in batch:
                    if found := _from(job, "measured"):
                        tqdm.write(f"{job.pair.id}: measured {', '.join(found)}")
                before, writing = writing, writer.submit(write, list(_sample(pipe, config, batch)), claim)
                if before is not None:
                    before.result()  # at most one batch waits while another is written
            if writing is not None:
                writing.result()
    folders = [job.folder for job in jobs if (job.folder / RECORD_FILE).is_file() and job.pair.id not in failures]
    others_made = sum(job.made_since for job in todo) - len(made)
    elsewhere = f", {others_made} made by another process" if others_made else ""
    print(
        f"{config.output}: {len(made)} generated, {len(jobs) - len(todo)} there already{elsewhere}, "
        f"{len(failures)} failed."
    )
    if failures:
        raise PairsFailed(folders, failures)
    return folders


def plan(config: InferConfig) -> str:
    """What `generate` would do, in words: the model, settings and their sources, and each pair with its UNet calls.

    The weights are not loaded, only the model's configs and the patches.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit or a setting cannot work.
    """
    config = on_its_model(config, config.patches)
    outline = outline_of(config)
    jobs = _jobs(config, outline, _pairs(config))
    lines = [f"model: {config.model} on {device_of(config)}, {dtype_name(config)}"]
    for (folder, scale), card in zip(patches_of(config), outline.cards.values()):
        shown = f"{scale[0]:g} forward, {scale[1]:g} backward" if isinstance(scale, tuple) else f"{scale:g}"
        lines.append(f"patch: {folder} at {shown}" + (f" ({card.domain})" if card.domain else ""))
    settings, sources = settings_of(config, outline)
    lines.append("sampler:")
    lines += [
        f"  {name} = measured of each pair" if sources[name] == "measured" else f"  {name} = {value} ({sources[name]})"
        for name, value in asdict(settings).items()
    ]
    lines.append(f"pairs: {len(jobs)}, of which {sum(job.done for job in jobs)} are there already")
    for job in jobs:
        details = ", ".join([f"seed={job.seed}", *_from(job, "manifest"), *_from(job, "measured")])
        calls = unet_calls(STRATEGIES[job.settings.sampler].plan(job.settings))
        state = "there already" if job.done else f"{calls} UNet calls"
        lines.append(f"  {job.pair.id}: {job.pair.start} to {job.pair.end}, {details}: {state}")
    return "\n".join(lines)


# Jobs ----------------------------------------------------------------------------------------------------------------


def _pairs(config: InferConfig) -> list[Pair]:
    if config.manifest is not None:
        return read_manifest(config.manifest)
    if config.loop is not None:
        return [Pair(id=config.loop.stem, start=config.loop, end=config.loop)]
    assert config.start is not None
    assert config.end is not None
    return [Pair(id=f"{config.start.stem}-{config.end.stem}", start=config.start, end=config.end)]


def _check_header(path: Path) -> None:
    """Find a file that is missing or no image without decoding the others.

    Raises:
        ValueError: as `load_image` does.
    """
    try:
        Image.open(path).close()
    except (OSError, ValueError, Image.DecompressionBombError):
        load_image(path)  # says what is wrong


def _from(job: Job, source: str) -> list[str]:
    """The settings of a job that come from there, as `name=value`."""
    values = asdict(job.settings)
    return [f"{name}={values[name]}" for name, own in job.sources.items() if own == source]


def _jobs(config: InferConfig, pipe: TimeReversalFusionPipeline, pairs: Sequence[Pair]) -> list[Job]:
    jobs = []
    for pair in pairs:
        settings, sources = settings_of(config, pipe, pair)
        pipe.latent_shape(settings, 1)  # refuses sizes that the VAE cannot make
        pipe.check_directions(settings, low_memory=config.low_memory)
        folder = config.output / pair.id
        there, made_at = folder.exists(), written_at(folder)  # in this order: another process may be writing it
        if there and made_at is None:
            raise ValueError(
                f"{folder} is there but holds no {RECORD_FILE}, so it is no result to replace; move it away."
            )
        seed = config.seed if pair.seed is None else pair.seed
        done = made_at is not None and not config.overwrite
        jobs.append(
            Job(pair=pair, settings=settings, sources=sources, seed=seed, folder=folder, made_at=made_at, done=done)
        )
    return jobs


# Pairs ---------------------------------------------------------------------------------------------------------------


Sampled = tuple[Job, np.ndarray | str, dict[str, Any]]
"""A job, its video `[F, H, W, 3]` in [0, 1] or why there is none, and what its record says of the sampling."""


def _sample(pipe: TimeReversalFusionPipeline, config: InferConfig, batch: Sequence[Job]) -> Iterator[Sampled]:
    """Sample a batch in one call."""
    began = time.perf_counter()
    first = batch[0].settings
    size = (first.height, first.width, config.fit)
    failure = None
    name = batch[0].pair.id if len(batch) == 1 else f"{len(batch)} pairs"
    pipe.set_progress_bar_config(desc=name, leave=False, disable=None)
    try:
        result = pipe(
            [fit_image(load_image(job.pair.start), *size) for job in batch],
            [fit_image(load_image(job.pair.end), *size) for job in batch],
            **{
                **asdict(first),
                "fps": [job.settings.fps for job in batch],
                "motion_bucket_id": [job.settings.motion_bucket_id for job in batch],
            },
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in batch],
            low_memory=config.low_memory,
            decode_chunk_size=config.decode_chunk_size,
            output_type="np",
        )
    except ValueError as error:
        failure = str(error)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        failure = (
            f"{first.num_frames} frames of {first.height}x{first.width} are too many for the device's memory; try "
            "low_memory=true, offload=true, a smaller decode_chunk_size, or a decode_tile_size."
        )
    if failure is not None and len(batch) > 1:  # one of them cannot be made, or not all at once
        for job in batch:  # not while the error is handled, which holds on to the memory of the call
            yield from _sample(pipe, config, [job])
        return
    if failure is not None:
        yield batch[0], failure, {}
        return
    facts = {
        "unet_calls": result.unet_calls,
        "unet_forwards": result.unet_forwards,
        "batch": len(batch),
        "seconds": round((time.perf_counter() - began) / len(batch), 3),
    }
    for job, video in zip(batch, result.frames):
        yield job, video, facts


def _write(
    config: InferConfig, job: Job, video: np.ndarray, facts: dict[str, Any], patches_sha256: list[Digest]
) -> str | None:
    """Write a job's result, or say why it is none."""
    try:
        frames = finite_frames(video, config)
    except ValueError as error:
        return str(error)
    record = {
        "id": job.pair.id,
        **recipe(config, job.images, job.settings, job.seed, patches_sha256),
        "sources": job.sources,
        "dtype": dtype_name(config),
        "versions": versions(),
        **facts,
    }
    write_result(job.folder, frames, job.settings.fps, record, save_frames=config.save_frames)
    return None
