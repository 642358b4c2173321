from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from greenprune import data
from greenprune.data import Data, Split
from greenprune.errors import DataError
from greenprune.recipe import DataSettings

SMALL = {"development": 4, "selector": 6, "certification": 8}


def sizes(loaded: Data) -> dict[str, int]:
    return {name: len(getattr(loaded, name)) for name in data.SPLITS}


def make_folder(root: Path, classes: dict[str, int], size: int = 8) -> None:
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def test_digits_default_splits() -> None:
    loaded = data.load(DataSettings(), seed=0)
    assert sizes(loaded) == {
        "train": 850,
        "development": 97,
        "selector": 250,
        "certification": 300,
        "test": 300,
    }
    assert loaded.train.inputs.shape == (850, 1, 32, 32)
    assert loaded.train.inputs.dtype == torch.uint8
    assert int(loaded.train.inputs.max()) == 255
    for name in data.SPLITS:
        counts = torch.bincount(getattr(loaded, name).targets, minlength=10)
        assert int(counts.max() - counts.min()) <= 5, name


def test_splits_do_not_overlap_and_follow_the_seed() -> None:
    first, again, other = (data.load(DataSettings(), seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.test.inputs, other.test.inputs)
    rows = [getattr(first, name).inputs.flatten(1).numpy() for name in data.SPLITS]
    distinct = {row.tobytes() for part in rows for row in part}
    whole = data.load(DataSettings(development=0, selector=1, certification=1), seed=0)
    everything = {
        row.tobytes()
        for name in data.SPLITS
        for row in getattr(whole, name).inputs.flatten(1).numpy()
    }
    assert distinct == everything
    assert len(distinct) == sum(len(part) for part in rows)  # the digits are all different


def test_statistics_of_the_training_images_by_default() -> None:
    loaded = data.load(DataSettings(), seed=0)
    assert loaded.preprocessing is not None
    x = data.normalise(loaded.train.inputs, loaded.preprocessing)
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    share=st.floats(0, 1),
)
def test_every_prefix_is_stratified(counts: list[int], seed: int, share: float) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = data._stratified_order(targets, seed)
    assert sorted(order.tolist()) == list(range(len(targets)))
    prefix = targets[order][: int(share * len(targets))]
    for label, count in enumerate(counts):
        expected = len(prefix) * count / len(targets)
        assert abs(int((prefix == label).sum()) - expected) <= len(counts)


@pytest.mark.parametrize("held_out", ["train", "test"])
def test_held_out_from(tmp_path: Path, held_out: str) -> None:
    make_folder(tmp_path / "train", {"cat": 20, "dog": 20})
    make_folder(tmp_path / "test", {"cat": 10, "dog": 10})
    settings_ = DataSettings(
        source="folder",
        path=str(tmp_path),
        held_out_from=held_out,  # type: ignore[arg-type]
        **SMALL,
    )
    loaded = data.load(settings_, seed=0)
    from_train = {"train": 22, "test": 20} if held_out == "train" else {"train": 36, "test": 6}
    assert sizes(loaded) == {**SMALL, **from_train}
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train.inputs.shape[1:] == (3, 8, 8)


def test_a_folder_without_test_gives_a_fifth(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 30, "dog": 20})
    loaded = data.load(DataSettings(source="folder", path=str(tmp_path), **SMALL), seed=0)
    assert torch.bincount(loaded.test.targets).tolist() == [6, 4]


def test_a_folder_keeps_each_image_with_its_class(tmp_path: Path) -> None:
    for split, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(10):
                colour = ("abc".index(name) * 100,) * 3
                Image.new("RGB", (4, 4), colour).save(tmp_path / split / name / f"{number}.bmp")
    loaded = data.load(DataSettings(source="folder", path=str(tmp_path), **SMALL), seed=3)
    for name in data.SPLITS:
        split = getattr(loaded, name)
        assert torch.equal(split.inputs[:, 0, 0, 0].long(), split.targets * 100)
    assert set(loaded.test.targets.tolist()) == {1, 2}


