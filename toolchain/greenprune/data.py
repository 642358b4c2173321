"""Images and labels in memory, and who may see which (host side).

Within every split the order is shuffled so that each prefix is stratified: the first 100 images
of any split hold every class in its due share.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from greenprune import images
from greenprune.augmentation import augment
from greenprune.bundle import Preprocessing
from greenprune.errors import DataError, MissingPackageError
from greenprune.recipe import DataSettings

SPLITS = ("train", "development", "selector", "certification", "test")
DIGITS_TEST_IMAGES = 300
TEST_SHARE = 0.2
TEST_SEED = 0
"""The test images do not depend on the recipe's seed, so that runs with other seeds compare."""

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Inputs, uint8 images or float32, ``[N, C, H, W]``; targets ``[N, ...]`` (labels: int64)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """The five splits, and how images become a network's input.

    ``preprocessing`` is None where the inputs are float32 and thus ready. ``fingerprint`` is the
    SHA-256 of everything above it; :func:`load` fills it in.
    """

    train: Split
    development: Split
    selector: Split
    certification: Split
    test: Split
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None
    augmentation: str = "none"
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """What a source holds before the splits are drawn; ``fixed`` are those it brings itself."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    fixed: Mapping[str, Split] = dataclasses.field(default_factory=dict)


def load(settings: DataSettings, seed: int) -> Data:
    """Read the data that a recipe asks for into memory and draw the splits.

    Args:
        settings: the recipe's ``[data]``. ``module:function`` is called without arguments, or
            with ``path`` where that is set, and returns a :class:`Data` (taken as it is) or a
            dictionary from split names to ``(inputs, targets)``, ``train`` and ``test`` at least,
            arrays or tensors; an entry ``class_names`` is optional.
        seed: decides who is in development, selector and certification; test is the same for all
            seeds unless these are held out of it.

    Returns:
        The data. Without ``mean`` or ``std`` these are measured on the training images.

    Raises:
        DataError: files or folders are missing, unreadable or do not fit; too few images for the
            splits; more than fits into memory.
    """
    if settings.source == "digits":
        source = _digits(settings)
    elif settings.source == "mnist":
        source = _mnist(settings)
    elif settings.source == "folder":
        source = _folder(settings)
    elif ":" in settings.source:
        answer = _call(settings)
        if isinstance(answer, Data):
            for name in SPLITS:
                _check_split(getattr(answer, name), name, settings.source)
            return dataclasses.replace(answer, fingerprint=_fingerprint(answer))
        source = _from_dictionary(answer, settings)
    else:
        raise DataError(
            f"data.source = '{settings.source}': expected 'digits', 'mnist', 'folder' or "
            "'module:function'"
        )
    splits = _draw(source, settings, seed)
    data = Data(
        train=splits["train"],
        development=splits["development"],
        selector=splits["selector"],
        certification=splits["certification"],
        test=splits["test"],
        class_names=source.class_names,
        preprocessing=_preprocessing(splits["train"], settings),
        augmentation=settings.augmentation,
    )
    return dataclasses.replace(data, fingerprint=_fingerprint(data))


# Batches


def normalise(inputs: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """``(image / 255 - mean) / std`` of uint8 ``[N, C, H, W]``, as float32; None: unchanged."""
    if preprocessing is None:
        return inputs
    mean = torch.tensor(preprocessing.mean, device=inputs.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=inputs.device).view(1, -1, 1, 1)
    return inputs.float().div_(255).sub_(mean).div_(std)


def take(
    split: Split,
    indices: Tensor,
    preprocessing: Preprocessing | None,
    generator: torch.Generator | None = None,
    augmentation: str = "none",
) -> tuple[Tensor, Tensor]:
    """One batch: the images and targets at ``indices``, augmented and normalised."""
    inputs = augment(split.inputs[indices], augmentation, generator)
    return normalise(inputs, preprocessing), split.targets[indices]


def draw(split: Split, count: int, seed: int) -> Tensor:
    """Indices of some of the split's images, without replacement: int64 [at most count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(split), generator=generator)[:count]


