"""Which settings two runs must share for one to continue the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..data_prep.dataset import load_clips
from ..data_prep.shapes import shapes_of
from ..trf.base import resolved_revision
from .plan import Plan

if TYPE_CHECKING:
    from ..configs.training import TrainConfig

# Settings a resumed run may change: they touch neither the weights, but for the rounding of what saves memory or time,
# nor the order of clips (steps: see below).
_FREE = {
    "output",
    "data",
    "cache",
    "steps",
    "log_every",
    "checkpoint",
    "validation",
    "loader_workers",
    "num_processes",
    "sampler",
    "dry_run",
    "domain",
    "wandb",
    "on_nonfinite",
    "gradient_checkpointing",
    "feed_forward_chunks",
    "compile",
}
# Their product is what counts, and is compared in their place.
_BATCH = {"batch_size", "gradient_accumulation"}


def binding_settings(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The settings two runs must share for one to continue the other, by dotted name."""
    values = dict(_leaves(config.model_dump(mode="json", exclude=_FREE | _BATCH)))
    clips = load_clips(config.data, "train")
    columns = ("clip_id", "fps", "motion_bucket", "height", "width")
    rows = [list(clips[name]) for name in columns]
    lengths = [shape.num_frames for shape in shapes_of(clips)]
    if len(set(lengths)) > 1:  # they decide the order; clips of one length have always been compared without it
        rows.append(lengths)
    values["clips in data"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    if (commit := resolved_revision(config.model, config.revision)) is not None:
        values["commit of the model"] = commit  # a branch may move between two starts
    values["clips per step"] = plan.clips_per_step
    # A constant rate does not look ahead, so such a run may be given more steps.
    return values if config.optim.schedule == "constant" else {**values, "steps": config.steps}


def validation_digest(config: TrainConfig) -> str:
    """Of the settings that decide what a validation measures: only those of one manner are to be compared."""
    own = config.validation.model_dump(mode="json", include={"pairs", "num_inference_steps", "seed"})
    sampler = config.sampler.model_dump(mode="json", exclude_none=True)
    return hashlib.sha256(json.dumps([own, sampler], sort_keys=True).encode()).hexdigest()[:12]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
