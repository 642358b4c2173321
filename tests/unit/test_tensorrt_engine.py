"""Building engines with every TensorRT from 10.3 to 11.4, by a fake with that version's symbols."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'greenprune[host]'")
sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import cuda_fake
import jetson_tree
import tensorrt_fake
import toy_graphs
from tensorrt_fake import VERSIONS

from greenprune.errors import MissingPackageError, TargetError
from greenprune_targets import tensorrt_cache, tensorrt_engine
from greenprune_targets.tensorrt_cache import engine_for, load, this_device

PRECISIONS = ("fp32", "fp16", "int8")
NO_KERNEL = "Error Code 10: Could not find any implementation for node first_node."


class Machine:
    """A Jetson Orin Nano with a TensorRT, and a cache that is empty."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.root = jetson_tree.write(folder / "root")
        self.cuda = cuda_fake.install(monkeypatch, cuda_fake.FakeCuda())
        self.install(version)

    def install(self, version: str) -> None:
        self.trt = tensorrt_fake.install(self.monkeypatch, version, self.cuda)

    def graph(self, precision: str = "fp32", **options: Any) -> Path:
        return toy_graphs.write(self.folder / f"toy-{precision}.onnx", precision, **options)

    def engine(self, graph: Path, precision: str = "fp32", **options: Any) -> Path:
        return engine_for(graph, precision, cache=self.folder / "cache", root=self.root, **options)

    def builds(self) -> list[Any]:
        return [call[1:] for call in self.trt._calls if call[0] == "build"]


@pytest.fixture(params=VERSIONS)
def machine(request: pytest.FixtureRequest, monkeypatch: Any, tmp_path: Path) -> Machine:
    """One for each version of TensorRT."""
    return Machine(monkeypatch, tmp_path, request.param)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path, VERSIONS[-1])


@pytest.fixture
def oldest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path, VERSIONS[0])


