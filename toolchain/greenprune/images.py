"""Image files and IDX files into arrays (host side)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from greenprune.errors import DataError, MissingPackageError
from greenprune.progress import progress

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CHUNK = 256

Array = npt.NDArray[np.uint8]
Decoder = Callable[[Path], Array]


def read_idx(path: Path, dimensions: int) -> Array:
    """Read an IDX file (MNIST's format): big-endian magic number and sizes, then bytes.

    Raises:
        DataError: no such file, another kind of file, or a truncated one.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; data.path must hold MNIST/raw with the four unpacked files "
            "(torchvision.datasets.MNIST(path, download=True) makes them)"
        )
    content = path.read_bytes()
    magic = 0x0800 + dimensions
    header_bytes = 4 * (1 + dimensions)
    if len(content) < header_bytes or int.from_bytes(content[:4], "big") != magic:
        raise DataError(
            f"{path}: expected an IDX file of bytes in {dimensions} dimensions (it starts with "
            f"{magic:#010x}), found {content[:4].hex() or 'an empty file'}; download MNIST again"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header_bytes], ">u4"))
    values = np.frombuffer(content, np.uint8, offset=header_bytes)
    if values.size != np.prod(shape):
        raise DataError(
            f"{path}: expected {np.prod(shape)} bytes for shape {shape}, found {values.size}: "
            "the file is truncated; download MNIST again"
        )
    return values.reshape(shape).copy()


def list_images(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names (the folders in ``root``, sorted), image files, and each file's label.

    Raises:
        DataError: no class folders, or one without images.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: no class folders; expected {root}/<class>/<image>.png")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(p for p in folder.rglob("*") if _is_image(p))
        if not found:
            raise DataError(
                f"{folder}: no images in this class folder; expected files ending in "
                f"{', '.join(sorted(SUFFIXES))}; add some or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return tuple(folder.name for folder in folders), files, labels


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def decoder(size: tuple[int, int] | None, channels: int) -> Decoder:
    """The function from a file to uint8 ``[channels, height, width]``.

    Args:
        size: height and width to resize to (bilinear); None keeps the image's own.
        channels: 1 for grey, 3 for RGB.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("pillow", "host") from error

    mode = "L" if channels == 1 else "RGB"

    def decode(path: Path) -> Array:
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise DataError(
                        f"{path}: expected 8 bits a channel, found mode '{image.mode}'; convert "
                        "the images to 8 bits"
                    )
                pixels = image.convert(mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
            raise DataError(
                f"{path}: expected an image, and it cannot be read ({problem}); replace or remove "
                "the file"
            ) from problem
        if size is not None:
            pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        array = np.asarray(pixels)
        return array[None] if channels == 1 else array.transpose(2, 0, 1)

    return decode


def decode_all(files: Sequence[Path], decode: Decoder, like: Path, label: str) -> Array:
    """Decode all files, in threads, into uint8 ``[N, C, H, W]`` of the shape of ``like``.

    Raises:
        DataError: a file cannot be read or has another shape; not enough memory.
    """
    shape = decode(like).shape
    _check_memory(len(files), shape)
    images = np.empty((len(files), *shape), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = files[start : start + CHUNK]
        for index, path in enumerate(chunk, start):
            image = decode(path)
            if image.shape != shape:
                raise DataError(
                    f"{path}: expected {shape[1]}x{shape[2]} (height x width) as in {like}, found "
                    f"{image.shape[1]}x{image.shape[2]}; set data.size to resize all images"
                )
            images[index] = image
        return len(chunk)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with progress(label, len(files)) as advance:
            for done in pool.map(decode_chunk, range(0, len(files), CHUNK)):
                advance(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _check_memory(count: int, shape: tuple[int, ...]) -> None:
    import psutil

    # twice: the splits are copies, made before the images they come from are released
    needed = 2 * count * int(np.prod(shape))
    available = psutil.virtual_memory().available
    if needed > available:
        raise DataError(
            f"{count} images of {shape[1]}x{shape[2]} need {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are available; set a smaller data.size or use fewer images"
        )
