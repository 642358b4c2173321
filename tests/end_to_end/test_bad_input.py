"""Whatever is wrong with the input: exit status 2, one message, nothing that looks complete."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

RECIPE = """
threads = 1
[model]
factory = "greenprune.models:lenet5"
{model}
[data]
source = "folder"
path = "images"
size = [32, 32]
channels = 1
development = 4
selector = 8
certification = 8
{data}
[train]
epochs = 1
{train}
[compile]
{compile}
"""
SECTIONS = ("model", "data", "train", "compile")


def write_images(folder: Path, classes: int = 10, each: int = 4) -> None:
    generator = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = generator.integers(0, 256, size=(32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


def recipe(folder: Path, **lines: str) -> Path:
    """A recipe on images beside it; ``lines`` go into the sections that they name."""
    path = folder / "flowers.toml"
    path.write_text(RECIPE.format(**{name: lines.get(name, "") for name in SECTIONS}))
    return path


def lenet_weights(path: Path, classes: int = 10) -> Path:
    from safetensors.torch import save_file

    from greenprune.models import lenet5

    save_file(lenet5(num_classes=classes).state_dict(), path)
    return path


def assert_refused(done: Any, messages: Any, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (message,) = messages(done.stderr)
    assert message.startswith("greenprune")
    for word in words:
        assert word in message


def assert_nothing_complete(folder: Path) -> None:
    assert not list(folder.rglob("stage.json"))
    assert not list(folder.rglob("manifest.json"))
    assert not list(folder.rglob(".partial-*"))


# Recipes: refused before anything is read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nepoch = 3\n", ["train.epoch'", "did you mean 'epochs'"]),
        ("[trian]\nepochs = 3\n", ["'trian'", "did you mean 'train'"]),
        ('[train]\nepochs = "three"\n', ["'train.epochs'", "int", "str"]),
        ("[train]\nepochs = 3.0\n", ["'train.epochs'", "int", "float"]),
        ("[prune]\nmild.macs = 0.2\naggressive.macs = 0.5\n", ["prune.aggressive.macs"]),
        ("[train\n", ["not valid TOML"]),
    ],
)
def test_recipe(command: Any, messages: Any, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "flowers.toml").write_text(text)
    done = command("greenprune", "run", "flowers.toml")
    assert_refused(done, messages, "flowers.toml", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.toml"], ["nowhere.toml", "lenet5-digits"]),
        (["--set", "train.epochs"], ["train.epochs", "KEY=VALUE"]),
        (["--set", "train.epochs=-1"], ["train.epochs", ">= 0"]),
    ],
)
def test_arguments(
    command: Any, messages: Any, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    assert_refused(command("greenprune", "run", *arguments), messages, *words)
    assert not (tmp_path / "runs").exists()


# Weights, images and targets: refused before anything is trained


def weights(name: str) -> dict[str, str]:
    return {"model": f'weights = "{name}"', "data": 'held_out_from = "train"'}


def missing_weights(folder: Path) -> tuple[dict[str, str], list[str]]:
    return weights("gone.safetensors"), ["gone.safetensors", "no such file"]


def truncated_weights(folder: Path) -> tuple[dict[str, str], list[str]]:
    whole = lenet_weights(folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return weights("cut.safetensors"), ["cut.safetensors", "truncated"]


def truncated_checkpoint(folder: Path) -> tuple[dict[str, str], list[str]]:
    import torch

    from greenprune.models import lenet5

    torch.save({"state_dict": lenet5().state_dict()}, folder / "cut.th")
    whole = (folder / "cut.th").read_bytes()
    (folder / "cut.th").write_bytes(whole[: len(whole) // 2])
    return weights("cut.th"), ["cut.th", "truncated"]


def unfitting_weights(folder: Path) -> tuple[dict[str, str], list[str]]:
    lenet_weights(folder / "seven.safetensors", classes=7)
    return weights("seven.safetensors"), ["seven.safetensors", "key '", "(7", "(10"]


def too_few_outputs(folder: Path) -> tuple[dict[str, str], list[str]]:
    return {"model": "arguments = { num_classes = 7 }"}, ["[7]", "10 classes", "model.arguments"]


def empty_class_folder(folder: Path) -> tuple[dict[str, str], list[str]]:
    (folder / "images" / "nothing").mkdir()
    return {}, [str(Path("images") / "nothing"), "no images"]


def unreadable_image(folder: Path) -> tuple[dict[str, str], list[str]]:
    broken = folder / "images" / "class3" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return {}, [str(Path("images") / "class3" / "2.png"), "cannot be read"]


def missing_images(folder: Path) -> tuple[dict[str, str], list[str]]:
    shutil.rmtree(folder / "images")
    return {}, ["images", "no such folder"]


def unknown_target(folder: Path) -> tuple[dict[str, str], list[str]]:
    return {"compile": 'target = "x68"'}, ["'x68'", "did you mean 'x86'"]


def target_elsewhere(folder: Path) -> tuple[dict[str, str], list[str]]:
    return {"compile": 'target = "jetson"'}, [
        "tensorrt is not on this machine",
        "greenprune-export --target jetson-orin-nano",
    ]


def unknown_runtime(folder: Path) -> tuple[dict[str, str], list[str]]:
    return {"compile": 'runtimes = ["tensorflow"]'}, [
        "compile.runtimes",
        "'tensorflow'",
        "openvino",
    ]


def unavailable_precision(folder: Path) -> tuple[dict[str, str], list[str]]:
    return {"compile": 'precision = "fp16"'}, ["has no precision 'fp16'", "fp32, int8"]


@pytest.mark.parametrize(
    "spoil",
    [
        missing_weights,
        truncated_weights,
        truncated_checkpoint,
        unfitting_weights,
        too_few_outputs,
        empty_class_folder,
        unreadable_image,
        missing_images,
        unknown_target,
        target_elsewhere,
        unknown_runtime,
        unavailable_precision,
    ],
)
def test_input(
    command: Any,
    messages: Any,
    tmp_path: Path,
    spoil: Callable[[Path], tuple[dict[str, str], list[str]]],
) -> None:
    write_images(tmp_path / "images")
    lines, words = spoil(tmp_path)
    done = command("greenprune", "run", recipe(tmp_path, **lines).name)
    assert_refused(done, messages, *words)
    assert_nothing_complete(tmp_path / "runs")
    assert not list(tmp_path.rglob("train-*.safetensors")), "found out only after training"


# Bundles


def change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "graphs/mild.onnx",
        "artifacts/onnxruntime/aggressive.onnx",
        "artifacts/openvino/dense.bin",
        "samples/replay_inputs.npy",
    ],
)
def test_bundle_with_a_changed_byte(
    finished: Any, command: Any, messages: Any, tmp_path: Path, name: str
) -> None:
    from greenprune.errors import BundleError
    from greenprune.runtime import AdaptiveSession

    bundle = Path(shutil.copytree(finished.bundle, tmp_path / "digits.bundle"))
    change_one_byte(bundle / name)
    done = command("greenprune-bench", bundle, "--preset", "quick", "-o", "results.json")
    assert_refused(done, messages, name, "SHA-256", "copy the bundle again")
    assert not (tmp_path / "results.json").exists()
    if name.startswith("artifacts/onnxruntime"):
        with pytest.raises(BundleError, match=name):
            AdaptiveSession(bundle, runtime="onnxruntime")


def test_changed_weights_in_a_run(
    finished: Any, command: Any, schedule: Any, messages: Any, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "runs")
    change_one_byte(run / "train" / "network" / "weights.safetensors")
    shutil.rmtree(run / "export")
    done = command("greenprune", "run", "--name", "digits", *schedule())
    assert_refused(done, messages, str(Path("train") / "network" / "weights.safetensors"))
    assert not (run / "export").exists()
    assert not list(run.glob(".partial-*"))


# A full disk: a small file system of its own, which goes when its command ends


FULL = """
set -e
mkdir -p small
mount -t tmpfs -o size=64m tmpfs small
if test -d prepared; then cp -a prepared/. small; fi
free=$(df --output=avail -k small | tail -n 1)
head -c "$(( (free - {left}) * 1024 ))" /dev/zero > small/filler
status=0
{command} || status=$?
rm small/filler
cp -a small after
exit $status
"""


@pytest.fixture
def on_full_disk(command_line: Any, tmp_path: Path) -> Callable[..., Any]:
    """Run a command that writes into ``small``, where ``left`` KiB are left.

    What was in ``prepared`` is in it before; what is in it at the end is copied to ``after``.
    """
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no file system can be mounted in a name space of one's own here")

    def run(left: int, name: str, *arguments: str) -> Any:
        import shlex

        line = command_line(name, *arguments)
        script = FULL.format(left=left, command=shlex.join(line["args"]))
        line["args"] = ["unshare", "-rm", "sh", "-c", script]
        return subprocess.run(**line, capture_output=True, check=False, timeout=120)

    return run


def test_disk_is_full_while_training(
    on_full_disk: Any, schedule: Any, messages: Any, tmp_path: Path
) -> None:
    done = on_full_disk(200, "greenprune", "run", "--runs", "small", *schedule())
    assert_refused(done, messages, str(Path("small") / "lenet5-digits"), "the disk is full")
    assert_nothing_complete(tmp_path / "after")


@pytest.mark.parametrize("stage", ["export", "calibrate", "bundle-x86"])
def test_disk_is_full_in_a_late_stage(
    finished: Any, on_full_disk: Any, schedule: Any, messages: Any, tmp_path: Path, stage: str
) -> None:
    run = finished.copy(tmp_path / "prepared")
    shutil.rmtree(run / stage)
    done = on_full_disk(
        100, "greenprune", "run", "--runs", "small", "--name", "digits", *schedule()
    )
    assert_refused(done, messages, str(Path("small") / "digits"), "the disk is full")
    after = tmp_path / "after" / "digits"
    assert not (after / stage).exists()
    assert not list(after.rglob(".partial-*"))
    kept = {path.parent.name for path in after.glob("*/stage.json")}
    assert kept == {path.parent.name for path in run.glob("*/stage.json")}


def test_disk_is_full_for_the_bundle(
    finished: Any, on_full_disk: Any, messages: Any, tmp_path: Path
) -> None:
    finished.copy(tmp_path / "runs")
    done = on_full_disk(100, "greenprune-export", "digits", "-o", "small/digits.bundle")
    assert_refused(done, messages, "digits.bundle", "the disk is full")
    assert list((tmp_path / "after").iterdir()) == []
