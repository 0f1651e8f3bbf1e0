"""The settings of every command, as strict pydantic models: field, type, default, meaning and unit in one place.

Only names and values live here. What a setting does is decided in the folder that uses it, so nothing heavy is imported
and `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
SamplerName = Literal["trf", "trf++", "trf-reference", "gi", "vibid", "mpd-seq", "mpd-par"]


class Settings(BaseModel):
    """Base of all settings: unknown keys and wrong types are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    def save(self, file: Path, command: str) -> None:
        """Write the settings as a YAML file that can be given to the command as CONFIG."""
        file.write_text(f"# trfpp {command}\n{self.as_yaml()}", encoding="utf-8")

    def as_yaml(self) -> str:
        """All settings as YAML, loadable again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class OnModel(Settings):
    """Commands that work on an SVD model."""

    model: str
    """`miniature` (built in), a local diffusers folder, or a hub id such as
    stabilityai/stable-video-diffusion-img2vid-xt."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    variant: str | None = None
    """File variant of a hub model, such as fp16."""


class OnPatch(OnModel):
    """Commands that work on patches, which know the model they were made for."""

    model: str = ""
    """`miniature` (built in), a local diffusers folder, or a hub id; by default the model that the (first) patch was
    made for."""


class PrepConfig(Settings):
    """Cut videos and image sequences into a dataset of clips."""

    source: Path
    """Folder of videos, searched through; a folder of images only counts as one sequence."""
    output: Path
    """Folder of the dataset."""
    fps: Annotated[float, Field(gt=0)] | None = 7.0
    """Frames per second of the clips; frames are chosen by their timestamps. null: every frame counts, at the rate that
    each source has."""
    num_frames: int | list[int] = 25
    """Frames of a clip, at least 2. Of several, such as [25,14], each uncut stretch gets the largest of which a clip
    fits."""
    height: Positive = 576
    """Pixels."""
    width: Positive = 1024
    """Pixels."""
    sizes: list[str] | None = None
    """Several sizes as WIDTHxHEIGHT, such as [1024x576,576x1024], in place of height and width: each source is put into
    the one of the nearest aspect ratio."""
    fit: Literal["crop", "pad"] = "crop"
    """Centre crop to the aspect ratio, or pad with black."""
    stride_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds from one clip's start to the next; by default clips do not overlap."""
    cut_threshold: Annotated[float, Field(gt=0)] = 27.0
    """Change of content (0 to 255) that counts as a cut; clips never straddle one."""
    min_motion: Annotated[float, Field(ge=0)] | None = None
    """Drop clips with a lower motion score (percent of the diagonal per second)."""
    max_motion: Annotated[float, Field(ge=0)] | None = None
    """Drop clips with a higher motion score (percent of the diagonal per second)."""
    max_clips_per_video: Positive | None = None
    """Keep at most so many clips of one video, spread evenly."""
    holdout: Fraction = 0.1
    """Fraction of all clips kept for validation, from the ends of the videos; 1 keeps all of them."""
    sequence_fps: Annotated[float, Field(gt=0)] = 24.0
    """Frames per second of image sequences, which carry no times."""
    image_format: Literal["png", "jpeg"] = "png"
    """How frames are stored: png is exact, jpeg (quality 95) about five times smaller."""
    overwrite: bool = False
    """Replace a dataset that is there."""
    dry_run: bool = False
    """Print what would be cut, write nothing."""


class CacheConfig(OnModel):
    """Precompute the VAE latents and CLIP embeddings of a dataset, so that training loads neither model."""

    data: Path
    """Dataset folder, as written by prep."""
    augmentations: Positive = 4
    """Differently noised encodings of each bound; training draws one of them."""
    noise_aug_mean: float = -3.0
    """Mean of ln sigma of the noise on the conditioning image (SVD: -3)."""
    noise_aug_std: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of that ln sigma (SVD: 0.5)."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision the encoders run in; no is float32. A VAE that asks for float32 gets it."""
    chunk: Positive = 8
    """Frames the VAE encodes at a time."""
    seed: int = 0
    """Of the augmentation noise."""
    device: str | None = None
    """Such as cuda, cuda:1, mps, cpu; the best there is by default."""
    overwrite: bool = False
    """Encode again what is there."""


