"""The settings of `trfpp train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .schema import Fraction, OnModel, Positive, SamplerOverrides, Settings


class LoraSettings(Settings):
    """The adapter."""

    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    """lora; dora (magnitude trained apart from direction); loha and lokr (Hadamard and Kronecker products)."""
    targets: str = "temporal"
    """temporal, spatial, all, motion (temporal to_v and to_out only), conv (the residual blocks), all_conv (both), or a
    regular expression over module names."""
    rank: Positive = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale of the update is alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    init: Literal["plain", "pissa", "loftq"] = "plain"
    """plain (the update is zero), pissa (the weights' principal part, of which the base keeps the rest), loftq (what
    quantization takes from the weights). A patch that did not start plain is saved with twice the rank."""


class ObjectiveSettings(Settings):
    """SVD's objective; change it only for experiments."""

    sigma_mean: float = 0.7
    """Mean of ln sigma of the noise on the video."""
    sigma_std: Annotated[float, Field(gt=0)] = 1.6
    """Standard deviation of that ln sigma."""
    conditioning_dropout: Fraction = 0.1
    """Fraction of samples that see neither image nor embedding, so that guidance keeps working."""
    fusion: Fraction = 0.0
    """Share of the loss on what TRF makes of both directions' estimates, mixed as by the sampler; direction=both."""
    alternate_directions: bool = False
    """Take the gradient of one direction a step, in turn: half the activations in memory; direction=both."""
    rotated_attention: bool = False
    """Let backward rows attend in time as their forward rows do, turned by 180 degrees (Generative Inbetweening), in
    training and in the sampler; direction=backward or both."""


class OptimSettings(Settings):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "prodigy", "adamw_schedulefree"] = "adamw"
    """adamw; adamw8bit keeps its state in 8 bits, and paged_adamw8bit moves it off a full GPU (bitsandbytes); prodigy
    finds the rate by itself (set lr=1); adamw_schedulefree needs no schedule, and leaves averaged weights."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    lora_plus: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: how many times faster the matrices that start at zero are trained; 16 is usual, 1 is plain."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    cycles: Positive = 1
    """Of cosine_with_restarts."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of polynomial; 1 is linear."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient's norm to this."""


class CheckpointSettings(Settings):
    """What is saved during training."""

    every: Positive = 500
    """Optimizer steps between checkpoints."""
    keep: Positive = 3
    """Newest checkpoints kept; an older one goes only once a newer is complete."""


class ValidationSettings(Settings):
    """Bounded generation with the patch during training."""

    every: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps between validations; 0 switches them off."""
    pairs: Positive = 2
    """Held-out clips whose first and last frame are joined."""
    num_inference_steps: Positive = 30
    """Denoising steps at most; the sampler's own, or those of sampler.*, if they are fewer."""
    seed: int = 42
    """The same noise every time, so that pictures compare."""
    decode_chunk_size: Positive = 8
    """Frames decoded at a time, with two neighbours on either side: fewer where memory is short."""
    best: Literal["inner_psnr", "bound_psnr", "disagreement", "loss", "loss_fused"] = "inner_psnr"
    """By which the best patch so far is kept in best/."""
    patience: Positive | None = None
    """Stop after so many validations without a better one; null goes on to the last step."""


