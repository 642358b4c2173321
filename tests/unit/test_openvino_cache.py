"""OpenVINO's compiled networks are kept for this machine, and never trusted blindly."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="pip install 'greenprune[x86]'")

from greenprune.bundle import open_bundle
from greenprune.errors import TargetError
from greenprune.registry import load_target
from greenprune_targets import openvino_cache, x86


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "greenprune" / "openvino"


@pytest.fixture
def artifact(tiny_bundle: Path) -> Path:
    return open_bundle(tiny_bundle).artifact("mild", "openvino")


def answer(artifact: Path, inputs: Any) -> Any:
    runner = load_target("x86").open(artifact, "openvino", 1)
    return runner.run(inputs)["logits"]


@pytest.fixture
def inputs(tiny_bundle: Path) -> Any:
    return open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")[:1]


class Counting:
    """OpenVINO's Core, with its compilations counted."""

    def __init__(self) -> None:
        self.real, self.compiled = x86._core(), 0

    def compile_model(self, *arguments: Any) -> Any:
        self.compiled += 1
        return self.real.compile_model(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(x86, "_core", lambda: counting)
    return counting


def test_a_second_opening_compiles_nothing(
    kept: Path, artifact: Path, inputs: Any, core: Counting
) -> None:
    first = answer(artifact, inputs)
    (blob,) = kept.iterdir()
    np.testing.assert_array_equal(answer(artifact, inputs), first)
    assert (core.compiled, list(kept.iterdir())) == (1, [blob])
    load_target("x86").open(artifact, "openvino", 2)
    assert core.compiled == 2, "other threads, another network"


@pytest.mark.parametrize("changed", ["version", "instruction sets"])
def test_another_version_or_processor_compiles_its_own(
    kept: Path,
    artifact: Path,
    inputs: Any,
    core: Counting,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    """A blob holds for the OpenVINO and the kernels that it was made with."""
    answer(artifact, inputs)
    if changed == "version":
        other = SimpleNamespace(get_version=lambda: "another version")
        monkeypatch.setattr(x86, "_openvino", lambda: other)
    else:
        monkeypatch.setattr(openvino_cache, "processor", lambda: {"isa": ["another set"]})
    answer(artifact, inputs)
    assert (core.compiled, len(list(kept.iterdir()))) == (2, 2)


def test_batch_1_has_a_network_of_its_own_and_others_share_one(
    kept: Path, artifact: Path, tiny_bundle: Path, core: Counting
) -> None:
    many = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")[:5]
    runner = load_target("x86").open(artifact, "openvino", 1)
    singly = [runner.run(many[at : at + 1])["logits"][0] for at in range(5)]
    assert core.compiled == 1, "no other batch came"
    for batch in (5, 2, 5, 1):
        together = runner.run(many[:batch])["logits"]
        np.testing.assert_allclose(together, singly[:batch], rtol=1e-4, atol=1e-4)
    assert core.compiled == 2
    again = load_target("x86").open(artifact, "openvino", 1)
    again.run(many)
    assert (core.compiled, len(list(kept.iterdir()))) == (2, 2), "both were kept"


def test_threads_at_once_get_their_own_answers_and_compile_once(
    kept: Path, artifact: Path, tiny_bundle: Path, core: Counting
) -> None:
    images = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    runner = load_target("x86").open(artifact, "openvino", 1)
    parts = [images[at : at + size] for size in (1, 2) for at in range(8)] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: runner.run(part)["logits"], parts))
    assert core.compiled == 2
    for part, each in zip(parts, found, strict=True):
        np.testing.assert_allclose(each, runner.run(part)["logits"], rtol=1e-4, atol=1e-4)


def test_what_changed_after_it_was_opened_is_not_mixed_in(
    kept: Path, artifact: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    images = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    mine = tmp_path / artifact.name
    for path in (artifact, artifact.with_suffix(".bin")):
        shutil.copyfile(path, tmp_path / path.name)
    runner = load_target("x86").open(mine, "openvino", 1)
    weights = bytearray(mine.with_suffix(".bin").read_bytes())
    weights[0] ^= 1
    mine.with_suffix(".bin").write_bytes(weights)
    runner.run(images[:1])
    with pytest.raises(TargetError, match="has changed since it was opened"):
        runner.run(images[:2])
    runner.close()
    with pytest.raises(TargetError, match="was closed"):
        runner.run(images[:1])


def test_an_answer_stays_when_the_next_one_is_computed(artifact: Path, tiny_bundle: Path) -> None:
    images = open_bundle(tiny_bundle).read_array("samples/replay_inputs.npy")
    runner = load_target("x86").open(artifact, "openvino", 1)
    taken = images[:1].copy()
    first = runner.run(taken)["logits"]
    told = first.copy()
    taken[:] = 0
    runner.run(images[1:2])
    np.testing.assert_array_equal(first, told)


def test_other_shapes_than_the_networks_are_refused(artifact: Path, inputs: Any) -> None:
    runner = load_target("x86").open(artifact, "openvino", 1)
    for wrong in (inputs[0, 0, 0, 0], inputs[:, :, :, :1], inputs[0]):
        with pytest.raises(RuntimeError):
            runner.run(np.ascontiguousarray(wrong))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "consistent rubbish"])
def test_a_damaged_file_is_compiled_again(
    kept: Path, artifact: Path, inputs: Any, core: Counting, damage: str
) -> None:
    import hashlib

    first = answer(artifact, inputs)
    (path,) = kept.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-100] ^= 0xFF
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(hashlib.sha256(b"rubbish").hexdigest().encode() + b"rubbish")
    path.write_bytes(content)
    np.testing.assert_array_equal(answer(artifact, inputs), first)
    assert core.compiled == 2
    answer(artifact, inputs)
    assert core.compiled == 2, "mended"


def test_another_network_of_the_same_name_is_another_one(
    kept: Path, tiny_bundle: Path, inputs: Any
) -> None:
    opened = open_bundle(tiny_bundle)
    mild = answer(opened.artifact("mild", "openvino"), inputs)
    dense = answer(opened.artifact("dense", "openvino"), inputs)
    assert not np.array_equal(mild, dense)
    assert len(list(kept.iterdir())) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, artifact: Path, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.isfinite(answer(artifact, inputs)).all()