def test_grey_and_resized(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 12, "dog": 12})
    make_folder(tmp_path / "cat" / "deeper", {"more": 1}, size=9)
    settings_ = DataSettings(source="folder", path=str(tmp_path), channels=1, size=(6, 5), **SMALL)
    loaded = data.load(settings_, seed=0)
    assert loaded.train.inputs.shape[1:] == (1, 6, 5)
    with pytest.raises(DataError, match=r"0\.png: expected 8x8.*found 9x9; set data\.size"):
        data.load(DataSettings(source="folder", path=str(tmp_path), **SMALL), seed=0)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    settings_ = DataSettings(source="folder", path=str(tmp_path / "data"), **SMALL)

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words):
            data.load(settings_, seed=0)

    refused("no such folder")
    root = tmp_path / "data"
    root.mkdir()
    refused("no class folders")
    make_folder(root / "train", {"cat": 20, "dog": 20})
    (root / "train" / "empty").mkdir()
    refused("empty: no images")
    (root / "train" / "empty").rmdir()
    make_folder(root / "test", {"cow": 3})
    refused(r"cow: this class is not in")
    (root / "test" / "cow").rename(root / "test" / "cat")
    (root / "train" / "dog" / "0.png").write_bytes(b"not an image")
    refused(r"0\.png: expected an image")
    image = root / "train" / "cat" / "1.png"
    (root / "train" / "dog" / "0.png").write_bytes(image.read_bytes()[:80])
    refused(r"0\.png: expected an image")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "train" / "dog" / "0.png")
    refused("8 bits a channel")


def test_more_than_memory_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    make_folder(tmp_path, {"cat": 12, "dog": 12})
    little = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", little)
    with pytest.raises(DataError, match="24 images of 8x8 need"):
        data.load(DataSettings(source="folder", path=str(tmp_path), **SMALL), seed=0)


def write_mnist(root: Path, images: int) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", images), ("t10k", 10)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        labels_header = struct.pack(">II", 0x801, count)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels_header + labels.tobytes())
    return raw


def test_mnist(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path, 60)
    settings_ = DataSettings(source="mnist", path=str(tmp_path), size=(32, 32), channels=3, **SMALL)
    loaded = data.load(settings_, seed=0)
    assert sizes(loaded) == {**SMALL, "train": 42, "test": 10}
    assert loaded.train.inputs.shape[1:] == (3, 32, 32)
    file = raw / "train-images-idx3-ubyte"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="truncated"):
        data.load(settings_, seed=0)
    file.write_bytes(b"\x1f\x8b" + content)
    with pytest.raises(DataError, match="expected an IDX file"):
        data.load(settings_, seed=0)
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        data.load(settings_, seed=0)


def test_too_few_images_gives_the_counts() -> None:
    with pytest.raises(DataError, match=r"train has 1497.*development 97.*selector 1200"):
        data.load(DataSettings(selector=1200), seed=0)


