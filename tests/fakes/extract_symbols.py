"""Make tensorrt_symbols.json: which symbols that greenprune could touch each TensorRT has.

    pip download --no-deps --only-binary :all: --python-version 3.10 -d W tensorrt_cu12_bindings==V
    python3.10 extract_symbols.py W/*.whl > tensorrt_symbols.json

The bindings in these wheels are extension modules without the libraries that they call. A dozen C
functions are all they need to be imported, so empty ones are compiled here, and Python's own
introspection then tells the classes, members, enumerations and parameters. Needs Python 3.10 (as
the wheels) and a C compiler; nothing of the wheels is kept.

In the table, ``symbols`` maps ``Class.member`` to one entry for each of ``versions``: null where it
is absent, else the value of an enumeration's member, the parameters of a method, or "property".
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]

TOUCHED = {
    "ILogger": "log Severity",
    "ILogger.Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
    "Builder": "create_network create_builder_config create_optimization_profile "
    "build_serialized_network build_engine platform_has_fast_fp16 platform_has_fast_int8",
    "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH STRONGLY_TYPED",
    "BuilderFlag": "FP16 INT8 TF32 OBEY_PRECISION_CONSTRAINTS EDITABLE_TIMING_CACHE "
    "VERSION_COMPATIBLE",
    "MemoryPoolType": "WORKSPACE",
    "IBuilderConfig": "set_flag clear_flag set_memory_pool_limit add_optimization_profile "
    "create_timing_cache set_timing_cache get_timing_cache builder_optimization_level "
    "hardware_compatibility_level int8_calibrator max_num_tactics max_workspace_size",
    "IOptimizationProfile": "set_shape get_shape",
    "ITimingCache": "serialize combine reset",
    "IHostMemory": "nbytes dtype",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input num_outputs get_output",
    "ILayer": "name type num_outputs get_output precision set_output_type",
    "LayerType": "CONVOLUTION DECONVOLUTION MATRIX_MULTIPLY QUANTIZE DEQUANTIZE CAST ACTIVATION "
    "ELEMENTWISE CONSTANT SHUFFLE REDUCE",
    "ITensor": "name shape dtype",
    "DataType": "FLOAT HALF BF16 INT8 INT32 INT64 UINT8 BOOL",
    "OnnxParser": "parse parse_from_file num_errors get_error supports_model supports_model_v2",
    "ParserError": "node node_name node_operator desc code",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context num_io_tensors get_tensor_name get_tensor_mode "
    "get_tensor_shape get_tensor_dtype get_tensor_profile_shape device_memory_size "
    "device_memory_size_v2 num_bindings get_binding_name serialize",
    "TensorIOMode": "NONE INPUT OUTPUT",
    "IExecutionContext": "set_input_shape get_tensor_shape set_tensor_address execute_async_v3 "
    "execute_v2 execute_async_v2 infer_shapes",
    "IInt8Calibrator": "",
    "HardwareCompatibilityLevel": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
}


def inspect(binding: Path) -> dict[str, Any]:
    """The touched symbols of one extension module, which this process then holds for good."""
    spec = importlib.util.spec_from_file_location("tensorrt", binding)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = {}
    for path, members in TOUCHED.items():
        owner: Any = module
        for part in path.split("."):
            owner = getattr(owner, part, None)
        if owner is None:
            continue
        constructor = parameters("__init__", owner.__init__.__doc__)
        if constructor != "property" and not hasattr(owner, "__members__"):
            found[f"{path}.__init__"] = constructor
        for name in members.split():
            value = getattr(owner, name, None)
            if value is None:
                continue
            if name in getattr(owner, "__members__", {}):
                found[f"{path}.{name}"] = int(value)
            elif callable(value):
                found[f"{path}.{name}"] = parameters(name, value.__doc__)
            else:
                found[f"{path}.{name}"] = "property"
    return found


def parameters(name: str, text: str | None) -> list[list[str]] | str:
    """Names of the parameters of each overload, from the signature that pybind11 writes first."""
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((self[^\n]*)\) ->", text or "", re.MULTILINE)
    overloads = [re.findall(r"(?:^|, )(\w+): ", signature)[1:] for signature in signatures]
    return [
        names for at, names in enumerate(overloads) if names not in overloads[:at]
    ] or "property"


def inspect_wheel(wheel: Path) -> dict[str, Any]:
    """In a process of its own, since one process holds one version."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        source = Path(folder, "stub.c")
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for library in LIBRARIES:
            for major in (10, 11):
                target = Path(folder, f"lib{library}.so.{major}")
                subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source], check=True)
        binding = Path(folder, "tensorrt_bindings", "tensorrt.so")
        answer = subprocess.run(
            [sys.executable, __file__, "--binding", str(binding)],
            env=os.environ | {"LD_LIBRARY_PATH": folder},
            capture_output=True,
            check=True,
        )
    return dict(json.loads(answer.stdout))


def main(arguments: list[str]) -> None:
    if arguments[0] == "--binding":
        print(json.dumps(inspect(Path(arguments[1]))))
        return
    found = {Path(wheel).name.split("-")[1]: inspect_wheel(Path(wheel)) for wheel in arguments}
    versions = sorted(found, key=lambda text: [int(part) for part in text.split(".")])
    wanted = {
        f"{owner}.{member}": None
        for owner, members in TOUCHED.items()
        for member in ["__init__", *members.split()]
    }
    symbols = {
        symbol: [found[version].get(symbol) for version in versions]
        for symbol in wanted
        if not symbol.endswith("__init__") or any(symbol in of for of in found.values())
    }
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in symbols.items())
    print(f'{{\n  "versions": {json.dumps(versions)},\n  "symbols": {{\n{rows}\n  }}\n}}')


if __name__ == "__main__":
    main(sys.argv[1:])
