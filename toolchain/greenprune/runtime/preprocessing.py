"""From a decoded image to the networks' input, with numpy alone (device side)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import DataError

if TYPE_CHECKING:
    from greenprune.bundle import Preprocessing


def preprocess(image: NDArray[np.uint8], settings: Preprocessing) -> NDArray[np.float32]:
    """``(image / 255 - mean) / std`` of one image, in the same float32 steps as in training.

    Args:
        image: uint8 [H, W, C], or [H, W] for grey.
        settings: the bundle's.

    Returns:
        float32 [1, C, H, W].

    Raises:
        DataError: another dtype, size or number of channels. Nothing is resized here: how would
            change the accuracy, and the app knows its camera.
    """
    height, width = settings.size
    shape = (height, width, settings.channels)
    expected = f"uint8 of shape {list(shape)}" + (
        f" or {[height, width]}" if settings.channels == 1 else ""
    )
    if not isinstance(image, np.ndarray):
        raise DataError(
            f"image: expected an array, {expected}, got {type(image).__name__}; "
            "convert it with numpy.asarray"
        )
    pixels = image[:, :, None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.shape != shape:
        raise DataError(
            f"image: expected {expected}, got {image.dtype} of shape {list(image.shape)}; "
            "convert and resize it first"
        )
    mean = np.array(settings.mean, dtype=np.float32)
    std = np.array(settings.std, dtype=np.float32)
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])
