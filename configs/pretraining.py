"""The settings of `trfpp pretrain`, apart from the rest: only who builds a miniature needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .schema import Fraction, Positive, Settings

Above = Annotated[float, Field(gt=0)]


class AutoencoderSettings(Settings):
    """The autoencoder (AutoencoderKLTemporalDecoder)."""

    block_out_channels: tuple[Positive, ...] = (64, 64, 64, 64)
    """Channels of each level, multiples of 32; every level after the first halves height and width."""
    latent_channels: Positive = 16
    """Channels of the latents."""
    steps: Positive = 3000
    """Optimizer steps."""
    batch_size: Positive = 8
    """Windows of films a step."""
    lr: Above = 5e-4
    """Peak learning rate."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.05
    """Noise on the latents that the decoder learns to bear, in their standard deviations."""
    moment_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Pull of every latent channel to zero mean and unit variance."""


class ImageEncoderSettings(Settings):
    """The image encoder (CLIPVisionModelWithProjection)."""

    width: Positive = 64
    """Channels."""
    layers: Positive = 3
    """Transformer layers."""
    projection_dim: Positive = 64
    """Size of the embedding; the UNet's context has the same."""
    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 128
    """Films a step, two frames of each."""
    lr: Above = 1e-3
    """Peak learning rate."""


class UNetSettings(Settings):
    """The UNet (UNetSpatioTemporalConditionModel)."""

    block_out_channels: tuple[Positive, ...] = (96, 96)
    """Channels of each level, multiples of 32."""
    layers_per_block: Positive = 1
    """Residual blocks, each with attention, of a level."""
    context_dim: Positive = 64
    """Size of the image embedding."""
    steps: Positive = 20000
    """Optimizer steps."""
    batch_size: Positive = 16
    """Films a step."""
    lr: Above = 7e-4
    """Peak learning rate."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are the ones kept."""


class PretrainObjective(Settings):
    """SVD's objective."""

    sigma_mean: float = 0.7
    """Mean of ln sigma of the noise on the video."""
    sigma_std: Above = 1.6
    """Standard deviation of that ln sigma."""
    noise_aug_mean: float = -3.0
    """Mean of ln sigma of the noise on the conditioning image."""
    noise_aug_std: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of that ln sigma."""
    conditioning_dropout: Fraction = 0.1
    """Fraction of samples without conditions, for guidance."""


class AppraisalSettings(Settings):
    """What the model can do, on films that no run trains on: appraisal/ in the output folder."""

    films: Annotated[int, Field(ge=0)] = 16
    """Films of every world to rebuild, and of base to animate at each of 15 settings; 0 measures nothing."""
    num_inference_steps: Positive = 10
    """Denoising steps of a video."""


class PretrainConfig(Settings):
    """Build a miniature SVD from nothing: render films, then train autoencoder, image encoder and UNet."""

    output: Path
    """Folder of the run: films, checkpoints, curves, and the model. Run the same command again to resume."""
    seed: int = 0
    """Of the films, the weights and every draw."""
    num_frames: Annotated[int, Field(ge=4)] = 12
    """Frames of a film."""
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 64
    """Height and width, pixels; a multiple of what the levels of the autoencoder halve it by."""
    varied_films: Positive = 4096
    """Films of all worlds, for autoencoder and image encoder."""
    base_films: Positive = 16384
    """Films of the base world, for the UNet."""
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    """The autoencoder."""
    image_encoder: ImageEncoderSettings = ImageEncoderSettings()
    """The image encoder."""
    unet: UNetSettings = UNetSettings()
    """The UNet."""
    objective: PretrainObjective = PretrainObjective()
    """SVD's objective."""
    appraisal: AppraisalSettings = AppraisalSettings()
    """Measurement of the model at the end."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of the UNet's arithmetic; no is float32. The weights are always float32."""
    compile: bool = False
    """Compile the UNet's training: minutes before its first step, faster from there on. Needs a C++ compiler."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 50
    """Steps between lines of a stage's curve."""
    render_workers: Positive | None = None
    """Processes that render films; one a processor by default."""
    device: str | None = None
    """Such as cuda, cuda:1, mps, cpu; the best there is by default."""

    @model_validator(mode="after")
    def _size_can_be_halved(self) -> PretrainConfig:
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        if self.size % factor:
            raise ValueError(f"size={self.size}: the autoencoder's levels need a multiple of {factor}")
        return self
