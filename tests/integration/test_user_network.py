"""A user's own network, images, loss and metric: the whole way to a bundle that answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from greenprune import bundle
from greenprune.runtime import AdaptiveSession

pytest.importorskip("torchvision", reason="the whole way needs the extra 'host'")

SHAPES = {"circle": (200, 60, 50), "square": (50, 160, 70), "triangle": (60, 80, 200)}
SIZE = 64
TRAIN_EACH, TEST_EACH = 80, 20


def draw(shape: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A noisy RGB image [64, 64, 3] of a shape in about its colour, somewhere."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(generator.integers(90, 160, size=3).tolist()))
    canvas = ImageDraw.Draw(image)
    radius = int(generator.integers(14, 22))
    x, y = generator.integers(radius, SIZE - radius, size=2).tolist()
    colour = tuple(np.clip(generator.normal(SHAPES[shape], 15), 0, 255).astype(int).tolist())
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        canvas.polygon(corners, fill=colour)
    noisy = np.asarray(image) + generator.normal(0, 12, size=(SIZE, SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def write_image_folder(root: Path) -> None:
    generator = np.random.default_rng(7)
    for part, each in (("train", TRAIN_EACH), ("test", TEST_EACH)):
        for shape in SHAPES:
            place = root / part / shape
            place.mkdir(parents=True)
            for number in range(each):
                Image.fromarray(draw(shape, generator)).save(place / f"{number:03}.png")


def greenprune(folder: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """Run the installed command and read the object it prints."""
    script = shutil.which("greenprune", path=sysconfig.get_path("scripts"))
    assert script, "greenprune is not installed beside this Python"
    temporary = folder / "tmp"  # apart, as a measurement locks it for the whole machine
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [script, *arguments, "--json"],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


TASK = """
from pathlib import Path

import torch.nn.functional as F

SEEN = Path(__file__).with_name("seen")


def loss(outputs, targets):
    (SEEN / "loss").touch()
    return F.cross_entropy(outputs, targets, label_smoothing=0.05)


def metric(outputs, targets):
    (SEEN / "metric").touch()
    return (outputs.argmax(1) == targets).float()
"""

RESNET18 = """
seed = 3
threads = 1

[model]
factory = "torchvision.models:resnet18"
arguments = { num_classes = 3 }

[data]
source = "folder"
path = "shapes"
development = 10
selector = 30
certification = 40

[task]
loss = "my_task.py:loss"
metric = "my_task.py:metric"

[train]
epochs = 1
batch_size = 5
learning_rate = 0.005

[sparsify]
epochs = 1
batch_size = 5
learning_rate = 0.005

[prune]
images = 60
mild.macs = 0.7
aggressive.macs = 0.4

[finetune.mild]
epochs = 1
batch_size = 5
learning_rate = 0.005

[finetune.aggressive]
epochs = 1
batch_size = 5
learning_rate = 0.005

[compile]
runtimes = ["onnxruntime"]
"""


def test_torchvision_network_on_an_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "shapes")
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "seen").mkdir()
    (tmp_path / "shapes.toml").write_text(RESNET18)
    answer = greenprune(tmp_path, "run", "shapes.toml")

    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"loss", "metric"}
    variants = answer["variants"]
    assert variants["mild"]["macs"] <= 0.7 * variants["dense"]["macs"]
    assert variants["aggressive"]["macs"] <= 0.4 * variants["dense"]["macs"]
    for name in ("dense", "mild", "pair"):  # three classes that differ in shape and colour
        assert variants[name]["accuracy"] > 0.6, name

    place = tmp_path / answer["bundle"]
    opened = bundle.open_bundle(place)
    opened.verify()
    assert opened.manifest.class_names == tuple(sorted(SHAPES))
    right, accepted = [], []
    with AdaptiveSession(place, threads=1) as session:
        for path in sorted((tmp_path / "shapes" / "test").rglob("*.png")):
            image = np.asarray(Image.open(path))
            feeds = {"input": session.preprocess(image)}
            (logits,), info = session.run_with_info(None, feeds)
            right.append(session.class_names[int(logits[0].argmax())] == path.parent.name)
            accepted.append(info.routes[0] == "aggressive")
    assert len(right) == len(SHAPES) * TEST_EACH
    assert np.mean(right) == pytest.approx(variants["pair"]["accuracy"])
    assert np.mean(accepted) == pytest.approx(variants["pair"]["accept_rate"])


NETWORK = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width),
            nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        )
        self.classifier = nn.Linear(32 * width, classes)

    def forward(self, inputs):
        return self.classifier(torch.flatten(self.features(inputs), 1))


def build(width=16, classes=3):
    return Small(width, classes)
"""

DATA = """
from pathlib import Path

import numpy as np


def load(path):
    content = np.load(path)
    return {
        "train": (content["train_images"], content["train_labels"]),
        "test": (content["test_images"], content["test_labels"]),
        "class_names": ["circle", "square", "triangle"],
    }
"""

OWN = """
threads = 1

[model]
factory = "networks/small.py:build"
arguments = { width = 24 }
weights = "small.safetensors"

[data]
source = "shapes_data:load"
path = "shapes.npz"
held_out_from = "train"  # these weights have seen nothing
development = 30
selector = 45
certification = 45

[sparsify]
epochs = 1
batch_size = 16

[finetune.mild]
epochs = 1
batch_size = 16

[finetune.aggressive]
epochs = 1
batch_size = 16

[compile]
runtimes = ["onnxruntime"]
"""


def test_network_weights_and_data_of_ones_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from greenprune import models
    from greenprune.pruning import record

    generator = np.random.default_rng(8)
    arrays = {}
    for part, each in (("train", TRAIN_EACH), ("test", TEST_EACH)):
        labels = np.repeat(np.arange(len(SHAPES)), each)
        names = list(SHAPES)
        images = np.stack([draw(names[label], generator) for label in labels])
        arrays |= {f"{part}_images": images.transpose(0, 3, 1, 2), f"{part}_labels": labels}
    np.savez(tmp_path / "shapes.npz", **arrays)
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "small.py").write_text(NETWORK)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "shapes_data.py").write_text(DATA)
    network = models.build(f"{tmp_path / 'networks' / 'small.py'}:build", {"width": 24})
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    save_file(weights, tmp_path / "small.safetensors")
    (tmp_path / "own.toml").write_text(OWN)
    paths = [str(tmp_path / "code"), os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(filter(None, paths))
    answer = greenprune(tmp_path, "run", "own.toml", PYTHONPATH=search)

    trained, _ = record.load_network(tmp_path / answer["run"] / "train" / "network")
    for name, value in trained.state_dict().items():
        assert value.equal(weights[name]), f"{name}: the weights were not taken as they are"
    with AdaptiveSession(tmp_path / answer["bundle"], threads=1) as session:
        assert session.class_names == ("circle", "square", "triangle")
        inputs = np.concatenate(
            [session.preprocess(image.transpose(1, 2, 0)) for image in arrays["test_images"]]
        )
        (logits,) = session.run(None, {"input": inputs})
    assert logits.shape == (len(SHAPES) * TEST_EACH, len(SHAPES))
    accuracy = np.mean(logits.argmax(1) == arrays["test_labels"])
    assert accuracy == pytest.approx(answer["variants"]["pair"]["accuracy"])
    exported = tmp_path / "again.bundle"
    made = greenprune(tmp_path, "export", "own", "-o", str(exported), PYTHONPATH=search)
    assert made["bundle"] == str(exported)
    bundle.open_bundle(exported).verify()
