"""Measuring a folder of graphs: the plan's checks, rounds, doubt, resuming; a device of fakes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from greenprune import schema, storage
from greenprune.errors import MeasurementError, TargetError
from greenprune.harness import cost_probe, cost_table, cost_worker, protocol, serving
from greenprune.harness.cost_plan import Chain, ProbePlan, ProbePoint, ProbeShape, read_plan
from greenprune.harness.cost_probe import measure
from greenprune.harness.cost_table import LayerShape
from greenprune.registry import Capabilities

SHAPE = LayerShape(operator="convolution", kernel=(3, 3), input_size=(8, 8))
DISPATCH_US = 50.0
CAPABILITIES = Capabilities(
    precisions=("fp32",),
    runtimes=("onnxruntime",),
    opset=17,
    width_multiple=32,
    meters=("rapl",),
    machines=("x86_64",),
)


def point(in_width: int, out_width: int) -> ProbePoint:
    return ProbePoint(
        in_width=in_width,
        out_width=out_width,
        chains=tuple(
            Chain(
                layers=layers,
                artifact=f"artifacts/{in_width}-{out_width}-{layers}.onnx",
                input_shape=(1, in_width, 8, 8),
            )
            for layers in (4, 12)
        ),
    )


def write_folder(folder: Path, **changed: Any) -> Path:
    """Two shapes and a block probe that shares a point; the artifacts are only names."""
    square = ProbeShape(shape=SHAPE, mirrored=True, points=tuple(point(8, out) for out in (8, 16)))
    strided = ProbeShape(shape=replace(SHAPE, stride=(2, 2)), mirrored=False, points=(point(3, 8),))
    widths = ProbeShape(
        shape=SHAPE, mirrored=False, points=tuple(point(w, w) for w in range(4, 41))
    )
    plan = ProbePlan(
        target="x86",
        runtime="onnxruntime",
        network="a test",
        shapes=(square, strided),
        block=widths,
        files={},
    )
    shapes = (*plan.shapes, widths)
    chains = {chain for shape in shapes for each in shape.points for chain in each.chains}
    for chain in chains:
        path = folder / chain.artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(chain.artifact)
    files = {chain.artifact: storage.sha256(folder / chain.artifact) for chain in chains}
    storage.write_json(folder / "probe.json", schema.encode(replace(plan, files=files)) | changed)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "folder")


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "probe.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_plan_comes_back_as_it_was_written(folder: Path) -> None:
    plan = read_plan(folder)
    assert [shape.mirrored for shape in plan.shapes] == [True, False]
    assert plan.shapes[0].points[1].chains[1] == Chain(
        layers=12, artifact="artifacts/8-16-12.onnx", input_shape=(1, 8, 8, 8)
    )
    assert plan.block is not None


FIRST = "artifacts/3-8-4.onnx"


def first_chain(content: Any) -> Any:
    return content["shapes"][0]["points"][0]["chains"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=7), "found kind 'greenprune-cost-probe' of schema 7"),
        (lambda c: c.update(kind="bundle"), "found kind 'bundle'"),
        (lambda c: c.update(runtme="x"), "unknown key 'runtme'"),
        (lambda c: c.pop("network"), "network"),
        (lambda c: first_chain(c).update(layers=12), r"few and of more layers; found \[12, 12\]"),
        (lambda c: c["shapes"][0]["points"][0]["chains"].pop(), r"two chains.*found \[4\]"),
        (lambda c: first_chain(c).update(input_shape=[2, 8, 8, 8]), "batch of 1"),
        (lambda c: first_chain(c).update(artifact="artifacts/x.onnx"), "not among its 'files'"),
        (lambda c: c["shapes"][0]["points"][0].update(in_width=0), "widths of 1 and more"),
        (lambda c: c["shapes"][0]["points"][0].update(out_width=16), "each pair once"),
        (lambda c: c["shapes"][0].update(points=[]), "without points"),
        (lambda c: c["files"].update({FIRST: "0" * 64}), r"3-8-4\.onnx: expected SHA-256 0000"),
        (lambda c: c["files"].pop(FIRST), "not among its 'files'"),
        (lambda c: c["files"].update({"artifacts/../../x": "0" * 64}), "unsafe path"),
        (lambda c: c["files"].update({"/etc/passwd": "0" * 64}), "unsafe path"),
        (lambda c: c["files"].update({"probe.json": "0" * 64}), "unsafe path"),
        (lambda c: c["files"].update({"artifacts/gone.bin": "0" * 64}), "gone.bin: cannot be read"),
    ],
)
def test_a_plan_that_cannot_be_one_is_refused(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(MeasurementError, match=message):
        read_plan(folder)


def test_a_folder_that_is_none_or_broken_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"expected a folder of graphs.*probe\.json"):
        read_plan(tmp_path)
    (folder / "probe.json").write_text("{")
    with pytest.raises(MeasurementError, match="not valid JSON"):
        read_plan(folder)


def test_nothing_that_is_not_listed_stands_beside_an_artifact(folder: Path) -> None:
    (folder / "artifacts/3-8-4").write_text("a companion without a suffix")
    with pytest.raises(MeasurementError, match=r"3-8-4: not listed in probe\.json"):
        read_plan(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    outside.write_text(FIRST)  # the same content, so that the hash is right
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(outside)
    with pytest.raises(MeasurementError, match="unsafe path"):
        read_plan(folder)


def layer_cost_us(in_width: int, out_width: int) -> float:
    """Blocks of 8."""
    return 2.0 * -(-in_width // 8) * -(-out_width // 8)


class Device:
    """Stands for all worker processes: answers windows, and counts."""

    def __init__(self) -> None:
        self.rounds: list[list[str]] = []
        self.time: Callable[[str, int], float] = lambda artifact, number: self.cost(artifact)
        """Microseconds of an artifact in a round."""
        self.joules = True
        self.target: Any = None
        self.stop_after: int | None = None

    @staticmethod
    def cost(artifact: str) -> float:
        in_width, out_width, layers = map(int, Path(artifact).stem.split("-"))
        return DISPATCH_US + layers * layer_cost_us(in_width, out_width)

    def client(self, name: str) -> Any:
        self.rounds.append([])
        return SimpleNamespace(name=name, ask=self.ask, close=lambda: None)

    def ask(self, command: str, limit_seconds: float, **arguments: Any) -> dict[str, Any]:
        if command == "open":
            self.opened = arguments
            return {}
        if self.stop_after is not None and sum(map(len, self.rounds)) >= self.stop_after:
            raise KeyboardInterrupt
        artifact, number = arguments["artifact"], len(self.rounds) - 1
        self.rounds[-1].append(artifact)
        latency = self.time(artifact, number)
        return {"latency_us": latency, "energy_uj": 10 * latency if self.joules else None}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    device = Device()
    target = SimpleNamespace(
        capabilities=CAPABILITIES,
        is_here=lambda: True,
        runtimes_here=lambda: ("onnxruntime",),
        how_to_install=lambda runtime: f"pip install {runtime}",
        probe=lambda: {"cpu": "a test", "versions": {"onnxruntime": "1"}},
    )
    device.target = target
    monkeypatch.setattr(cost_probe, "load_target", lambda name: target)
    monkeypatch.setattr(cost_probe, "Client", lambda name, module: device.client(name))
    monkeypatch.setattr(protocol, "real_meter", lambda name: ("rapl", 0.001))
    monkeypatch.setattr(protocol, "LOCK", tmp_path / "lock")
    return device


CHAINS = 2 * (37 + 2)
"""The block probe's 37 widths, and the grid's three points, of which one is among them."""


def test_costs_are_the_slopes_between_chains(folder: Path, device: Device, tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    table = measure(folder, output, threads=1, rounds=2)

    assert table == cost_table.read(output)
    assert not output.with_name("table.json.partial.json").exists()
    assert (table.target, table.runtime, table.threads) == ("x86", "onnxruntime", 1)
    assert table.meter == "rapl"
    assert table.machine["cpu"] == "a test"
    assert table.block_width == 8
    assert len(table.block_probe) == 37
    square, strided = table.costs
    assert (square.mirrored, strided.shape.stride) == (True, (2, 2))
    found = {(p.in_width, p.out_width): p for p in (*square.points, *strided.points)}
    for widths, each in found.items():
        assert each.latency_us == pytest.approx(layer_cost_us(*widths))
        assert each.latency_us_low == each.latency_us_high == each.latency_us
        assert each.energy_uj == pytest.approx(10 * layer_cost_us(*widths))
    assert device.opened["period_seconds"] == 0.001


def test_each_round_measures_each_chain_once_the_two_of_a_point_together(
    folder: Path, device: Device, tmp_path: Path
) -> None:
    measure(folder, tmp_path / "table.json", rounds=3, seed=5)
    assert [len(measured) for measured in device.rounds] == [CHAINS] * 3
    assert len({tuple(measured) for measured in device.rounds}) == 3
    few_first = set()
    for measured in device.rounds:
        assert len(set(measured)) == len(measured)
        for one, other in zip(measured[::2], measured[1::2], strict=True):
            assert one.rsplit("-", 1)[0] == other.rsplit("-", 1)[0]
            few_first.add(one.endswith("-4.onnx"))
    assert few_first == {True, False}


def test_without_a_meter_there_are_no_joules(folder: Path, device: Device, tmp_path: Path) -> None:
    device.joules = False
    table = measure(folder, tmp_path / "table.json", rounds=1)
    assert {p.energy_uj for costs in table.costs for p in costs.points} == {None}


def test_without_a_probe_the_targets_own_width_stands(
    device: Device, tmp_path: Path, folder: Path
) -> None:
    edit(folder, lambda content: content.update(block=None))
    table = measure(folder, tmp_path / "table.json", rounds=1)
    assert (table.block_width, table.block_probe) == (32, ())


def test_a_point_in_doubt_is_measured_in_more_rounds(
    folder: Path, device: Device, tmp_path: Path
) -> None:
    def disturbed(artifact: str, number: int) -> float:
        late = artifact == "artifacts/3-8-12.onnx" and number == 1
        return device.cost(artifact) * (0.5 if late else 1.0)

    device.time = disturbed
    table = measure(folder, tmp_path / "table.json", rounds=3)
    assert [set(measured) for measured in device.rounds[3:]] == [
        {"artifacts/3-8-4.onnx", "artifacts/3-8-12.onnx"}
    ] * 3
    each = table.costs[1].points[0]
    assert each.latency_us == pytest.approx(layer_cost_us(3, 8))
    assert each.latency_us_low == 0.0  # one round of six said less than nothing
    assert each.latency_us_high == pytest.approx(layer_cost_us(3, 8))


def test_a_cost_that_stays_in_doubt_is_never_zero(
    folder: Path, device: Device, tmp_path: Path
) -> None:
    def unclear(artifact: str, number: int) -> float:
        if not artifact.startswith("artifacts/3-8-"):
            return device.cost(artifact)
        few = artifact.endswith("-4.onnx")
        return 100.0 if few else 100.0 + (8.0 if number == 0 else -4.0)

    device.time = unclear
    each = measure(folder, tmp_path / "table.json", rounds=3).costs[1].points[0]
    assert (each.latency_us_low, each.latency_us, each.latency_us_high) == (0.0, 0.5, 1.0)


def test_what_costs_less_than_nothing_is_an_error_and_is_measured_again(
    folder: Path, device: Device, tmp_path: Path
) -> None:
    output = tmp_path / "table.json"

    def backwards(artifact: str, number: int) -> float:
        return 2 * DISPATCH_US if artifact == "artifacts/3-8-4.onnx" else device.cost(artifact)

    device.time = backwards
    with pytest.raises(MeasurementError, match=r"1 of 39 pairs.*3-8-12\.onnx.*same command again"):
        measure(folder, output, rounds=1)
    assert not output.exists()

    device.rounds.clear()
    device.time = lambda artifact, number: device.cost(artifact)
    table = measure(folder, output, rounds=1)
    assert [sorted(measured) for measured in device.rounds] == [
        ["artifacts/3-8-12.onnx", "artifacts/3-8-4.onnx"]
    ]
    assert table.costs[1].points[0].latency_us == pytest.approx(layer_cost_us(3, 8))


def test_an_interrupted_measurement_goes_on(
    folder: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.json"
    device.stop_after = 101  # in the second round, between two chains of a point
    with pytest.raises(KeyboardInterrupt):
        measure(folder, output, rounds=2)
    assert not output.exists()
    before = [
        artifact for measured in device.rounds for artifact in measured[: 2 * (len(measured) // 2)]
    ]

    device.rounds.clear()
    device.stop_after = None
    table = measure(folder, output, rounds=2)
    assert "going on after 50 measured pairs" in capsys.readouterr().err
    after = [artifact for measured in device.rounds for artifact in measured]
    assert sorted(before + after) == sorted(2 * [*{*before, *after}])
    assert len(table.block_probe) == 37
    assert not output.with_name("table.json.partial.json").exists()


@pytest.mark.parametrize("change", ["machine", "threads", "plan", "damage"])
def test_what_was_measured_elsewhere_is_not_gone_on_with(
    folder: Path,
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    output = tmp_path / "table.json"
    device.stop_after = 20
    with pytest.raises(KeyboardInterrupt):
        measure(folder, output, threads=1, rounds=1)
    device.rounds.clear()
    device.stop_after = None
    threads = 1
    if change == "machine":
        monkeypatch.setattr(cost_table, "describe_machine", lambda target: {"cpu": "another"})
    elif change == "threads":
        monkeypatch.setattr(cost_probe, "session_threads", lambda threads: 7)
    elif change == "plan":
        edit(folder, lambda content: content.update(network="another"))
    else:
        output.with_name("table.json.partial.json").write_text("{")
    measure(folder, output, threads=threads, rounds=1)
    assert "beginning anew" in capsys.readouterr().err
    assert len(device.rounds[0]) == CHAINS


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"is_here": lambda: False}, MeasurementError, "which this machine is not"),
        (
            {"runtimes_here": lambda: ("openvino",)},
            TargetError,
            "installed here are openvino; pip install onnxruntime",
        ),
        (
            {"capabilities": replace(CAPABILITIES, meters=("simulated",))},
            MeasurementError,
            "is simulated",
        ),
    ],
)
def test_a_machine_that_is_not_the_device_is_refused(
    folder: Path, device: Device, tmp_path: Path, changed: Any, error: Any, message: str
) -> None:
    vars(device.target).update(changed)
    with pytest.raises(error, match=message):
        measure(folder, tmp_path / "table.json")


def test_arguments_that_cannot_be_are_refused(folder: Path, device: Device, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="rounds = 0"):
        measure(folder, tmp_path / "table.json", rounds=0)
    with pytest.raises(MeasurementError, match="is a folder"):
        measure(folder, tmp_path)
    with pytest.raises(MeasurementError, match="meter 'voltmeter'"):
        REAL_METER("voltmeter")


REAL_METER = protocol.real_meter
"""As it is before a test changes it."""


def test_an_estimate_is_no_meter() -> None:
    assert REAL_METER("estimate") == ("none", 0.0)
    assert REAL_METER("none") == ("none", 0.0)


class Chains:
    """A target whose runners remember how many are open."""

    def __init__(self) -> None:
        self.open_now = self.most = 0
        self.shapes: set[tuple[int, ...]] = set()

    def open(self, artifact: Path, runtime: str, threads: int) -> Any:
        self.open_now += 1
        self.most = max(self.most, self.open_now)

        def run(inputs: Any) -> dict[str, Any]:
            assert inputs.dtype == np.float32
            assert np.isfinite(inputs).all()
            self.shapes.add(inputs.shape)
            if artifact.name == "broken":
                raise MeasurementError("it broke")
            return {}

        def close() -> None:
            self.open_now -= 1

        return SimpleNamespace(run=run, close=close)


class FakeMeter:
    """40 joules a window, unless it fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    @contextmanager
    def measure(self) -> Any:
        window = SimpleNamespace(energy=None)
        yield window
        if self.fails:
            raise MeasurementError("the counter stood still")
        window.energy = SimpleNamespace(value=40.0)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Chains:
    chains = Chains()
    monkeypatch.setattr(cost_worker, "load_target", lambda name: chains)
    monkeypatch.setattr(cost_worker, "open_meter", lambda name: FakeMeter(fails=name == "broken"))
    monkeypatch.setattr(cost_worker, "WINDOW_SECONDS", 0.001)
    monkeypatch.setattr(cost_worker, "WARM_UP_SECONDS", 0.001)
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # other tests may have loaded it
    return chains


