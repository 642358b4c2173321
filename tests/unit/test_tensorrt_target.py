"""What the NVIDIA targets write: checked by rules and by TensorRT-RTX before it leaves the host."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime.quantization", reason="needs the extra 'host'")
sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import toy_graphs

from greenprune.errors import TargetError
from greenprune.registry import Build, load_target
from greenprune_targets import tensorrt_target

TARGETS = ("cuda", "jetson-orin-nano")
IMAGES = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
NODES = ("first_node", "second_node", "logits_node")


def compiled(folder: Path, target: str = "cuda", **build: Any) -> tuple[Path, dict[str, str]]:
    graph = toy_graphs.write(folder / "toy.onnx")
    found = load_target(target)
    wanted = Build(runtime="tensorrt", calibration=IMAGES, **build)
    path = found.compile(graph, wanted, folder / target, "dense")
    return path, found.layer_precisions(path, "tensorrt")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_is_in_the_graph(tmp_path: Path, target: str, precision: str) -> None:
    types = compiled(tmp_path, target, precision=precision)[1]
    assert set(types.values()) == {precision}


def test_int8_with_every_layer_kept_in_float_is_a_graph_in_fp16(tmp_path: Path) -> None:
    """The export leaves it out by name; TensorRT-RTX must not abort it before."""
    types = compiled(tmp_path, precision="int8", keep_float=NODES)[1]
    assert set(types.values()) == {"fp16"}


@pytest.fixture
def asymmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantiser that shifts an activation's zero point."""

    def quantised(_: Path, __: Any, destination: Path, **___: Any) -> None:
        toy_graphs.write(destination, "int8", zero_point=3)

    monkeypatch.setattr(tensorrt_target.quantise, "tensorrt_int8", quantised)


@pytest.mark.usefixtures("asymmetric")
def test_an_asymmetric_graph_does_not_leave_the_host(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"input_half_q_node.*zero point"):
        compiled(tmp_path, precision="int8")


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT-RTX: pip install 'greenprune[check]'",
)
@pytest.mark.usefixtures("asymmetric")
def test_what_the_rules_let_pass_tensorrt_rtx_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tensorrt_target.qdq_rules, "check_tensorrt", lambda _: {"first_node": "int8"}
    )
    with pytest.raises(TargetError, match=r"TensorRT-RTX.*input_half_q_node"):
        compiled(tmp_path, precision="int8")
