"""Graphs for TensorRT, checked by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'greenprune[host]'")
sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import cuda_fake
import tensorrt_fake
import toy_graphs

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets import tensorrt_check, tensorrt_engine

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT-RTX: pip install 'greenprune[check]'",
)


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("int8", "HALF")]
)
def test_every_precision_parses_and_builds(tmp_path: Path, precision: str, kind: str) -> None:
    graph = toy_graphs.write(tmp_path / "toy.onnx", precision)
    types = tensorrt_check.parse(graph, precision)
    assert types == {"first_node": kind, "second_node": kind}


@needs_rtx
def test_asymmetric_quantization_is_refused_with_its_node(tmp_path: Path) -> None:
    graph = toy_graphs.write(tmp_path / "toy.onnx", "int8", zero_point=3)
    with pytest.raises(TargetError, match=r"'input_half_q_node' \(QuantizeLinear\).*[Zz]ero"):
        tensorrt_check.parse(graph)


@needs_rtx
def test_an_unknown_operator_is_refused_with_its_node(tmp_path: Path) -> None:
    graph = toy_graphs.write(tmp_path / "toy.onnx", operator="NoSuch")
    with pytest.raises(TargetError, match=r"TensorRT-RTX .* node 1 'active_node' \(NoSuch\)"):
        tensorrt_check.parse(graph)


@needs_rtx
def test_another_precision_than_asked_is_refused(tmp_path: Path) -> None:
    graph = toy_graphs.write(tmp_path / "toy.onnx", "fp32")
    with pytest.raises(TargetError, match=r"give HALF for fp16, got first_node \(FLOAT\)"):
        tensorrt_check.parse(graph, "fp16")


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("fp16", {}),
        ("int8", {}),
        ("int8", {"surroundings": "fp32"}),
        ("int8", {"zero_point": 3}),
        ("fp32", {"operator": "NoSuch"}),
    ],
)
def test_the_fake_parses_as_tensorrt_rtx_does(
    tmp_path: Path, precision: str, options: dict[str, Any]
) -> None:
    graph = toy_graphs.write(tmp_path / "toy.onnx", precision, **options)
    fake = tensorrt_fake.FakeTensorRt(tensorrt_fake.VERSIONS[-1], cuda_fake.FakeCuda())
    try:
        expected: dict[str, str] | None = tensorrt_check.parse(graph)
    except TargetError:
        expected = None
    if expected is None:
        with pytest.raises(TargetError):
            tensorrt_engine.parse_graph(fake, graph)
    else:
        network = tensorrt_engine.parse_graph(fake, graph).network
        assert tensorrt_engine.layer_types(fake, network) == expected


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingPackageError, match=r"'tensorrt-rtx'.*greenprune\[check\]"):
        tensorrt_check.parse(tmp_path / "toy.onnx")
