"""Which artifacts are built, which layers int8 keeps in float, which runtime wins the race."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compiling is the host's")
pytest.importorskip("onnx", reason="compiling is the host's")

import onnx
import torch

from greenprune import compilation
from greenprune.errors import TargetError
from greenprune.harness.race import Race, Racer
from greenprune.harness.statistics import Interval
from greenprune.onnx_export import export_onnx
from greenprune.recipe import CompileSettings, Recipe
from greenprune.registry import Build, load_target


def job_for(tmp_path: Path, **settings: Any) -> Any:
    recipe = Recipe(compile=CompileSettings(**settings))
    np.save(tmp_path / "calibration_inputs.npy", np.zeros((4, 1, 2, 2), np.float32))
    return SimpleNamespace(
        recipe=recipe, place=lambda stage: tmp_path, results=lambda stage: {"int8": {}}
    )


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"runtimes": ("onnxruntime",)}, ["onnxruntime"]),
        (
            {"runtimes": ("openvino", "onnxruntime"), "precision": "int8"},
            ["openvino", "onnxruntime", "openvino-int8", "onnxruntime-int8"],
        ),
    ],
)
def test_every_precision_up_to_the_one_asked_for(
    tmp_path: Path, settings: Any, names: list[str]
) -> None:
    assert compilation.runtimes(job_for(tmp_path, **settings)) == names


def test_what_a_target_does_not_offer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'x86' has no precision 'fp16'.*fp32, int8"):
        compilation.runtimes(job_for(tmp_path, precision="fp16"))
    with pytest.raises(TargetError, match="no runtime 'tvm'; expected some of onnxruntime"):
        compilation.runtimes(job_for(tmp_path, runtimes=("tvm",)))


def test_a_missing_runtime_is_told_with_a_command_that_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("greenprune_targets.base.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"installed here.*: pip install onnxruntime$"):
        compilation.runtimes(job_for(tmp_path, target="arm"))


def drawn(targets: Any) -> Any:
    """The first pixels of the images that are drawn: image i is filled with i."""
    inputs = torch.arange(60.0)[:, None, None, None].expand(60, 1, 2, 2).clone()
    job: Any = SimpleNamespace(
        recipe=Recipe(compile=CompileSettings(calibration_images=20)),
        data=SimpleNamespace(
            train=SimpleNamespace(inputs=inputs, targets=targets), preprocessing=None
        ),
    )
    return compilation.calibration_images(job)[:, 0, 0, 0].astype(int)


def test_calibration_images_have_each_class_as_often() -> None:
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 8)
    assert sorted(np.bincount(labels.numpy()[drawn(labels)])) == [6, 7, 7]


@pytest.mark.parametrize("shape", [(60, 2), (60, 4, 4), (60,)])
def test_calibration_images_without_classes_are_drawn_at_random(shape: tuple[int, ...]) -> None:
    found = drawn(torch.zeros(shape))
    assert len(set(found)) == 20
    assert found.max() >= 20, "not the first ones"
    assert list(found) == list(drawn(torch.zeros(shape)))


class Quantiser:
    """A target whose int8 loses 3 points, one less with each of the layers kept in float."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, ...]] = []

    def compile(self, graph: Path, build: Any, folder: Path, name: str) -> Path:
        assert build.calibration.shape == (4, 1, 2, 2)
        self.kept.append(build.keep_float)
        return folder / name

    def layer_precisions(self, artifact: Path, runtime: str) -> dict[str, str]:
        return {"c": "int8"}

    def accuracy(self, runtime: str) -> float:
        if runtime == "onnxruntime":
            return 0.9
        bad = {"a", "b", "c"} - set(self.kept[-1])
        return 0.9 - 0.01 * len(bad)


def quantise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, limit: float
) -> tuple[Quantiser, Any]:
    target = Quantiser()
    monkeypatch.setattr(
        compilation,
        "_development_accuracy",
        lambda job, target, artifact, runtime: target.accuracy(runtime),
    )
    monkeypatch.setattr(compilation.graphs, "feeding_only", lambda graph, output: ["head"])
    monkeypatch.setattr(
        compilation.inspection, "sensitivity", lambda graph, images: [("a", 1.0), ("b", 2.0)]
    )
    _, report = compilation._compile_int8(
        job_for(tmp_path, int8_max_loss=limit),
        target,
        tmp_path / f"{name}.onnx",
        "onnxruntime",
        tmp_path / "out",
        tmp_path / "plain.onnx",
    )
    return target, report


def test_the_layers_that_int8_damages_go_back_to_float(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, report = quantise(monkeypatch, tmp_path, "mild", 0.015)
    assert target.kept == [(), ("a",), ("a", "b")]
    assert report.kept_float == ("a", "b")
    assert report.accuracy == pytest.approx(0.89)
    assert report.layers == {"c": "int8"}
    target, report = quantise(monkeypatch, tmp_path, "aggressive", 0.05)
    assert target.kept == [("head",)], "the score is kept in float, and no layer needs to be"
    assert report.kept_float == ()


def test_int8_that_costs_too_much_whatever_stays_in_float_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=r"89\.00% .*int8_max_loss = 0\.005"):
        quantise(monkeypatch, tmp_path, "mild", 0.005)