class SamplerOverrides(Settings):
    """The sampler. What is not set comes from the patch card, else the model, the sampler's authors, TRF's release."""

    height: Positive | None = None
    """Pixels. Unset: the card's, else the model's (576 for SVD)."""
    width: Positive | None = None
    """Pixels. Unset: the card's, else the model's (1024 for SVD)."""
    num_frames: Annotated[int, Field(ge=2)] | None = None
    """Frames of the video, both bounds included. Unset: the card's, else the model's (25 for SVD-XT)."""
    num_inference_steps: Positive | None = None
    """Denoising steps. Unset: the card's, else the sampler's own (50 of trf, 12 of trf++)."""
    fps: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    """Frames per second, told to the model and used for the file; auto (infer and evaluate): what the patch's clips say
    of such a pair. Unset: the card's, else 7."""
    motion_bucket_id: Annotated[float, Field(ge=0, le=255)] | Literal["auto"] | None = None
    """Amount of motion asked of the model, 0 to 255; auto (infer and evaluate): what the patch's clips say of such a
    pair. Unset: the card's, else 127."""
    noise_aug_strength: Annotated[float, Field(ge=0)] | None = None
    """Noise on the bounds, in units of [-1, 1] pixels. Unset: 0.02."""
    min_guidance_scale: float | None = None
    """Guidance at the frame of the condition. Unset: the sampler's own, 1 of trf and trf++."""
    max_guidance_scale: float | None = None
    """Guidance at the far frame; 1 or less switches guidance off. Unset: the sampler's own, 3 of trf and trf++. vibid
    and MPD have one scale for all frames, said by either setting, and guide unless it is 1."""
    min_guidance_sigma: Annotated[float, Field(ge=0)] | None = None
    """Least noise (sigma) at which guidance is done; steps without it cost half, but for samplers with CFG++. Unset: 1
    for trf++, else 0."""
    max_guidance_sigma: Annotated[float, Field(ge=0)] | None = None
    """Most noise at which guidance is done. Unset: 20 for trf++, else no limit."""
    jump_length: Positive | None = None
    """trf: noise levels a re-noising run goes back. Unset: 5."""
    jump_n_sample: Positive | None = None
    """trf: times the levels after an anchor are denoised; 1 switches re-noising off. Unset: 2."""
    repeat_step_ratio: Fraction | None = None
    """trf: re-noise while at least this fraction of the steps remains. Unset: 0.8."""
    noise_scale_ratio: Annotated[float, Field(ge=0)] | None = None
    """Factor on the re-noising noise. Unset: 1."""
    patch_schedule: list[tuple[float, float]] | None = None
    """Strength of all patches over noise: points [sigma, factor], linear in ln sigma between them. [[1,0.5],[10,1]]
    halves it at low noise, where detail is decided."""
    patch_frames: list[tuple[float, float]] | None = None
    """Strength of all patches over the film: points [place, factor], place 0 at the start and 1 at the end, linear
    between them. [[0,0],[0.5,1],[1,0]] keeps the frames near the bounds to the base model."""
    sampler: SamplerName | None = None
    """trf++: few steps, the bounds held; trf: the paper's; trf-reference: its release's exact behaviour; gi: Generative
    Inbetweening; vibid: ViBiDSampler; mpd-seq and mpd-par: MPD. Films take trf and trf++. Unset: the card's, else
    trf++."""

    @property
    def measured(self) -> list[str]:
        """The settings that are to be measured of each pair."""
        return [name for name in ("fps", "motion_bucket_id") if getattr(self, name) == "auto"]