def serve(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    lines = io.StringIO("".join(json.dumps(each) + "\n" for each in requests))
    serving.answer(lines, answers, cost_worker.handler())
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def opening(meter: str = "rapl") -> dict[str, Any]:
    return {
        "command": "open",
        "folder": "x",
        "target": "x86",
        "runtime": "onnxruntime",
        "threads": 1,
        "meter": meter,
        "period_seconds": 0.0,
    }


def window(artifact: str) -> dict[str, Any]:
    return {"command": "window", "artifact": artifact, "input_shape": [1, 3, 4, 4]}


def test_a_worker_has_one_chain_open_at_a_time(chains: Chains) -> None:
    opened, first, broken, second = serve(opening(), window("a"), window("broken"), window("b"))
    assert opened == {"answer": {}}
    assert broken == {"error": "it broke", "kind": "MeasurementError"}
    assert (chains.most, chains.open_now) == (1, 0)
    assert chains.shapes == {(1, 3, 4, 4)}
    for reply in (first, second):
        assert reply["answer"]["latency_us"] > 0
        assert 0 < reply["answer"]["energy_uj"] <= 40e6 / cost_worker.WINDOW_INFERENCES


def test_a_meter_that_fails_leaves_a_gap_and_not_a_zero(chains: Chains) -> None:
    _, reply = serve(opening("broken"), window("a"))
    assert reply["answer"]["energy_uj"] is None
    assert reply["answer"]["latency_us"] > 0


def test_a_worker_refuses_what_is_out_of_turn(chains: Chains) -> None:
    (reply,) = serve(window("a"))
    assert "expected 'open'" in reply["error"]
