"""Images as callers give them: PIL images of any mode, lists of them, or tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

Images = PIL.Image.Image | Sequence[PIL.Image.Image] | Tensor
"""A PIL image, several, or a tensor `[B, 3, H, W]` in [0, 1]."""


def count_pairs(start_image: Images, end_image: Images) -> int:
    """Number of pairs in two bounds.

    Raises:
        ValueError: if a bound is missing, of another type, or their numbers differ.
    """
    sizes = []
    for name, image in (("start_image", start_image), ("end_image", end_image)):
        if isinstance(image, PIL.Image.Image):
            sizes.append(1)
        elif isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 3:
            sizes.append(image.shape[0])
        elif isinstance(image, Sequence) and image and all(isinstance(one, PIL.Image.Image) for one in image):
            sizes.append(len(image))
        else:
            raise ValueError(f"{name}: give a PIL image, a non-empty list of them, or a tensor [B, 3, H, W] in [0, 1].")
    if sizes[0] != sizes[1]:
        raise ValueError(f"{sizes[0]} start images but {sizes[1]} end images: give pairs.")
    return sizes[0]


def to_rgb(image: Images) -> Images:
    """PIL images in RGB, whatever their mode; tensors as they are.

    Raises:
        ValueError: for a tensor outside of [0, 1].
    """
    if isinstance(image, Tensor):
        if image.min() < 0 or image.max() > 1:
            raise ValueError(f"image tensors lie in [0, 1], this one in [{image.min():g}, {image.max():g}].")
        return image
    return [as_rgb(one) for one in ([image] if isinstance(image, PIL.Image.Image) else image)]


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as 8-bit RGB: of 16 bits the high byte, transparent ones laid on black, as frames are padded with."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def to_pixels(image: Images) -> Tensor:
    """RGB images as `[B, 3, H, W]` float32 in [0, 1].

    Raises:
        ValueError: if images of a list differ in size.
    """
    if isinstance(image, Tensor):
        return image.float()
    images = [image] if isinstance(image, PIL.Image.Image) else image
    arrays = [np.asarray(one, dtype=np.float32) / 255 for one in images]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("images of one list must share one size; crop them first.")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
