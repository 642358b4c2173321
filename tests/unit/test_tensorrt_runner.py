"""Running engines on a fake TensorRT and CUDA with real memory, against onnxruntime's answers."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="needs onnx: pip install 'greenprune[host]'")
sys.path.append(str(Path(__file__).resolve().parents[1] / "fakes"))

import cuda_fake
import jetson_tree
import tensorrt_fake
import toy_graphs
from cuda_fake import cudaError_t
from tensorrt_fake import VERSIONS

from greenprune.errors import TargetError
from greenprune_targets.tensorrt_runner import TensorRtRunner, open_engine, open_network


class Machine:
    """A Jetson with a TensorRT; opens a toy network, and knows what it must answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
        self.folder = folder
        self.root = jetson_tree.write(folder / "root")
        self.cuda = cuda_fake.install(monkeypatch, cuda_fake.FakeCuda())
        self.trt = tensorrt_fake.install(monkeypatch, version, self.cuda)

    def open(self, precision: str = "fp32", *, batch: int = 1) -> TensorRtRunner:
        graph = toy_graphs.write(self.folder / f"{precision}.onnx", precision)
        return self.open_graph(graph, precision, batch)

    def open_graph(self, graph: Path, precision: str = "fp32", batch: int = 1) -> TensorRtRunner:
        self.graph = graph
        return open_network(
            graph, precision, batch=batch, cache=self.folder / "cache", root=self.root
        )

    def answers(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        import onnxruntime

        session = onnxruntime.InferenceSession(self.graph)
        return np.concatenate([session.run(None, {"input": row[None]})[0] for row in inputs])


@pytest.fixture(params=VERSIONS)
def machine(request: pytest.FixtureRequest, monkeypatch: Any, tmp_path: Path) -> Machine:
    """One for each version of TensorRT."""
    return Machine(monkeypatch, tmp_path, request.param)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path, VERSIONS[-1])


def draw(count: int, seed: int = 0) -> NDArray[np.float32]:
    shape = (count, toy_graphs.CHANNELS, toy_graphs.SIZE, toy_graphs.SIZE)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agree(machine: Machine, runner: TensorRtRunner, inputs: NDArray[np.float32]) -> None:
    outputs = runner.run(inputs)
    assert set(outputs) == {"logits"}
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], machine.answers(inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_version_runs_every_precision(machine: Machine, precision: str) -> None:
    runner = machine.open(precision)
    assert (runner.input_name, runner.output_names) == ("input", ("logits",))
    for seed in range(4):  # directly, captured, launched, launched
        agree(machine, runner, draw(1, seed))
    runner.close()
    assert machine.cuda.live() == 0


def test_a_captured_graph_replaces_the_calls(machine: Machine) -> None:
    runner = machine.open()
    runner.run(draw(1))
    assert not runner.uses_graph
    runner.run(draw(1))
    assert runner.uses_graph
    copies = machine.cuda.calls["cudaMemcpyAsync"]
    agree(machine, runner, draw(1, 5))
    assert machine.cuda.calls["cudaMemcpyAsync"] == copies
    assert machine.cuda.calls["cudaGraphLaunch"] == 2
    assert machine.cuda.graphs == {}, "the recording goes once it is instantiated"


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("cudaStreamBeginCapture", cudaError_t.cudaErrorStreamCaptureUnsupported),
        ("cudaStreamEndCapture", cudaError_t.cudaErrorStreamCaptureInvalidated),
        ("cudaGraphInstantiate", cudaError_t.cudaErrorMemoryAllocation),
    ],
)
def test_a_capture_that_fails_is_told_once_and_the_answers_stay_right(
    newest: Machine, function: str, code: cudaError_t, caplog: pytest.LogCaptureFixture
) -> None:
    runner = newest.open()
    newest.cuda.failures = {function: [code]}
    for seed in range(4):
        agree(newest, runner, draw(1, seed))
    assert not runner.uses_graph
    assert caplog.text.count("runs without a CUDA graph") == 1
    assert code.name in caplog.text
    runner.close()
    assert newest.cuda.live() == 0


def test_a_network_that_refuses_to_be_captured_runs_without(
    newest: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    runner = newest.open()
    agree(newest, runner, draw(1))
    newest.trt._kernel_failures = 1
    agree(newest, runner, draw(1, 1))
    assert "runs without a CUDA graph" in caplog.text
    assert newest.cuda.streams == dict.fromkeys(newest.cuda.streams)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 11])
def test_large_batches_run_in_pieces(machine: Machine, count: int) -> None:
    runner = machine.open(batch=4)
    assert runner.largest_batch == 4
    outputs = runner.run(draw(count))
    assert outputs["logits"].shape == (count, toy_graphs.CLASSES)
    if count:
        agree(machine, runner, draw(count, 1))


def test_sizes_in_any_order_answer_right(newest: Machine) -> None:
    runner = newest.open(batch=4)
    for seed, count in enumerate([4, 4, 4, 1, 1, 1, 3, 4, 2, 2, 9, 1]):
        agree(newest, runner, draw(count, seed))
    runner.close()
    assert newest.cuda.live() == 0


def test_a_graph_with_a_fixed_batch_runs_one_at_a_time(newest: Machine) -> None:
    graph = toy_graphs.write(newest.folder / "fixed.onnx", batch=1)
    runner = newest.open_graph(graph, batch=8)
    assert runner.largest_batch == 1
    agree(newest, runner, draw(3))


