"""The fakes are worth as much as they resemble: symbols by version, parameters, CUDA's names."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

from cuda_fake import FakeCuda, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from tensorrt_fake import IMPLEMENTATIONS, TABLE, VERSIONS, FakeTensorRt

from greenprune.errors import TargetError
from greenprune_targets.cuda_runtime import call, cuda_runtime


@pytest.mark.parametrize(
    ("symbol", "present"),
    [
        ("BuilderFlag.FP16", [True, True, False, False]),
        ("BuilderFlag.INT8", [True, True, False, False]),
        ("BuilderFlag.EDITABLE_TIMING_CACHE", [False, True, True, True]),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", [True, True, False, False]),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", [True, True, True, True]),
    ],
)
def test_a_symbol_that_a_version_lacks_raises(symbol: str, present: list[bool]) -> None:
    owner, member = symbol.split(".")
    for version, there in zip(VERSIONS, present, strict=True):
        package = FakeTensorRt(version, FakeCuda())
        assert hasattr(getattr(package, owner), member) == there


@pytest.mark.parametrize("version", VERSIONS)
def test_members_of_other_versions_raise_on_objects_too(version: str) -> None:
    package = FakeTensorRt(version, FakeCuda())
    config = package.IBuilderConfig()
    with pytest.raises(AttributeError, match=f"IBuilderConfig of TensorRT {version}"):
        config.max_workspace_size = 1
    if version.startswith("11"):
        with pytest.raises(AttributeError, match="int8_calibrator"):
            config.int8_calibrator = None


def test_strong_typing_is_another_number_in_version_11() -> None:
    values = TABLE["symbols"]["NetworkDefinitionCreationFlag.STRONGLY_TYPED"]
    assert values == [1, 1, 0, 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_takes_the_parameters_that_the_real_one_takes(version: str) -> None:
    package, column, compared = FakeTensorRt(version, FakeCuda()), VERSIONS.index(version), 0
    for implementation in IMPLEMENTATIONS:
        for name, function in vars(implementation).items():
            row = TABLE["symbols"].get(f"{implementation.__name__}.{name}")
            overloads = row[column] if row else None
            if not inspect.isfunction(function) or not isinstance(overloads, list):
                continue
            own = list(inspect.signature(function).parameters)[1:]
            optional = [names[: len(own)] for names in overloads]
            assert own in optional, f"{implementation.__name__}.{name}"
            compared += 1
    assert compared > 25
    assert package.__version__ == version


def test_every_public_member_of_the_fake_is_a_real_symbol() -> None:
    for implementation in IMPLEMENTATIONS:
        for name in vars(implementation):
            symbol = f"{implementation.__name__}.{name}"
            assert name.startswith("_") or symbol in TABLE["symbols"], symbol


def test_the_real_runtime_fails_by_name_where_there_is_no_gpu() -> None:
    """By a return code, or in cuda-python 12 by an exception that the driver is absent."""
    pytest.importorskip(
        "cuda.bindings.runtime", reason="needs cuda-python: pip install 'greenprune[cuda]'"
    )
    real = cuda_runtime()
    try:
        address = call(real, "cudaMalloc", 16)
    except TargetError as error:
        told = str(error)
    else:
        call(real, "cudaFree", address)
        pytest.skip("there is a GPU, and its runtime works")
    by_name = r"cudaMalloc: expected (cudaSuccess, got cudaError\w+ \(|an NVIDIA driver, got: )"
    assert re.match(by_name, told)


def test_the_fake_runtime_has_the_names_of_cuda_python() -> None:
    real: Any = pytest.importorskip(
        "cuda.bindings.runtime", reason="needs cuda-python: pip install 'greenprune[cuda]'"
    )
    real = import_module("cuda.bindings.runtime")
    for enumeration in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode):
        for member in enumeration:
            assert int(getattr(getattr(real, enumeration.__name__), member.name)) == member
    functions = [name for name in vars(FakeCuda) if name.startswith("cuda") and name[4].isupper()]
    for name in functions:
        if not callable(getattr(FakeCuda, name)) or inspect.isclass(getattr(FakeCuda, name)):
            continue
        signature = (getattr(real, name).__doc__ or "").splitlines()[0]
        real_count = signature.partition("(")[2].count(",") + (not signature.endswith("()"))
        own = inspect.signature(getattr(FakeCuda, name)).parameters
        assert len(own) - 1 == real_count, signature
    assert len(functions) > 15