SOURCE = """
import numpy as np

def images(path=None, channels=3):
    r = np.random.default_rng(0)
    x = r.integers(0, 256, (60, channels, 5, 4), dtype=np.uint8)
    return {"train": (x[:40], np.arange(40) % 2), "test": (x[40:], np.arange(20) % 2)}

def normalised():
    d = images()
    return {k: (x.astype(np.float32), y.astype(np.float32)) for k, (x, y) in d.items()}

def own_selector():
    d = images()
    return {**d, "selector": d["test"], "class_names": ["yes", "no"]}

def nan():
    d = normalised(); d["test"][0][0, 0, 0, 0] = np.nan; return d

def no_test(): return {"train": images()["train"]}
def wrong_shape():
    x, y = images()["train"]; return {"train": (x[0], y), "test": (x, y)}
def wrong_length():
    x, y = images()["train"]; return {"train": (x, y[1:]), "test": (x, y)}
def wrong_type():
    x, y = images()["train"]; return {"train": (x.astype(float), y), "test": (x, y)}
def disagree():
    x, y = images()["train"]; return {"train": (x[:, :1], y), "test": (x, y)}
def two_channels(): return images(channels=2)
def fails(): raise OSError("the disk went away")
def needs_path(path): raise RuntimeError(f"got {path}")
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_users_images(mine: Path) -> None:
    loaded = data.load(DataSettings(source=f"{mine}:images", **SMALL), seed=0)
    assert sizes(loaded) == {**SMALL, "train": 22, "test": 20}
    assert loaded.class_names == ("0", "1")
    loaded = data.load(DataSettings(source=f"{mine}:own_selector", **SMALL), seed=0)
    assert sizes(loaded) == {**SMALL, "selector": 20, "train": 28, "test": 20}
    assert loaded.class_names == ("yes", "no")


def test_a_users_float_inputs_are_ready(mine: Path) -> None:
    loaded = data.load(DataSettings(source=f"{mine}:normalised", **SMALL), seed=0)
    assert loaded.preprocessing is None
    assert loaded.class_names == ()
    inputs, _ = next(data.batches(loaded.test, None, 50))
    assert torch.equal(inputs, loaded.test.inputs)
    with pytest.raises(DataError, match=r"remove data\.mean"):
        data.load(DataSettings(source=f"{mine}:normalised", mean=(0.5,), **SMALL), seed=0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nan", "'test' inputs hold 1 values that are NaN"),
        ("no_test", r"'train' and 'test' at least.*found \['train'\]"),
        ("wrong_shape", r"\[N, C, H, W\], found torch.uint8 \(3, 5, 4\)"),
        ("wrong_length", "40 inputs and targets of shape"),
        ("wrong_type", "torch.float64"),
        ("disagree", "must agree"),
        ("two_channels", "1 or 3 channels, found 2"),
        ("fails", "OSError: the disk went away"),
        ("needs_path", "called without arguments"),
        ("absent", "no such name"),
    ],
)
def test_a_users_function_that_does_not_fit(mine: Path, function: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        data.load(DataSettings(source=f"{mine}:{function}", **SMALL), seed=0)


def test_path_reaches_the_users_function(mine: Path) -> None:
    with pytest.raises(DataError, match="got here"):
        data.load(DataSettings(source=f"{mine}:needs_path", path="here", **SMALL), seed=0)


def test_unknown_source_and_missing_path() -> None:
    with pytest.raises(DataError, match="expected 'digits'"):
        data.load(DataSettings(source="imagenet"), seed=0)
    with pytest.raises(DataError, match=r"needs data\.path"):
        data.load(DataSettings(source="folder"), seed=0)


def test_normalise_is_the_manifests_formula() -> None:
    loaded = data.load(DataSettings(mean=(0.25,), std=(0.5,)), seed=0)
    images = loaded.test.inputs[:3]
    expected = (images.numpy().astype(np.float32) / 255 - 0.25) / 0.5
    found = data.normalise(images, loaded.preprocessing).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match=r"data\.std: expected 1 values"):
        data.load(DataSettings(std=(0.5, 0.5)), seed=0)


def test_batches_cover_the_split_once_and_shuffle_by_the_generator() -> None:
    split = Split(inputs=torch.arange(10.0).view(10, 1, 1, 1), targets=torch.arange(10))
    plain = [targets.tolist() for _, targets in data.batches(split, None, 4)]
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        shuffled = list(data.batches(split, None, 4, generator))
        assert all(torch.equal(x.flatten().long(), y) for x, y in shuffled)
        runs.append(torch.cat([y for _, y in shuffled]).tolist())
    assert runs[0] == runs[1] != list(range(10))
    assert sorted(runs[0]) == list(range(10))
