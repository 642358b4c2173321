from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune.augmentation import augment


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