class SamplingConfig(OnPatch):
    """Commands that sample with TRF."""

    patches: list[Path] = Field(default_factory=list)
    """Patch folders to load, all active at once."""
    scales: list[float | tuple[float, float]] = Field(default_factory=list)
    """Strength of each patch, in their order; 1 by default. A pair is for the forward and the backward half of TRF."""
    sampler: SamplerOverrides = SamplerOverrides()
    """What is not set comes from the patch card, else the model, the sampler's authors, TRF's release."""
    fit: Literal["crop", "pad"] = "crop"
    """Centre crop the bounds to the video's aspect ratio, or pad with black."""
    precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the model; float32 on a CPU and fp16 elsewhere by default."""
    device: str | None = None
    """Such as cuda, cuda:1, mps, cpu; the best there is by default."""
    offload: bool = False
    """Keep on the GPU only the component in use."""
    low_memory: bool = False
    """UNet passes of one row a video in place of one pass of all rows of an iteration (four where guided, else two):
    less memory."""
    decode_chunk_size: Positive = 8
    """Frames the VAE decodes at a time, besides two neighbours on either side."""
    fuse: bool = False
    """Add the patches to the model's weights before sampling: they then cost nothing per step, at the rounding of the
    model's precision. What differs between the halves, as a pair of adapters does, keeps weights for either: memory."""
    decode_tile_size: Annotated[int, Field(ge=64)] | None = None
    """Pixels of the side of the tiles that the VAE decodes frames in, blended where they meet, for less memory; whole
    frames by default."""
    compile: bool = False
    """Compile the UNet's transformer blocks, which takes a minute or more before the first pair: for many pairs on a
    GPU. Needs a C++ compiler."""

    @model_validator(mode="after")
    def _scale_of_each_patch(self) -> SamplingConfig:
        if len(self.scales) not in (0, len(self.patches)):
            raise ValueError(f"{len(self.scales)} scales for {len(self.patches)} patches: give one each, or none")
        if self.fuse and not self.patches:
            raise ValueError("fuse=true adds patches to the weights, but there are none; give patches, or leave it out")
        return self


class InferConfig(SamplingConfig):
    """Generate the video between two frames, a loop, or every pair of a manifest."""

    output: Path
    """Folder the results go to: one folder a pair, with video, frames and a JSON file to repeat it by."""
    start: Path | None = None
    """First frame (image file)."""
    end: Path | None = None
    """Last frame (image file)."""
    loop: Path | None = None
    """One frame that is first and last: a seamless loop."""
    manifest: Path | None = None
    """CSV or JSONL file of pairs: start and end (or loop), optionally id, fps, motion_bucket_id, num_frames, height and
    width, seed."""
    seed: int = 42
    """Of every draw; each pair starts from it anew, so results do not depend on their order."""
    batch: Positive = 1
    """Pairs of one shape sampled at a time: faster where a single one leaves the device idle, for more memory. Results
    may differ in rounding from those made one by one."""
    save_frames: bool = True
    """Write PNG frames beside the video."""
    overwrite: bool = False
    """Generate again what is there: in one go, by one process."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    @model_validator(mode="after")
    def _one_source(self) -> InferConfig:
        pair = self.start is not None or self.end is not None
        if pair and (self.start is None or self.end is None):
            raise ValueError("give both start and end, or loop for one image")
        if pair + (self.loop is not None) + (self.manifest is not None) != 1:
            raise ValueError("give exactly one of: start and end, loop, manifest")
        return self


class FilmConfig(SamplingConfig):
    """Generate one film of any length through any number of keyframes; the model sees sampler.num_frames at a time."""

    keyframes: Annotated[list[Path], Field(min_length=1)]
    """Images the film goes through, in their order: two or more, or one of a closed film."""
    times: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Frame of the film at which each is shown; the first at 0."""
    closed: bool = False
    """After its last frame the film goes on with its first, through the seam too; say frames."""
    frames: Positive | None = None
    """Frames of a closed film; another ends with its last keyframe."""
    output: Path
    """Folder of the film: video, frames and a JSON file to repeat it by."""
    seed: int = 42
    """Of every draw."""
    save_frames: bool = True
    """Write PNG frames beside the video."""
    overwrite: bool = False
    """Generate again what is there."""
    dry_run: bool = False
    """Print the resolved plan and stop."""