def noise(name: str) -> list[float]:
    """Of the blocks: int8 has another than fp32."""
    return [1.0, 1.01, 0.99, 1.02, 0.98, 1.03, 0.97] if "int8" in name else [1.0] * 7


def run_race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **together_ms: float) -> Any:
    fastest = min(together_ms.values())

    def at(value: float) -> Interval:
        return Interval(value=value, low=value, high=value, confidence=0.95)

    def race(target: str, artifacts: Any, inputs: Path, **more: Any) -> Race:
        named = {name.replace("_", "-"): value for name, value in together_ms.items()}
        assert set(artifacts) == set(named)
        assert {variant for networks in artifacts.values() for variant in networks} == {
            "mild",
            "aggressive",
        }
        return Race(
            threads=1,
            racers=tuple(
                Racer(
                    runtime=name,
                    blocks_ms={"both": tuple(value * factor for factor in noise(name))},
                    latency_ms={},
                    energy_mj={},
                    together_ms=at(value),
                    over_fastest=at(value / fastest),
                )
                for name, value in sorted(named.items(), key=lambda each: each[1])
            ),
        )

    monkeypatch.setattr(compilation, "race", race)
    runtimes = tuple(dict.fromkeys(name.split("_")[0] for name in together_ms))
    precision = "int8" if any("int8" in name for name in together_ms) else "fp32"
    job = job_for(tmp_path, runtimes=runtimes, precision=precision)
    built = {name.replace("_", "-"): "file" for name in together_ms}
    networks = dict.fromkeys(("mild", "aggressive"), built)
    job.results = lambda stage: {"artifacts": networks, "int8": {}}
    return compilation.choose_runtime(SimpleNamespace(job=job))


def test_the_fastest_wins_and_int8_that_is_slower_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_race(
        monkeypatch, tmp_path, onnxruntime=2.0, openvino=3.0, onnxruntime_int8=2.4, openvino_int8=1
    )
    assert found["runtime"] == "openvino-int8"
    assert list(found["left_out"]) == ["onnxruntime-int8"]
    told = found["left_out"]["onnxruntime-int8"]
    assert "1.20 [1.16, 1.24] times as long as fp32 on onnxruntime" in told
    assert found["race"]["racers"][0]["runtime"] == "openvino-int8"
    found = run_race(monkeypatch, tmp_path, onnxruntime=2.0, onnxruntime_int8=2.0)
    assert found["runtime"] == "onnxruntime", "no faster is not faster"
    found = run_race(monkeypatch, tmp_path, onnxruntime=2.0, onnxruntime_int8=1.97)
    assert found["runtime"] == "onnxruntime", "nor is what may be noise"
    assert "not shown to be faster: it takes 0.98 [" in found["left_out"]["onnxruntime-int8"]


def test_one_runtime_is_not_raced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "race", None)
    job = job_for(tmp_path, runtimes=("openvino",))
    found = compilation.choose_runtime(SimpleNamespace(job=job))
    assert (found["runtime"], found["race"]) == ("openvino", None)


def test_a_device_that_is_elsewhere_is_not_raced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    job = job_for(tmp_path, runtimes=("openvino", "onnxruntime"), precision="int8")
    assert compilation.choose_runtime(SimpleNamespace(job=job))["runtime"] == "openvino-int8"


class Residual(torch.nn.Module):
    """Its shortcut is rounded even where both of its layers stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.second = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Any) -> Any:
        read = torch.relu(self.first(images))
        return torch.relu(read + self.second(read)).mean((2, 3))


@pytest.mark.parametrize(("kept", "runtime"), [(True, "tensorrt-fp16"), (False, "tensorrt-int8")])
def test_int8_with_every_layer_in_float_is_not_called_int8(
    tmp_path: Path, kept: bool, runtime: str
) -> None:
    graph = tmp_path / "toy.onnx"
    export_onnx(Residual(), torch.randn(2, 3, 8, 8), graph, ["logits"])
    layers = [node.name for node in onnx.load(graph).graph.node if node.op_type == "Conv"]
    target = load_target("jetson-orin-nano")
    images = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    build = Build(
        runtime="tensorrt",
        precision="int8",
        calibration=images,
        keep_float=tuple(layers) if kept else (),
    )
    made = target.compile(graph, build, tmp_path / "int8", "toy")
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(made).graph.node}
    report = {"layers": target.layer_precisions(made, "tensorrt-int8")}
    job = job_for(tmp_path, target=target.name, precision="int8")
    networks = dict.fromkeys(("dense", "mild", "aggressive"), report)
    job.results = lambda stage: {"int8": {"tensorrt-int8": networks}}

    found = compilation.choose_runtime(SimpleNamespace(job=job))

    assert found["runtime"] == runtime
    assert list(found["left_out"]) == (["tensorrt-int8"] if kept else [])
    assert ("int8 is in no layer" in found.get("headline", "")) == kept