class TrainConfig(OnModel):
    """Fit a LoRA patch onto SVD's UNet."""

    data: Path
    """Dataset folder, as written by prep."""
    output: Path
    """Folder of the run: patch, checkpoints, log, resolved settings. Run the same command again to resume."""
    wandb: bool = False
    """Log to Weights & Biases too (needs its package), under the project trfpp."""
    domain: str = ""
    """What the clips show, in words, for the patch card."""
    direction: Literal["forward", "backward", "both", "either"] = "forward"
    """Which way clips run: forward as filmed, backward reversed in time (for the half of TRF that comes from the end
    frame), both (two adapters, one each way), either (one adapter, each clip by a coin)."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """SVD's objective."""
    optim: OptimSettings = OptimSettings()
    """The optimizer and its schedule."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that the patch gets, such as 0.999; 0 gives it the last weights."""
    start_from: Path | None = None
    """Patch folder whose weights the adapter starts from; it must have the same adapter settings and direction."""
    steps: Positive = 2000
    """Optimizer steps."""
    batch_size: Positive = 1
    """Clips a process sees at a time."""
    gradient_accumulation: Positive = 1
    """Batches a process sums up before a step."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the frozen UNet and of the arithmetic; no is float32. The adapter is always float32."""
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the frozen UNet's weights in fewer bits: nf4 or int8 those of the transformer blocks (bitsandbytes), fp8 all
    of linear layers and convolutions. They are widened for every use: less memory, more time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    feed_forward_chunks: Positive = 1
    """Do the widest layers in so many parts, each recomputed by itself: less memory, more time."""
    compile: bool = False
    """Compile the UNet's transformer blocks, which takes a minute or more at first: for GPUs. Needs a C++ compiler."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a loss or gradient is not finite: stop, or skip that step (every step then waits for the device). Either
    way the clips are named when the log is written or a checkpoint saved, and nothing broken is saved. In fp16 a
    gradient that overflows is always skipped. A run whose last 20 steps were all skipped stops."""
    seed: int = 0
    """Of the initial weights, the order of clips and every draw."""
    num_processes: Positive | None = None
    """Stop unless training runs on exactly so many processes."""
    loader_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read the cache ahead of training; 0 reads in the loop."""
    cache: Path | None = None
    """Folder of the conditioning; by default the dataset's cache for this model, made first if there is none."""
    log_every: Positive = 10
    """Optimizer steps between log entries."""
    sampler: SamplerOverrides = SamplerOverrides()
    """Sampler settings the patch card is to recommend, over the clips' own size, fps and motion."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """What is saved during training."""
    validation: ValidationSettings = ValidationSettings()
    """Bounded generation with the patch during training."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    @model_validator(mode="after")
    def _go_together(self) -> TrainConfig:
        kind, optim = self.lora.kind, self.optim
        products = kind in ("loha", "lokr")
        if products and (self.lora.rslora or self.lora.dropout):
            raise ValueError(
                f"lora.kind={kind} knows neither rslora nor dropout; leave them out, or choose lora or dora"
            )
        if products and optim.lora_plus != 1:
            raise ValueError(f"lora.kind={kind} has no second matrices for optim.lora_plus; choose lora or dora")
        if self.quantization in ("nf4", "int8") and products:
            raise ValueError(f"lora.kind={kind} needs whole weights, not {self.quantization}; choose fp8, or lora")
        if self.quantization == "int8" and kind == "dora":
            raise ValueError("lora.kind=dora needs the norm of the weights, which int8 cannot give; choose nf4 or fp8")
        self._can_start()
        if optim.name == "prodigy" and optim.lora_plus != 1:
            raise ValueError("optim.name=prodigy has one rate for all; leave optim.lora_plus out, or choose adamw")
        objective = self.objective
        if (objective.fusion or objective.alternate_directions) and self.direction != "both":
            raise ValueError("objective.fusion and alternate_directions are about two adapters; set direction=both")
        if objective.rotated_attention and self.direction not in ("backward", "both"):
            raise ValueError("objective.rotated_attention is about backward clips; set direction=backward or both")
        if objective.rotated_attention and objective.alternate_directions:
            raise ValueError("objective.rotated_attention needs both directions in one call; no alternate_directions")
        if self.compile and (
            self.direction == "both"
            or objective.rotated_attention
            or (kind, self.lora.init) != ("lora", "plain")
            or self.feed_forward_chunks > 1
            or self.quantization is not None
        ):
            raise ValueError(
                "compile is for one direction at a time, without rotated_attention, with lora.kind=lora and "
                "lora.init=plain, without quantization and feed_forward_chunks; leave it out"
            )
        if self.sampler.measured:
            raise ValueError(
                f"sampler.{self.sampler.measured[0]}=auto: a card recommends numbers, and holds what it takes to "
                "measure without being asked; give auto to trfpp infer"
            )
        sampler = self.sampler.sampler
        if objective.rotated_attention and sampler in ("vibid", "mpd-seq", "mpd-par"):
            raise ValueError(
                f"sampler.sampler={sampler} asks for one direction at a time, and objective.rotated_attention needs "
                "both in one call; choose trf++, trf or gi"
            )
        if self.sampler.patch_frames and self.feed_forward_chunks > 1:
            raise ValueError("sampler.patch_frames needs all frames in a layer; leave feed_forward_chunks out")
        if self.validation.best == "disagreement" and sampler in ("vibid", "mpd-seq"):
            raise ValueError(
                f"validation.best=disagreement: sampler.sampler={sampler} never sees both halves at once; choose "
                "another"
            )
        if self.validation.best == "loss_fused" and self.direction != "both":
            raise ValueError("validation.best=loss_fused is about two adapters; set direction=both")
        if optim.name == "prodigy" and optim.lr < 0.1:
            raise ValueError(
                f"optim.name=prodigy finds the rate itself, and lr={optim.lr:g} is a factor on it; set optim.lr=1"
            )
        if optim.name == "adamw_schedulefree" and (optim.schedule != "constant" or self.ema):
            raise ValueError(
                "optim.name=adamw_schedulefree averages the weights itself; optim.schedule must be constant and ema 0"
            )
        if optim.name in ("prodigy", "adamw_schedulefree") and objective.alternate_directions:
            raise ValueError(
                f"optim.name={optim.name} counts steps that objective.alternate_directions gives to the other adapter; "
                "leave one out"
            )
        return self

    def _can_start(self) -> None:
        lora, init = self.lora, self.lora.init
        if init == "plain":
            return
        if lora.kind != "lora":
            raise ValueError(f"lora.init={init} is for lora.kind=lora, not {lora.kind}; choose plain, or lora")
        if self.start_from is not None:
            raise ValueError(f"lora.init={init} and start_from both say where the adapter starts; leave one out")
        if init == "loftq" and self.quantization is None:
            raise ValueError("lora.init=loftq makes up for what quantization takes; set quantization, or choose pissa")
        if self.sampler.patch_schedule or self.sampler.patch_frames:
            raise ValueError(
                f"lora.init={init} trains parts of the base itself, which sampler.patch_schedule and patch_frames "
                "would weaken in validation; leave them out here, and give them to the finished patch"
            )
        if init == "pissa" and lora.dropout:
            raise ValueError("lora.init=pissa with lora.dropout would drop parts of the base itself; leave one out")
