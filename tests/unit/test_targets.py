"""Targets: found by name, honest about what they cannot do, artifacts held to their networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from greenprune import cores, registry
from greenprune.bundle import open_bundle
from greenprune.errors import (
    ExportError,
    MissingPackageError,
    TargetError,
)
from greenprune.registry import Build
from greenprune.runtime.runners import verify_artifact
from greenprune_targets.arm import Arm
from greenprune_targets.base import BaseTarget, processor


@pytest.mark.parametrize("name", sorted(registry.TARGETS))
def test_capabilities_are_readable_everywhere(name: str) -> None:
    target = registry.load_target(name)
    assert target.name == name
    assert target.description
    found = target.capabilities
    assert found.status.startswith("ready")
    assert found.precisions[0] == "fp32"
    assert set(target.runtimes_here()) <= set(found.runtimes)
    probed = target.probe()
    assert set(probed["versions"]) == set(found.runtimes)
    for runtime in target.runtimes_here():
        assert probed["versions"][runtime]


def test_reading_capabilities_loads_no_runtime() -> None:
    code = (
        "import sys\n"
        "from greenprune.registry import TARGETS, load_target\n"
        "for name in TARGETS: target = load_target(name); target.probe(); target.runtimes_here()\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'tensorrt'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_jetson_alone_is_the_smallest_board() -> None:
    assert registry.load_target("jetson").name == "jetson-orin-nano"


def test_an_unknown_target_names_the_known_and_the_near() -> None:
    with pytest.raises(TargetError, match=r"'jetsn' \(did you mean 'jetson'\?\).*arm, cuda"):
        registry.load_target("jetsn")


class Toaster(Arm):
    name = "toaster"


class Abstract(BaseTarget):
    name = "abstract"


class Bare:
    name = "bare"
    description = "a class that is no target"
    capabilities = Arm.capabilities


class Untold(Arm):
    name = "untold"
    capabilities: ClassVar[Any] = {"precisions": ["fp32"]}


@pytest.fixture
def other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points as other packages would bring them; this module stands in for theirs."""
    monkeypatch.setitem(sys.modules, "toasters", sys.modules[__name__])
    places = {
        "toaster": "toasters:Toaster",
        "misnamed": "toasters:Toaster",
        "abstract": "toasters:Abstract",
        "bare": "toasters:Bare",
        "untold": "toasters:Untold",
        "gone": "toasters:Gone",
        "broken": "no_such_package:Target",
        "x86": "toasters:Toaster",
    }
    entries = [metadata.EntryPoint(*place, registry.ENTRY_POINTS) for place in places.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)


@pytest.mark.usefixtures("other_packages")
def test_other_packages_bring_targets_but_no_built_in_names() -> None:
    assert set(registry.available_targets()) - set(registry.TARGETS) == {
        *("toaster", "misnamed", "abstract", "bare", "untold", "gone", "broken")
    }
    assert registry.load_target("toaster").description == "64-bit Arm CPU, by ONNX Runtime"
    assert registry.load_target("x86").name == "x86"


@pytest.mark.usefixtures("other_packages")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "no_such_package:Target cannot be loaded: No module named"),
        ("gone", "toasters:Gone cannot be loaded: .*no attribute 'Gone'"),
        ("abstract", "toasters:Abstract cannot be loaded: .*compile.*open"),
        ("bare", "toasters:Bare lacks runtimes_here, is_here, compile, open, .*docs/targets.md"),
        ("misnamed", "expected the name 'misnamed', .*; found 'toaster'"),
        ("untold", "registry.Capabilities; found 'untold' and dict"),
    ],
)
def test_another_packages_broken_target_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(TargetError, match=f"target '{name}': .*{message}"):
        registry.load_target(name)


THREADS = """
import json, os, sys
from pathlib import Path
os.sched_setaffinity(0, json.loads(sys.argv[3]))
import numpy as np, onnxruntime  # whose import starts a thread of its own
from greenprune.cores import session_threads
from greenprune.registry import load_target
artifact, runtime = Path(sys.argv[1]), sys.argv[2]
def mask_of_each_thread():
    return {name: os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task")}
before = mask_of_each_thread()
runner = load_target("x86").open(artifact, runtime, int(sys.argv[4]))
for batch in (1, 2):
    runner.run(np.zeros((batch, 1, 16, 16), np.float32))
masks = mask_of_each_thread()
if runtime == "onnxruntime":
    used = 1 + len(set(masks) - set(before))  # the caller works too
else:
    models = runner._one, runner._any
    one, used = (model.get_property("INFERENCE_NUM_THREADS") for model in models)
    assert one == used
outside = [name for name, mask in masks.items() if not mask <= os.sched_getaffinity(0)]
print(json.dumps([used, session_threads(int(sys.argv[4])), outside]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity masks")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("asked", [0, 1, 64])
def test_sessions_stay_within_the_affinity_mask(
    runtime: str, asked: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    graph = tiny_bundle / "graphs/mild.onnx"
    artifact = registry.load_target("x86").compile(graph, Build(runtime=runtime), tmp_path, "net")
    for mask in ([min(os.sched_getaffinity(0))], sorted(os.sched_getaffinity(0))):
        line = [sys.executable, "-c", THREADS, artifact, runtime, json.dumps(mask), asked]
        done = subprocess.run(
            [str(part) for part in line],
            env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        used, expected, outside = json.loads(done.stdout)
        assert used == expected
        assert outside == [], "a thread may run where this process must not"


def machine(root: Path, siblings: dict[int, str], quotas: dict[str, str]) -> Path:
    """``proc`` and ``sys`` of a machine: which processors share a core, its groups' ``cpu.max``."""
    for number, shared in siblings.items():
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{shared}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/app/worker\n")
    for group, quota in quotas.items():
        (root / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / group / "cpu.max").write_text(f"{quota}\n")
    return root