def record_of(engine: Path) -> dict[str, Any]:
    return dict(json.loads(engine.with_suffix(".json").read_text()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_version_builds_every_precision_strongly_typed(
    machine: Machine, precision: str
) -> None:
    engine = machine.engine(machine.graph(precision), precision)
    [(strong, flags, pools, _)] = machine.builds()
    assert strong
    assert flags == ([] if precision == "fp32" else ["TF32"]), "no precision flag; no TF32 in fp32"
    assert 0 < pools["WORKSPACE"] < 5_000_000 * 1024
    record = record_of(engine)
    expected = "FLOAT" if precision == "fp32" else "HALF"
    assert record["layer_types"] == {"first_node": expected, "second_node": expected}
    assert record["typing"] == "strong"


def test_the_record_says_what_the_engine_depends_on(machine: Machine) -> None:
    record = record_of(machine.engine(machine.graph()))
    assert record["tensorrt"] == machine.trt.__version__
    assert (record["l4t"], record["jetpack"]) == ("36.4.3", "6.2")
    assert (record["gpu"], record["sm"], record["power_mode"]) == ("Orin", "8.7", "25W")
    assert (record["precision"], record["batch"]) == ("fp32", 1)
    assert record["flags"] == ["STRONGLY_TYPED", "no TF32"]


def test_what_was_built_is_found_again(machine: Machine) -> None:
    graph = machine.graph()
    first = machine.engine(graph)
    assert machine.engine(graph) == first
    assert len(machine.builds()) == 1


def test_graph_precision_and_batch_each_have_their_engine(newest: Machine) -> None:
    graph = newest.graph()
    engines = {newest.engine(graph), newest.engine(graph, batch=8)}
    engines.add(newest.engine(newest.graph(operator="Relu", batch=1)))
    engines.add(newest.engine(newest.graph("fp16"), "fp16"))
    assert len(engines) == len(newest.builds()) == 4


def test_the_profile_goes_from_one_to_the_batch(newest: Machine) -> None:
    newest.engine(newest.graph(), batch=8)
    newest.engine(newest.graph(batch=1))
    with_profile, fixed = (build[3] for build in newest.builds())
    assert with_profile == [{"input": [[1, 3, 8, 8], [8, 3, 8, 8], [8, 3, 8, 8]]}]
    assert fixed == []


@pytest.mark.parametrize("options", [{"size": "size"}, {"batch": 4}])
def test_a_dynamic_size_or_a_fixed_batch_is_refused(newest: Machine, options: Any) -> None:
    with pytest.raises(TargetError, match=r"expected input 'input' with a dynamic batch.*got \["):
        newest.engine(newest.graph(**options))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", [*PRECISIONS, "int8 in fp32"])
def test_a_graph_in_another_precision_is_refused(
    newest: Machine, precision: str, graph: str
) -> None:
    kind, _, around = graph.partition(" in ")
    path = newest.graph(kind, surroundings=around or "fp16")
    if graph == precision:
        newest.engine(path, precision)
        return
    with pytest.raises(TargetError, match=f"for {precision}.*export the graph again"):
        newest.engine(path, precision)
    assert newest.builds() == []


def test_the_parsers_errors_name_the_node(machine: Machine) -> None:
    with pytest.raises(TargetError, match=r"node 1 'input_half_q_node' \(Quantize.*Non-zero zero"):
        machine.engine(machine.graph("int8", zero_point=3), "int8")
    with pytest.raises(TargetError, match=r"node 1 'active_node' \(NoSuch\): No importer"):
        machine.engine(machine.graph(operator="NoSuch"))


def test_what_is_no_graph_is_refused(newest: Machine) -> None:
    broken = newest.folder / "broken.onnx"
    broken.write_bytes(b"\xff not a graph")
    with pytest.raises(TargetError, match="Failed to parse the ONNX model"):
        newest.engine(broken)
    with pytest.raises(TargetError, match="expected an ONNX file, found none"):
        newest.engine(newest.folder / "absent.onnx")
    with pytest.raises(TargetError, match=r"got 'int4' and 1"):
        newest.engine(newest.graph(), "int4")
    with pytest.raises(TargetError, match=r"got 'fp32' and 0"):
        newest.engine(newest.graph(), batch=0)


def test_old_versions_fall_back_once_in_int8_and_say_so(
    oldest: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    oldest.trt._fail_builds = [["Error Code 9: infer_type failed for dequantize"]]
    engine = oldest.engine(oldest.graph("int8"), "int8")
    assert [build[:2] for build in oldest.builds()] == [
        (True, ["TF32"]),
        (False, ["FP16", "INT8", "TF32"]),
    ]
    assert record_of(engine)["typing"] == "weak"
    assert "weakly typed with the flags FP16 and INT8" in caplog.text
    assert "infer_type failed for dequantize" in caplog.text


def test_a_fallback_that_fails_too_is_an_error(oldest: Machine) -> None:
    oldest.trt._fail_builds = [["first"], ["second"]]
    with pytest.raises(TargetError, match=r"expected a int8 engine.*it said: second"):
        oldest.engine(oldest.graph("int8"), "int8")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_other_precision_falls_back(oldest: Machine, precision: str) -> None:
    oldest.trt._fail_builds = [["no"]]
    with pytest.raises(TargetError, match=f"expected a {precision} engine"):
        oldest.engine(oldest.graph(precision), precision)
    assert len(oldest.builds()) == 1


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_newer_versions_report_int8_and_never_downgrade(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    machine = Machine(monkeypatch, tmp_path, version)
    machine.trt._fail_builds = [["Could not infer output types for operation: dequantize"]]
    with pytest.raises(TargetError, match=r"int8 engine.*Could not infer output types"):
        machine.engine(machine.graph("int8"), "int8")
    assert len(machine.builds()) == 1
    assert not list((tmp_path / "cache").glob("*.engine"))


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 1: Cuda Runtime (out of memory)",
        "CUDA error 2 for 622329856-byte allocation.",
        "Skipping tactic 0x3e8 due to insufficient memory on requested size of 2147483648.",
        "Requested amount of GPU memory (1024 bytes) could not be allocated.",
    ],
)
def test_out_of_memory_is_named_also_behind_a_missing_kernel(
    machine: Machine, message: str
) -> None:
    machine.trt._fail_builds = [[message, NO_KERNEL]]
    with pytest.raises(TargetError, match=r"out of memory \(4883 MiB were free") as caught:
        machine.engine(machine.graph("int8"), "int8")
    assert message in str(caught.value)
    assert NO_KERNEL in str(caught.value)
    assert len(machine.builds()) == 1, "another typing needs the same memory"


def test_a_missing_kernel_alone_leaves_both_causes_open(newest: Machine) -> None:
    newest.trt._fail_builds = [[NO_KERNEL]]
    with pytest.raises(TargetError, match="no kernel here, or too little memory for one") as caught:
        newest.engine(newest.graph())
    assert "out of memory" not in str(caught.value)


def test_the_workspace_follows_the_memory_that_is_free(newest: Machine) -> None:
    graph = newest.graph()
    newest.cuda.free = 300 * 2**20  # the file cache holds the rest, and gives it back
    shared = newest.engine(graph, batch=2)
    newest.cuda.integrated = False
    discrete = newest.engine(graph, batch=3)
    assert record_of(shared)["workspace_bytes"] == 5_000_000 * 1024 // 2
    assert record_of(discrete)["workspace_bytes"] == 150 * 2**20


def test_timings_are_kept_for_the_next_build(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.engine(machine.graph())
    machine.engine(machine.graph(), batch=4)
    [timings] = (machine.folder / "cache").glob("timing-*.cache")
    assert timings.read_bytes() == f"{machine.trt.__version__}:timed;timed;".encode()
    timings.write_bytes(b"another version's")
    machine.engine(machine.graph(), batch=5)
    assert "timing cache is of another device or version" in caplog.text
    assert timings.read_bytes() == f"{machine.trt.__version__}:timed;".encode()


def test_a_damaged_engine_is_built_again(newest: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = newest.engine(newest.graph())
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1] + b"?")
    assert newest.engine(newest.graph()) == engine
    assert engine.read_bytes() == whole
    assert "it is damaged" in caplog.text


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_engine_without_a_record_is_built_again(newest: Machine, content: str | None) -> None:
    record = newest.engine(newest.graph()).with_suffix(".json")
    record.unlink()
    if content is not None:
        record.write_text(content)
    newest.engine(newest.graph())
    assert len(newest.builds()) == 2
    assert record_of(record)["precision"] == "fp32"


@pytest.mark.parametrize("change", ["tensorrt", "l4t", "gpu", "sm"])
def test_another_machine_builds_its_own_and_says_why(
    newest: Machine, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = newest.engine(newest.graph())
    if change == "tensorrt":
        newest.install(VERSIONS[0])
    elif change == "l4t":
        jetson_tree.write(newest.root, l4t="36.4.4")
    elif change == "gpu":
        newest.cuda.gpu = "Orin NX"
    else:
        newest.cuda.sm = "11.0"
    second = newest.engine(newest.graph())
    assert second != first
    assert first.exists()
    assert f"it was built for {change} " in caplog.text
    with pytest.raises(TargetError, match=f"it was built for {change} .*give the ONNX graph"):
        newest.engine(first)


def test_a_named_engine_is_taken_where_it_fits_and_else_refused(newest: Machine) -> None:
    engine = newest.engine(newest.graph())
    assert newest.engine(engine) == engine
    assert load(engine, this_device(newest.root)) == engine.read_bytes()
    with pytest.raises(TargetError, match="built for precision fp32, and here it is fp16"):
        newest.engine(engine, "fp16")
    engine.write_bytes(b"damaged")
    with pytest.raises(TargetError, match="damaged: its checksum"):
        newest.engine(engine)
    engine.with_suffix(".json").unlink()
    with pytest.raises(TargetError, match="no record beside it"):
        newest.engine(engine)


def test_two_at_once_build_once(newest: Machine) -> None:
    graph, found, together = newest.graph(), [], threading.Barrier(4)

    def go() -> None:
        together.wait()
        found.append(newest.engine(graph))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(newest.builds()) == 1


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tensorrt_cache.cache_folder() == tmp_path / "greenprune" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert tensorrt_cache.cache_folder() == tmp_path / "home/.cache/greenprune/engines"


def test_a_missing_package_names_its_extra(newest: Machine) -> None:
    with newest.monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingPackageError, match=r"greenprune\[jetson\].*--system-site-pack"):
            newest.engine(newest.graph())
        with pytest.raises(MissingPackageError, match=r"'tensorrt'.*greenprune\[cuda\]'$"):
            this_device(newest.folder)
    for module in ("cuda.bindings.runtime", "cuda.cudart"):
        newest.monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"'cuda-python'.*greenprune\[jetson\]"):
        newest.engine(newest.graph())


def test_the_module_of_older_cuda_python_is_found(newest: Machine) -> None:
    newest.monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    newest.monkeypatch.setitem(sys.modules, "cuda.cudart", newest.cuda)
    assert this_device(newest.root).gpu == "Orin"


def test_a_tensorrt_before_10_3_is_refused(newest: Machine) -> None:
    newest.trt.__version__ = "8.5.2.2"
    with pytest.raises(TargetError, match=r"TensorRT 10\.3 or later, got 8\.5\.2\.2"):
        newest.engine(newest.graph())


def test_a_machine_without_a_gpu_is_named(newest: Machine) -> None:
    no_gpu = cuda_fake.cudaError_t.cudaErrorNoDevice
    newest.cuda.failures = {"cudaGetDevice": [no_gpu]}
    with pytest.raises(TargetError, match=r"got cudaErrorNoDevice.*no GPU is visible"):
        newest.engine(newest.graph())


def test_a_builder_that_cannot_be_made_is_named(newest: Machine) -> None:
    def refuse(logger: Any) -> None:
        logger.log(newest.trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    newest.monkeypatch.setattr(newest.trt, "Builder", refuse)
    with pytest.raises(TargetError, match=r"no builder: CUDA initialization failure.*driver"):
        newest.engine(newest.graph())


def test_an_exception_of_the_builder_is_an_error_of_ours(newest: Machine) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError("std::bad_alloc")

    newest.monkeypatch.setattr(newest.trt.Builder, "build_serialized_network", refuse)
    with pytest.raises(TargetError, match=r"out of memory .*MemoryError: std::bad_alloc"):
        newest.engine(newest.graph())


def test_layers_of_one_name_are_all_told(newest: Machine) -> None:
    parsed = tensorrt_engine.parse_graph(newest.trt, newest.graph())
    for layer in parsed.network._layers:
        layer._name = "same"
    types = tensorrt_engine.layer_types(newest.trt, parsed.network)
    assert list(types.values()) == ["FLOAT", "FLOAT"]


def test_without_convolutions_the_matrix_products_tell_the_type(newest: Machine) -> None:
    parsed = tensorrt_engine.parse_graph(newest.trt, newest.graph("fp16"))
    parsed.network._layers = [
        layer for layer in parsed.network._layers if layer.type.name != "CONVOLUTION"
    ]
    assert tensorrt_engine.layer_types(newest.trt, parsed.network) == {"logits_half_node": "HALF"}
    with pytest.raises(TargetError, match="got none at all"):
        tensorrt_engine.check_types(newest.trt, Path("g.onnx"), "fp16", parsed.network, {})
