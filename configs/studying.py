"""The settings of `trfpp study`, apart from the rest: only who repeats the study needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .schema import Positive, SamplerName, SamplerOverrides, Settings
from .training import LoraSettings, ObjectiveSettings, OptimSettings

Domain = Literal["linear", "views", "loop", "irreversible", "control"]
Targets = Literal["temporal", "spatial", "all", "motion"]


class PatchTraining(Settings):
    """How every patch is trained."""

    steps: Positive = 250
    """Optimizer steps."""
    batch_size: Positive = 8
    """Clips a step; a patch for both directions sees each of them both ways."""
    lora: LoraSettings = LoraSettings(targets="all", rank=16, alpha=16)
    """The adapter."""
    optim: OptimSettings = OptimSettings(lr=1.5e-3, schedule="cosine", warmup_steps=30)
    """The optimizer and its schedule."""
    objective: ObjectiveSettings = ObjectiveSettings(sigma_mean=2.5, sigma_std=1.2)
    """The noise: more than SVD's own training, since where things go is decided there."""
    seed: int = 0
    """Of the initial weights, the order of clips and every draw."""


class FullTraining(Settings):
    """How all weights are fine-tuned, on the same clips in the same order and batches, with the same noise."""

    steps: Positive = 250
    """Optimizer steps."""
    optim: OptimSettings = OptimSettings(lr=5e-4, schedule="cosine", warmup_steps=30)
    """The optimizer; adamw along a cosine."""


class Variants(Settings):
    """Other ways to train the forward/backward pair, to be set against it."""

    worlds: list[Domain] = Field(default=[])
    """Domains in which they are."""
    fusion: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the fused loss in the one that is trained for its fusion; the other has rotated attention."""


class Longer(Settings):
    """The forward/backward pair, trained longer: from where it ended, on more films and for its fusion."""

    worlds: list[Domain] = Field(default=["linear", "views", "loop"])
    """Domains in which it is; none leaves it out."""
    steps: Positive = 2000
    """Optimizer steps beyond those of the pair, of a schedule of their own."""
    films: Positive = 2048
    """Films that it is trained on, those of the pair among them."""
    fusion: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the fused loss."""


class Sweeps(Settings):
    """One setting at a time, from the pair of adapters that every domain gets."""

    worlds: list[Domain] = Field(default=["linear"])
    """Domains that are swept; none leaves the sweeps out."""
    pairs: Positive = 32
    """Held-out pairs of a sweep's points, the first ones."""
    scales: list[Annotated[float, Field(ge=0)]] = Field(default=[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
    """Strengths of the patch; 0 is the base."""
    targets: list[Targets] = Field(default=["temporal", "spatial", "all", "motion"])
    """What the adapter acts on."""
    ranks: list[Positive] = Field(default=[4, 16, 64])
    """Ranks of the update; alpha / rank stays."""
    clips: list[Positive] = Field(default=[8, 32, 128, 512])
    """Numbers of training clips, the first ones."""
    factors: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5, 0.7, 1, 1.4, 2])
    """What the sampler is told, over what was measured: of the fps, and of the motion bucket (255 at most)."""


class Sampling(Settings):
    """Ways of sampling, set against each other on the base and on the pair (if there is one, that trained longer)."""

    worlds: list[Domain] = Field(default=["linear", "views", "loop", "irreversible", "control"])
    """Domains in which they are; none leaves them out."""
    pairs: Positive = 16
    """Held-out pairs, the last ones: trf++ was made by what the first ones of two domains had shown."""
    samplers: list[SamplerName] = Field(default=["trf++", "trf", "vibid", "mpd-seq", "mpd-par", "gi"], min_length=1)
    """Samplers as their authors use them, the one that the others are set against first."""


class StudyConfig(Settings):
    """Prove in numbers what a domain patch does: films, patches, evaluations, and a report of what is done so far."""

    output: Path
    """Folder of everything made. Run the same command again to go on."""
    model: str = "miniature"
    """Base model: `miniature`, a local diffusers folder, or a hub id."""
    worlds: list[Domain] = Field(default=["linear", "views", "loop", "irreversible", "control"])
    """Domains, the most telling first."""
    train_films: Positive = 512
    """Films that a domain's patches are trained on."""
    pairs: Positive = 64
    """Films held out of each domain, of which the bounds are given and the rest is compared."""
    num_frames: Annotated[int, Field(ge=3)] = 12
    """Frames of a film."""
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 64
    """Pixels of the side of the square frames."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of the films."""
    patch: PatchTraining = PatchTraining()
    """How every patch is trained."""
    full: FullTraining | None = FullTraining()
    """How all weights are fine-tuned; null leaves it out."""
    longer: Longer = Longer()
    """The forward/backward pair, trained longer."""
    variants: Variants = Variants()
    """Other ways to train the forward/backward pair."""
    sampler: SamplerOverrides = SamplerOverrides(sampler="trf++")
    """The sampler, the same for all methods; fps and motion bucket are each pair's own."""
    sampling_seed: int = 42
    """Of every draw of the sampler; all methods start a pair from the same noise."""
    batch: Positive = 8
    """Pairs sampled at a time; up to rounding results do not depend on it."""
    forgetting: bool = True
    """Measure the pair of each domain, and the one trained longer, on the base world too."""
    sampling: Sampling = Sampling()
    """Ways of sampling."""
    sweeps: Sweeps = Sweeps()
    """One setting at a time."""
    sheets: Annotated[int, Field(ge=0)] = 2
    """Contact sheets of each domain in the report, one a pair."""
    only: list[str] = Field(default_factory=list)
    """Patterns of names, such as eval/linear-*: do these runs and what they need; all by default."""
    jobs: Positive = 1
    """Runs done at once, each in a process of its own: as many as cores on a CPU, several to keep a GPU busy."""
    hours: Annotated[float, Field(ge=0)] | None = None
    """Start no further run after so long; 0 writes the report only."""
    report: Path | None = None
    """Folder of report.md and its figures; by default `report` in the output folder."""
    dry_run: bool = False
    """Print the runs with what they need and cost, and stop."""

    def worlds_of(self, part: Variants | Longer | Sweeps | Sampling) -> list[Domain]:
        """The domains of a part that are among the study's."""
        return [world for world in part.worlds if world in self.worlds]

    @model_validator(mode="after")
    def _can_be_compared(self) -> StudyConfig:
        if self.sampler.measured:
            raise ValueError(f"sampler.{self.sampler.measured[0]}=auto: bases and baselines have no calibration")
        objective = self.patch.objective
        if objective.fusion or objective.alternate_directions or objective.rotated_attention:
            raise ValueError(
                "patch.objective is for forward patches too, and fusion, alternate_directions and rotated_attention "
                "are not; variants.worlds has a pair trained for its fusion, and one with rotated attention"
            )
        if self.patch.lora.init != "plain":
            raise ValueError(
                f"patch.lora.init={self.patch.lora.init}: the pair trained longer starts from the pair; leave it out"
            )
        return self