@pytest.mark.parametrize(
    ("mask", "siblings", "quotas", "expected"),
    [
        ({0, 1, 2, 3}, {}, {}, 4),
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {}, 2),
        ({1, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {}, 1),
        ({0, 1, 2, 3}, {}, {"app/worker": "max 100000"}, 4),
        ({0, 1, 2, 3}, {}, {"app/worker": "150000 100000"}, 2),
        ({0, 1, 2, 3}, {}, {"app": "100000 100000", "app/worker": "max 100000"}, 1),
        ({0, 1, 2, 3}, {}, {"app/worker": "10000 100000"}, 1),
        ({0, 1}, {}, {"app/worker": "800000 100000"}, 2),
    ],
)
def test_usable_cores(
    mask: set[int],
    siblings: dict[int, str],
    quotas: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: mask, raising=False)
    assert cores.usable_cores(machine(tmp_path, siblings, quotas)) == expected
    assert cores.session_threads(99) == len(mask)
    assert cores.session_threads(1) == 1


@pytest.mark.parametrize(("name", "runtime"), [("x86", "openvino"), ("arm", "onnxruntime")])
def test_compile_and_open_again(name: str, runtime: str, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    target, opened = registry.load_target(name), open_bundle(tiny_bundle)
    graph, build = opened.file("graphs/aggressive.onnx"), Build(runtime=runtime)
    made = target.compile(graph, build, tmp_path / "out", "net")
    assert made.parent == tmp_path / "out"
    assert made.stem == "net"
    runner = target.open(made, runtime, 1)
    assert runner.input_name == "input"
    assert set(runner.output_names) == {"logits", "score"}
    inputs = opened.read_array("samples/replay_inputs.npy")
    whole = runner.run(inputs)
    assert whole["logits"].shape == (64, 4)
    assert whole["score"].shape == (64,)
    kept = whole["logits"].copy()
    one = runner.run(inputs[:1])
    np.testing.assert_allclose(one["logits"], whole["logits"][:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole["logits"], kept)  # answers are the caller's own
    runner.close()


def test_openvino_is_imported_without_its_telemetry(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from greenprune.registry import Build, load_target\n"
        f"graph = Path({str(tiny_bundle / 'graphs/mild.onnx')!r})\n"
        "target = load_target('x86')\n"
        "made = target.compile(graph, Build(runtime='openvino'), graph.parent, 'm')\n"
        "target.open(made, 'openvino', 1)\n"
        "sys.exit('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_that_is_no_network_is_refused_by_name(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    target = registry.load_target("x86")
    broken = tmp_path / ("broken.onnx" if runtime == "onnxruntime" else "broken.xml")
    broken.write_bytes(b"this is not a network")
    with pytest.raises(TargetError, match=f"{broken.name}: expected a network that {runtime}"):
        target.open(broken, runtime, 1)
    with pytest.raises(TargetError, match=r"no runtime 'tensorrt'.*onnxruntime, openvino"):
        target.open(broken, "tensorrt", 1)
    with pytest.raises(TargetError, match="no runtime 'tensorrt'"):
        target.compile(broken, Build(runtime="tensorrt"), tmp_path, "a")


def write_odd_graph(path: Path, operator: str, **attributes: Any) -> Path:
    """A graph whose second node, ``odd``, no runtime accepts."""
    onnx = pytest.importorskip("onnx")
    nodes = [
        onnx.helper.make_node("Relu", ["input"], ["active"], name="first"),
        onnx.helper.make_node(operator, ["active"], ["logits"], name="odd", **attributes),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("input", [1, 4, 8, 8]), ("logits", None))
    ]
    graph = onnx.helper.make_graph(nodes, "odd", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("runtime", "operator", "attributes", "told"),
    [
        ("onnxruntime", "NoSuch", {}, r'"odd", NoSuch'),
        ("openvino", "NoSuch", {}, "operations: NoSuch"),  # it tells no node here
        (
            "openvino",
            "DepthToSpace",
            {"blocksize": 2, "mode": "odd"},
            r"<Node\(DepthToSpace\): logits>.*only 'DCR' and 'CRD' modes",
        ),
    ],
)
def test_an_unsupported_operator_is_refused_and_named(
    runtime: str, operator: str, attributes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    graph = write_odd_graph(tmp_path / "odd.onnx", operator, **attributes)
    target = registry.load_target("x86")
    with pytest.raises(TargetError, match=f"it refuses: .*{told}"):
        target.open(target.compile(graph, Build(runtime=runtime), tmp_path, "net"), runtime, 1)


@pytest.mark.parametrize("images", [None, np.zeros((0, 1, 16, 16), np.float32)])
@pytest.mark.parametrize(
    ("name", "runtime"),
    [("x86", "onnxruntime"), ("x86", "openvino"), ("cuda", "tensorrt"), ("jetson", "tensorrt")],
)
def test_int8_without_images_to_calibrate_with_is_refused(
    name: str, runtime: str, images: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    build = Build(runtime=runtime, precision="int8", calibration=images)
    graph = tiny_bundle / "graphs/mild.onnx"
    with pytest.raises(TargetError, match=r"int8 needs images.*set compile\.calibration_images"):
        registry.load_target(name).compile(graph, build, tmp_path / "out", "net")
    assert not (tmp_path / "out").exists()


def test_a_missing_runtime_names_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from greenprune_targets import x86

    monkeypatch.setitem(sys.modules, "openvino", None)
    for function in (x86._openvino, x86._core):
        function.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'greenprune\[x86\]'"):
        registry.load_target("x86").open(tmp_path / "a.xml", "openvino", 0)


def test_processor_reads_what_the_system_tells(tmp_path: Path) -> None:
    assert processor(tmp_path)["cpu"] is None
    (tmp_path / "proc").mkdir()
    info = tmp_path / "proc/cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx fma\n\n" * 2)
    found = processor(tmp_path)
    assert (found["cpu"], found["isa"]) == ("Some CPU", ["avx", "avx2", "fma"])
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\nHardware\t: Board\n")
    found = processor(tmp_path)
    assert (found["cpu"], found["isa"]) == ("Board", ["asimd", "asimddp"])


class Fixed:
    """A target whose network answers what the test says."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name: np.asarray(value, np.float32) for name, value in answers.items()}
        self.input_name, self.output_names = "input", tuple(self.answers)
        self.closed = False

    def open_on_host(self, artifact: Path, runtime: str, threads: int) -> Fixed:
        return self

    def run(self, inputs: Any) -> dict[str, Any]:
        return {name: answer[: len(inputs)] for name, answer in self.answers.items()}

    def close(self) -> None:
        self.closed = True


LOGITS = np.array([[1.0, 2.0], [10.0, -3.0], [5.0, 5.0005]], dtype=np.float32)
INPUTS = np.zeros((3, 1, 2, 2), dtype=np.float32)


def check(target: Any, **references: Any) -> Any:
    return verify_artifact(target, Path("net.onnx"), "fake", INPUTS, references)


def test_parity_passes_what_agrees_and_says_how_well() -> None:
    target = Fixed(logits=LOGITS + np.float32([[0.002, 0.0]]), score=[0.1, 0.2, 0.3])
    found = check(target, logits=LOGITS, score=np.float32([0.1, 0.2, 0.3]))
    assert found.largest_difference == pytest.approx(2e-4, rel=1e-2)
    assert found.agreement == 1.0  # the third sample changed its class, within a tie
    assert target.closed


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (LOGITS + np.float32([[0.02, 0.0]]), r"differ .* by 2\.00e-03 .*at most 1e-03"),
        (LOGITS[:, ::-1], "same class for 33.3%"),
        (LOGITS[:, :1], r"expected finite values of shape \[3, 2\], found shape \[3, 1\]"),
        (np.where(LOGITS == 10, np.nan, LOGITS), "1 of them not finite"),
    ],
)
def test_parity_refuses_and_says_by_how_much(answer: Any, message: str) -> None:
    target = Fixed(logits=answer)
    with pytest.raises(ExportError, match=message):
        check(target, logits=LOGITS)
    assert target.closed


def test_parity_refuses_a_missing_output() -> None:
    with pytest.raises(ExportError, match="expected the outputs logits, score, found logits"):
        check(Fixed(logits=LOGITS), logits=LOGITS, score=LOGITS[:, 0])


def test_parity_of_narrower_precisions_is_wider_yet_finds_what_is_broken() -> None:
    near = Fixed(logits=LOGITS + np.float32([[0.05, 0.0]]))
    for runtime in ("fake-fp16", "fake-int8"):
        verify_artifact(near, Path("a"), runtime, INPUTS, {"logits": LOGITS})
        with pytest.raises(ExportError, match=f"on {runtime}: its answers"):
            verify_artifact(Fixed(logits=-LOGITS), Path("a"), runtime, INPUTS, {"logits": LOGITS})


def test_a_batch_that_changes_the_answers_is_refused() -> None:
    class Mixing(Fixed):
        def run(self, inputs: Any) -> dict[str, Any]:
            return {"logits": LOGITS if len(inputs) == 3 else LOGITS[1:2]}

    with pytest.raises(ExportError, match="answers to 1 samples differ"):
        check(Mixing(logits=LOGITS), logits=LOGITS)