def batches(
    split: Split,
    preprocessing: Preprocessing | None,
    batch_size: int,
    generator: torch.Generator | None = None,
    augmentation: str = "none",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(inputs float32 normalised, targets)`` once through the split.

    With a ``generator`` the order is shuffled by it; without, it is the split's own.
    """
    count = len(split)
    order = torch.arange(count)
    if generator is not None:
        order = torch.randperm(count, generator=generator)
    for start in range(0, count, batch_size):
        indices = order[start : start + batch_size]
        yield take(split, indices, preprocessing, generator, augmentation)


# Splits


def _draw(source: _Source, settings: DataSettings, seed: int) -> dict[str, Split]:
    fixed = source.fixed
    wanted = {"development": settings.development}
    held_out = {"selector": settings.selector, "certification": settings.certification}
    from_train = wanted | (held_out if settings.held_out_from != "test" else {})
    from_test = held_out if settings.held_out_from == "test" else {}
    splits = {"train": source.train, "test": source.test, **fixed}
    for origin, counts in (("train", from_train), ("test", from_test)):
        counts = {name: count for name, count in counts.items() if name not in fixed}
        pool = splits[origin]
        needed = sum(counts.values())
        if needed >= len(pool):
            asked = " + ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(
                f"data source '{settings.source}': too few images: {origin} has {len(pool)}, and "
                f"{asked} = {needed} are to be taken out of it, with some left over; lower "
                f"data.{' or data.'.join(counts)}, or bring more images"
            )
        order = _stratified_order(pool.targets, seed if counts else TEST_SEED)
        for name, count in {**counts, origin: len(pool) - needed}.items():
            splits[name] = _part(pool, order[:count])
            order = order[count:]
    return splits


def _stratified_order(targets: Tensor, seed: int) -> Tensor:
    """A random order of which every prefix holds each class in its share (to one image).

    Each image gets a position in (0, 1) that spreads its class evenly; images are sorted by it.
    Targets that are not class labels (not int64 ``[N]``) are only shuffled.
    """
    count = len(targets)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if targets.dtype != torch.int64 or targets.ndim != 1 or not count:
        return shuffled
    labels = targets[shuffled]
    by_class = torch.argsort(labels, stable=True)
    sizes = torch.unique_consecutive(labels[by_class], return_counts=True)[1]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    position = torch.empty(count, dtype=torch.float64)
    rank = torch.arange(count) - starts
    position[by_class] = (rank + 0.5) / torch.repeat_interleave(sizes, sizes).double()
    return shuffled[torch.argsort(position, stable=True)]


def _part(split: Split, indices: Tensor) -> Split:
    return Split(inputs=split.inputs[indices], targets=split.targets[indices])


def _split_test(everything: Split, count: int) -> tuple[Split, Split]:
    order = _stratified_order(everything.targets, TEST_SEED)
    return _part(everything, order[count:]), _part(everything, order[:count])


def _preprocessing(train: Split, settings: DataSettings) -> Preprocessing | None:
    if train.inputs.dtype == torch.float32:
        if settings.mean is not None or settings.std is not None:
            raise DataError(
                f"data source '{settings.source}': its inputs are float32, taken as normalised; "
                "remove data.mean and data.std, or return uint8 images"
            )
        return None
    _, channels, height, width = train.inputs.shape
    for name, value in (("mean", settings.mean), ("std", settings.std)):
        if value is not None and len(value) != channels:
            raise DataError(
                f"data.{name}: expected {channels} values, one for each channel of the images, "
                f"found {len(value)}"
            )
    mean, std = settings.mean, settings.std
    if mean is None or std is None:
        measured_mean, measured_std = _channel_statistics(train.inputs)
        mean, std = mean or measured_mean, std or measured_std
    grey_or_rgb = cast(Literal[1, 3], channels)
    return Preprocessing(channels=grey_or_rgb, size=(height, width), mean=mean, std=std)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, as fractions of 255."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        shares = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float(shares @ values)
        deviation = float(shares @ (values - mean).square()) ** 0.5
        means.append(round(mean, 4))
        deviations.append(max(round(deviation, 4), 1 / 255))
    return tuple(means), tuple(deviations)


def _fingerprint(data: Data) -> str:
    digest = hashlib.sha256(repr((data.class_names, data.preprocessing)).encode())
    digest.update(data.augmentation.encode())
    for name in SPLITS:
        split: Split = getattr(data, name)
        for tensor in (split.inputs, split.targets):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


# Sources


def _digits(settings: DataSettings) -> _Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError("scikit-learn", "host") from error

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    inputs = _fit(grey[:, None], settings.size or (32, 32), settings.channels or 1)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = _split_test(Split(inputs=inputs, targets=targets), DIGITS_TEST_IMAGES)
    return _Source(train=train, test=test, class_names=tuple("0123456789"))


def _mnist(settings: DataSettings) -> _Source:
    folder = Path(_needs_path(settings, "the folder that holds MNIST/raw")) / "MNIST" / "raw"
    splits = {name: _mnist_split(folder, name, settings) for name in _MNIST_FILES}
    return _Source(train=splits["train"], test=splits["test"], class_names=tuple("0123456789"))


def _mnist_split(folder: Path, name: str, settings: DataSettings) -> Split:
    images_path, labels_path = (folder / file for file in _MNIST_FILES[name])
    pixels = torch.from_numpy(images.read_idx(images_path, 3))[:, None]
    labels = images.read_idx(labels_path, 1)
    if len(pixels) != len(labels) or labels.max(initial=0) > 9:
        raise DataError(
            f"{labels_path}: expected {len(pixels)} labels from 0 to 9, found {len(labels)} up to "
            f"{labels.max(initial=0)}; download MNIST again"
        )
    size = settings.size or (pixels.shape[2], pixels.shape[3])
    fitted = _fit(pixels, size, settings.channels or 1)
    return Split(inputs=fitted, targets=torch.from_numpy(labels.astype(np.int64)))


def _fit(grey: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """Grey uint8 ``[N, 1, h, w]`` at another size (bilinear), repeated to ``channels``."""
    if tuple(grey.shape[2:]) != size:
        grey = torch.cat([_resize(grey[i : i + 4096], size) for i in range(0, len(grey), 4096)])
    return grey.repeat(1, channels, 1, 1)


def _resize(grey: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(grey.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _folder(settings: DataSettings) -> _Source:
    root = Path(_needs_path(settings, "a folder of class folders"))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.path to a folder of class folders")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if train_root is root and test_root is not None:
        raise DataError(
            f"{root}: has '{test_root.name}' and no 'train'; expected train/<class>/<image> and "
            "test/<class>/<image>, or <class>/<image>"
        )
    class_names, files, labels = images.list_images(train_root)
    decode = images.decoder(settings.size, settings.channels or 3)
    pixels = images.decode_all(files, decode, files[0], "read training images")
    train = Split(inputs=torch.from_numpy(pixels), targets=torch.tensor(labels))
    if test_root is None:
        train, test = _split_test(train, max(1, round(len(train) * TEST_SHARE)))
        return _Source(train=train, test=test, class_names=class_names)
    test_names, test_files, test_labels = images.list_images(test_root)
    unknown = sorted(set(test_names) - set(class_names))
    if unknown:
        raise DataError(
            f"{test_root / unknown[0]}: this class is not in {train_root}; expected the classes "
            f"{', '.join(class_names[:10])}; remove or rename the folder"
        )
    pixels = images.decode_all(test_files, decode, files[0], "read test images")
    targets = torch.tensor([class_names.index(test_names[label]) for label in test_labels])
    test = Split(inputs=torch.from_numpy(pixels), targets=targets)
    return _Source(train=train, test=test, class_names=class_names)


# A user's own function


def _call(settings: DataSettings) -> Any:
    from greenprune.models import resolve

    function, _ = resolve(settings.source, DataError)
    try:
        return function(settings.path) if settings.path is not None else function()
    except DataError:
        raise
    except Exception as problem:
        raise DataError(
            f"data source '{settings.source}' failed: {type(problem).__name__}: {problem}; it is "
            "called without arguments, or with data.path where that is set"
        ) from problem


def _from_dictionary(answer: Any, settings: DataSettings) -> _Source:
    where = settings.source
    if not isinstance(answer, Mapping) or not {"train", "test"} <= set(answer):
        found = sorted(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
        raise DataError(
            f"data source '{where}': expected a greenprune.data.Data, or a dictionary with 'train' "
            f"and 'test' at least, each (inputs, targets); found {found}"
        )
    unknown = sorted(set(answer) - {*SPLITS, "class_names"})
    if unknown:
        raise DataError(
            f"data source '{where}': unknown split '{unknown[0]}'; known are {', '.join(SPLITS)}"
        )
    splits = {name: _to_split(answer[name], name, where) for name in SPLITS if name in answer}
    _check_agreement(splits, settings)
    train, test = splits.pop("train"), splits.pop("test")
    names = answer.get("class_names")
    if names is None:
        labels = train.targets.dtype == torch.int64 and train.targets.ndim == 1
        names = map(str, range(int(train.targets.max()) + 1)) if labels else ()
    return _Source(train=train, test=test, class_names=tuple(names), fixed=splits)


def _to_split(value: Any, name: str, where: str) -> Split:
    try:
        inputs, targets = (torch.as_tensor(part) for part in value)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise DataError(
            f"data source '{where}': '{name}' must be (inputs, targets), two arrays or tensors: "
            f"{problem}"
        ) from problem
    if not targets.is_floating_point():
        targets = targets.long()
    split = Split(inputs=inputs, targets=targets)
    _check_split(split, name, where)
    if not len(split):
        raise DataError(f"data source '{where}': '{name}' has no inputs; leave it out or fill it")
    return split


def _check_split(split: Split, name: str, where: str) -> None:
    inputs, targets = split.inputs, split.targets
    if inputs.dtype not in (torch.uint8, torch.float32) or inputs.ndim != 4:
        raise DataError(
            f"data source '{where}': '{name}' inputs must be uint8 images or normalised float32 "
            f"[N, C, H, W], found {inputs.dtype} {tuple(inputs.shape)}"
        )
    if targets.ndim < 1 or len(inputs) != len(targets):
        raise DataError(
            f"data source '{where}': '{name}' has {len(inputs)} inputs and targets of shape "
            f"{tuple(targets.shape)}; expected one target for each input"
        )
    for what, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).flatten(1 if tensor.ndim > 1 else 0).sum())
            raise DataError(
                f"data source '{where}': '{name}' {what} hold {bad} values that are NaN or "
                "infinite; expected finite values"
            )


def _check_agreement(splits: Mapping[str, Split], settings: DataSettings) -> None:
    """All splits have one kind of input, and it is the one that the recipe names."""
    first = splits["train"].inputs
    for name, split in splits.items():
        found = split.inputs
        if found.shape[1:] != first.shape[1:] or found.dtype != first.dtype:
            raise DataError(
                f"data source '{settings.source}': '{name}' inputs are {found.dtype} "
                f"{tuple(found.shape[1:])}, and 'train' inputs {first.dtype} "
                f"{tuple(first.shape[1:])}; they must agree"
            )
    _, channels, height, width = first.shape
    if first.dtype == torch.uint8 and channels not in (1, 3):
        raise DataError(
            f"data source '{settings.source}': uint8 images must have 1 or 3 channels, found "
            f"{channels}; return normalised float32 for anything else"
        )
    if settings.channels not in (None, channels) or settings.size not in (None, (height, width)):
        raise DataError(
            f"data source '{settings.source}': its images are {channels} x {height} x {width} and "
            f"data.channels = {settings.channels}, data.size = {settings.size}; remove these keys "
            "or return images that fit"
        )


def _needs_path(settings: DataSettings, what: str) -> str:
    if settings.path is None:
        raise DataError(f"data.source = '{settings.source}' needs data.path, {what}")
    return settings.path