class ExportConfig(OnPatch):
    """Write a patch in the form another tool reads, and check what was written."""

    patch: Path
    """Patch folder."""
    output: Path
    """Folder (peft, merged) or .safetensors file (diffusers)."""
    format: Literal["peft", "diffusers", "merged"] = "peft"
    """peft: adapter folder. diffusers: one safetensors file with alpha. merged: the UNet with the patch added in."""
    direction: Literal["forward", "backward"] | None = None
    """Which adapter of a patch trained in both directions: needed for diffusers and merged, which hold one."""
    scale: float = 1.0
    """Strength of the patch in the merged UNet."""
    overwrite: bool = False
    """Replace what is there."""


class EvaluateConfig(SamplingConfig):
    """Measure TRF, or a baseline, on held-out pairs whose truth is known."""

    data: Path
    """Dataset folder, as written by prep, of which the held-out pairs are taken; or a manifest of pairs with truth."""
    output: Path
    """Folder of the results: metrics.jsonl, summary.json, sheet.png. Run the same command again to go on."""
    pairs: Positive | None = None
    """Take so many pairs, the first ones; all by default."""
    batch: Positive = 1
    """Pairs of one shape sampled at a time, for a model so small that one leaves the device idle (the study of the
    miniature takes 8). Up to rounding results do not depend on it."""
    baseline: Literal["cross_fade", "flow_warp"] | None = None
    """Measure this in place of a model."""
    reconstruct: bool = False
    """Measure the truth as the model's VAE gives it back: the best that any sampling can reach."""
    loop: bool = False
    """Take the first frame of each pair for both bounds."""
    truth: Path | None = None
    """Ground truth of procedural films (truth.jsonl, as written by worlds), to measure where things and cameras are."""
    seed: int = 42
    """Of every draw; each pair has draws of its own, whatever its place."""
    save_videos: bool = False
    """Write each video, as videos/<pair>.mp4."""
    overwrite: bool = False
    """Measure again what is there."""

    @model_validator(mode="after")
    def _one_maker(self) -> EvaluateConfig:
        if self.baseline is not None and self.sampler.measured:
            raise ValueError(f"sampler.{self.sampler.measured[0]}=auto is for what is sampled, not for a baseline")
        if self.baseline is not None and (self.reconstruct or self.model or self.patches):
            raise ValueError("a baseline needs no model: give baseline, or reconstruct, or a model with patches")
        if self.reconstruct and self.patches:
            raise ValueError("reconstruct=true measures the VAE, which no patch changes; give model, without patches")
        return self


class CompareConfig(Settings):
    """Set two evaluations of the same pairs against each other, with an interval for every difference."""

    a: Path
    """Output folder of an evaluation."""
    b: Path
    """Output folder of another one; pairs that only one of them has are left out."""
    contrast: Literal["difference", "ratio"] = "difference"
    """Compare the means as b - a or as b / a."""
    seed: int = 0
    """Of the resampling."""


class WorldsConfig(Settings):
    """Make procedural films with known ground truth, to try things without footage."""

    world: Literal["base", "linear", "views", "loop", "irreversible", "control"]
    """base: little motion of every kind; linear: travellers; views: a camera around solids; loop: circling comets;
    irreversible: what cannot run backwards; control: discs that go round either way, which nothing shows."""
    output: Path
    """Folder of the films and of truth.jsonl."""
    count: Positive
    """Number of films."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the world; film i depends on it and on i alone."""
    first: Annotated[int, Field(ge=0)] = 0
    """Number of the first film, so that held-out ones can be others of the same world."""
    num_frames: Annotated[int, Field(ge=2)] = 12
    """Frames of a film."""
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 64
    """Pixels of the side of the square frames."""
    overwrite: bool = False
    """Replace films that are there."""

    @property
    def films(self) -> dict[str, Any]:
        """Which films, as `write_world` and `holds_films` are told."""
        return {**self.model_dump(include={"world", "count", "seed", "num_frames", "first"}), "side": self.size}


class QuickstartConfig(Settings):
    """Make films, train a patch, measure what it gains, generate with it, and export it: all on the miniature."""

    output: Path = Path("runs/quickstart")
    """Folder of everything made."""
    steps: Positive = 150
    """Optimizer steps of the patch; about a second each."""
    pairs: Positive = 16
    """Held-out pairs the gain is measured on."""
    seed: int = 0
    """Of the films, of training and of sampling."""
