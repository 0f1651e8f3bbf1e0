"""Single frames: loading, fitting to a size, to and from model tensors. Inference uses the same copy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..trf.images import as_rgb

FitMode = Literal["crop", "pad"]


def load_image(path: str | Path) -> Image.Image:
    """Load an image as 8-bit RGB, upright by its EXIF orientation; see `images.as_rgb`.

    Raises:
        ValueError: if the file is missing or no readable image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable image ({error})"
        raise ValueError(f"{path}: {reason}; give a PNG or JPEG file.") from None
    return as_rgb(image)


def fit_image(image: Image.Image, height: int, width: int, mode: FitMode = "crop") -> Image.Image:
    """Resize an RGB image to `height` x `width` without changing its aspect: cut the overhang off, or pad with black.

    Lanczos as Pillow does it, whose kernel widens when shrinking: antialiased down, sharp up, and it takes a fractional
    box, so a crop is centred to the sub-pixel (OpenCV's area filter is antialiased too, but blocky when enlarging).
    """
    if mode == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="black")
    if mode != "crop":
        raise ValueError(f"fit={mode!r}: choose crop or pad.")
    scale = max(height / image.height, width / image.width)
    margin_x, margin_y = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (max(0.0, margin_x), max(0.0, margin_y), image.width - margin_x, image.height - margin_y)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit(frames: np.ndarray, height: int, width: int, mode: FitMode = "crop") -> np.ndarray:
    """`fit_image` for uint8 frames `[F, H, W, 3]`; gives `[F, height, width, 3]`."""
    return np.stack([np.asarray(fit_image(Image.fromarray(frame), height, width, mode)) for frame in frames])


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 `[F, H, W, 3]` to float32 `[F, 3, H, W]` in [-1, 1]."""
    return torch.tensor(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(frames: Tensor) -> np.ndarray:
    """`[F, 3, H, W]` in [-1, 1] to uint8 `[F, H, W, 3]`, rounded and clamped."""
    pixels = ((frames.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