def test_both_outputs_of_the_aggressive_network_come_back(newest: Machine) -> None:
    graph = toy_graphs.write(newest.folder / "aggressive.onnx", score=True)
    runner = newest.open_graph(graph, batch=4)
    assert runner.output_names == ("logits", "score")
    inputs = draw(7)
    outputs = runner.run(inputs)
    np.testing.assert_allclose(outputs["logits"], newest.answers(inputs), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(outputs["score"], outputs["logits"].max(axis=1))


def test_float16_ends_are_converted(newest: Machine) -> None:
    graph = toy_graphs.write(newest.folder / "half.onnx", "fp16", half_ends=True)
    runner = newest.open_graph(graph, "fp16", batch=2)
    inputs = draw(3)
    outputs = runner.run(inputs)["logits"]
    assert outputs.dtype == np.float32
    expected = newest.answers(inputs.astype(np.float16))
    np.testing.assert_array_equal(outputs, expected.astype(np.float32))


def test_a_new_size_runs_directly_before_it_is_captured(
    newest: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    runner = newest.open(batch=4)
    captured = []
    for count in [4, 4, 2, 2, 4, 4]:
        runner.run(draw(count))
        captured.append(runner.uses_graph)
    assert captured == [False, True, False, True, False, True]
    assert caplog.text == ""


def test_eight_threads_get_their_own_answers(newest: Machine) -> None:
    runner = newest.open(batch=4)
    inputs = [draw(1 + seed % 6, seed) for seed in range(8)]
    expected = [newest.answers(each) for each in inputs]
    wrong: list[Any] = []
    together = threading.Barrier(8)

    def go(index: int) -> None:
        try:
            together.wait()
            for _ in range(10):
                got = runner.run(inputs[index])["logits"]
                np.testing.assert_allclose(got, expected[index], rtol=1e-3, atol=1e-4)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=go, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_answers_are_copies(newest: Machine) -> None:
    runner = newest.open()
    first = runner.run(draw(1))["logits"]
    kept = first.copy()
    runner.run(draw(1, 1))
    np.testing.assert_array_equal(first, kept)
    runner.close()
    np.testing.assert_array_equal(first, kept)


def test_inputs_of_another_shape_or_layout(newest: Machine) -> None:
    runner = newest.open(batch=2)
    with pytest.raises(TargetError, match=r"expected inputs \[N, 3, 8, 8\], got \[1, 3, 9, 8\]"):
        runner.run(np.zeros((1, 3, 9, 8), np.float32))
    strided = draw(4)[::2].transpose(0, 1, 3, 2)
    agree(newest, runner, strided)


@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost"])
def test_out_of_memory_is_named_and_leaves_nothing_behind(
    machine: Machine, function: str, nth: int
) -> None:
    works = [cudaError_t.cudaSuccess] * nth
    machine.cuda.failures = {function: [*works, cudaError_t.cudaErrorMemoryAllocation]}
    with pytest.raises(
        TargetError, match=f"{function}: expected cudaSuccess, got cudaErrorMemoryAllocation"
    ) as caught:
        machine.open()
    assert "out of GPU memory" in str(caught.value)
    assert machine.cuda.live() == 0


@pytest.mark.parametrize(
    "function", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"]
)
def test_every_return_code_is_checked(newest: Machine, function: str) -> None:
    runner = newest.open()
    for _ in range(2):
        runner.run(draw(1))
    if function == "cudaMemcpyAsync":  # the graph would go without
        runner._drop_graph()
        runner._graph_works = False
    newest.cuda.failures = {function: [cudaError_t.cudaErrorLaunchFailure]}
    with pytest.raises(TargetError, match=f"{function}: .* got cudaErrorLaunchFailure"):
        runner.run(draw(1))
    agree(newest, runner, draw(1, 2))


def test_a_network_that_does_not_run_is_an_error(newest: Machine) -> None:
    runner = newest.open()
    newest.trt._kernel_failures = 1
    with pytest.raises(TargetError, match="expected TensorRT to run the network, it does not"):
        runner.run(draw(1))
    agree(newest, runner, draw(1))


def test_close_frees_everything_and_ends_the_runs(newest: Machine) -> None:
    runner = newest.open()
    for _ in range(3):
        runner.run(draw(1))
    assert newest.cuda.live() > 0
    runner.close()
    runner.close()
    assert newest.cuda.live() == 0
    with pytest.raises(TargetError, match="expected an open runner"):
        runner.run(draw(1))


def test_a_failure_in_close_is_told_and_the_rest_is_freed(newest: Machine) -> None:
    runner = newest.open()
    newest.cuda.failures = {"cudaFreeHost": [cudaError_t.cudaErrorInvalidValue]}
    with pytest.raises(TargetError, match=r"cudaFreeHost: .* got cudaErrorInvalidValue"):
        runner.close()
    assert newest.cuda.live() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [("version", "Version tag does not match"), ("sm", "incompatible device")],
)
def test_what_tensorrt_refuses_is_told_in_its_words(
    newest: Machine, monkeypatch: pytest.MonkeyPatch, change: str, said: str
) -> None:
    runner = newest.open()
    [engine] = (newest.folder / "cache").glob("*.engine")
    plan = engine.read_bytes()
    runner.close()
    if change == "version":
        newest.trt = tensorrt_fake.install(monkeypatch, VERSIONS[0], newest.cuda)
    else:
        newest.cuda.sm = "11.0"
    with pytest.raises(TargetError, match="delete the engine to have it built again") as caught:
        TensorRtRunner(newest.trt, newest.cuda, plan, engine)
    assert said in str(caught.value)
    with pytest.raises(TargetError, match="expected an engine built on this machine"):
        open_engine(engine, newest.root)
    assert newest.cuda.live() == 0


def test_no_room_for_a_context_is_told(newest: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest.trt.ICudaEngine, "create_execution_context", lambda self: None)
    with pytest.raises(TargetError, match=r"to make room to run this engine.*close programs"):
        newest.open()
