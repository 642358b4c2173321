from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.augmentation import augment, cutmix
from greenprune.errors import DataError


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["shift", "crop_flip"]))
def test_augmented_images_are_moved_copies(seed: int, kind: str) -> None:
    images = torch.arange(1, 2 * 6 * 5 * 3 + 1, dtype=torch.uint8).view(3, 2, 6, 5)
    pad = 2 if kind == "shift" else 4
    found = augment(images, kind, torch.Generator().manual_seed(seed))
    assert found.shape == images.shape
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    for image, source in zip(found, padded, strict=True):
        candidates = [
            source[:, y : y + 6, x : x + 5] for y in range(2 * pad + 1) for x in range(2 * pad + 1)
        ]
        if kind == "crop_flip":
            candidates += [candidate.flip(2) for candidate in candidates]
        assert any(torch.equal(image, candidate) for candidate in candidates)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_cutmix_puts_one_rectangle_of_another_image_in_each(
    seed: int, size: tuple[int, int]
) -> None:
    images = torch.arange(5.0).view(5, 1, 1, 1) + torch.rand(5, 3, *size) / 2
    given = images.clone()

    mixed = cutmix(images, torch.Generator().manual_seed(seed))

    assert torch.equal(images, given), "the batch itself stays"
    own = (mixed == images).all(1)
    for image, taken in zip(mixed, ~own, strict=True):
        rows, columns = taken.any(1).nonzero(), taken.any(0).nonzero()
        if len(rows):
            patch = taken[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert patch.all(), "a rectangle"
            source = images[int(image[:, taken].floor().unique().item())]
            assert torch.equal(image[:, taken], source[:, taken]), "from the same place"


def test_cutmix_is_for_images_and_its_patches_are_uniform_in_area() -> None:
    with pytest.raises(DataError, match=r"cutmix: expected images \[N, C, H, W\]"):
        cutmix(torch.zeros(4, 7), torch.Generator())
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 1, 32, 32)
    shares = [float((cutmix(images, generator) != images)[:, 0].float().mean()) for _ in range(400)]
    assert 0.25 < np.mean(shares) < 0.45, "a half before the edges clip the patches"
    assert min(shares) < 0.02
    assert max(shares) > 0.8
