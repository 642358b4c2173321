"""ONNX graphs that answer as their networks do, and refusals of those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from greenprune import __version__, onnx_export
from greenprune.bundle import Preprocessing
from greenprune.errors import ExportError
from greenprune.models import lenet5
from greenprune.onnx_export import Description, check, export_onnx
from greenprune.registry import Build, load_target
from greenprune.runtime.preprocessing import preprocess
from greenprune_calibration import half, quantise

DESCRIPTION = Description(
    variant="mild",
    class_names=(*"abcdefghi", 'ä, "quoted"'),
    preprocessing=Preprocessing(channels=1, size=(32, 32), mean=(0.1,), std=(0.25,)),
)


class Exported:
    """LeNet-5 and its graph, made once."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.network = lenet5().train()
        self.example = torch.randn(4, 1, 32, 32)
        self.path = folder / "lenet5.onnx"
        self.answers = export_onnx(self.network, self.example, self.path, ["logits"], DESCRIPTION)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("onnx"))


def run(path: Path, images: Tensor) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"input": images.numpy()}))


def tampered(exported: Exported, path: Path, value: float) -> Path:
    """The same graph with one number of the last bias set to ``value``."""
    model = onnx.load(exported.path)
    bias = next(each for each in model.graph.initializer if list(each.dims) == [10])
    numbers = numpy_helper.to_array(bias).copy()
    numbers[3] = value
    bias.CopyFrom(numpy_helper.from_array(numbers, bias.name))
    onnx.save(model, path)
    return path


def test_the_answers_are_the_networks_own(exported: Exported) -> None:
    with torch.no_grad():
        expected = exported.network.eval()(exported.example).numpy()

    assert list(exported.answers) == ["logits"]
    assert exported.answers["logits"].dtype == np.float32
    np.testing.assert_array_equal(exported.answers["logits"], expected)
    (found,) = run(exported.path, exported.example)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_the_batch_is_free(exported: Exported, count: int) -> None:
    images = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(count))

    (found,) = run(exported.path, images)

    with torch.no_grad():
        np.testing.assert_allclose(found, exported.network(images).numpy(), atol=1e-5)


def test_the_opset_is_the_one_that_is_wanted_or_none(exported: Exported, tmp_path: Path) -> None:
    example, path = torch.zeros(2, 1, 32, 32), tmp_path / "other.onnx"
    onnx_export.export_onnx(exported.network, example, path, ["logits"], opset=17)
    model = onnx.load(path)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 17
    assert {entry.key: entry.value for entry in model.metadata_props}["greenprune.opset"] == "17"
    with pytest.raises(ExportError, match="in opset 18, not in 9, which the target wants"):
        onnx_export.export_onnx(exported.network, example, path, ["logits"], opset=9)


def test_the_graph_is_one_file_with_one_input_and_the_opset_of_the_bundle(
    exported: Exported,
) -> None:
    model = onnx.load(exported.path, load_external_data=False)

    (given,) = model.graph.input
    batch, *rest = given.type.tensor_type.shape.dim
    assert given.name == "input"
    assert batch.dim_param
    assert [dim.dim_value for dim in rest] == [1, 32, 32]
    assert [output.name for output in model.graph.output] == ["logits"]
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == onnx_export.OPSET
    assert not any(entry.external_data for entry in model.graph.initializer)
    assert [path.name for path in exported.path.parent.iterdir()] == ["lenet5.onnx"]


def metadata(path: Path) -> dict[str, str]:
    """What the file says of itself, as ONNX Runtime and as onnx read it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: dict[str, str] = session.get_modelmeta().custom_metadata_map
    model = onnx.load(path, load_external_data=False)
    assert {entry.key: entry.value for entry in model.metadata_props} == found
    return {key: value for key, value in found.items() if key.startswith(onnx_export.PREFIX)}


def test_the_graph_says_what_it_is_and_how_images_are_prepared(exported: Exported) -> None:
    found = metadata(exported.path)

    said = {key.removeprefix("greenprune."): value for key, value in found.items()}
    assert (said["version"], said["variant"]) == (__version__, "mild")
    assert said["opset"] == str(onnx_export.OPSET)
    assert json.loads(said["class_names"]) == list(DESCRIPTION.class_names)
    prepared = json.loads(said["preprocessing"])
    assert (prepared["channels"], prepared["size"], prepared["range"]) == (1, [32, 32], [0, 255])
    assert (prepared["mean"], prepared["std"]) == ([0.1], [0.25])
    (given,), (answered,) = json.loads(said["inputs"]).items(), json.loads(said["outputs"]).items()
    assert (given[0], given[1]["shape"]) == ("input", ["batch", 1, 32, 32])
    assert (answered[0], answered[1]["shape"]) == ("logits", ["batch", 10])
    assert given[1]["meaning"]
    assert answered[1]["meaning"]


def test_the_formula_of_the_metadata_is_the_one_that_sessions_apply(exported: Exported) -> None:
    prepared = json.loads(metadata(exported.path)["greenprune.preprocessing"])
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    names = {"image": image.astype(np.float32)} | {
        key: np.float32(prepared[key]) for key in ("mean", "std")
    }
    by_formula = eval(prepared["formula"], {"__builtins__": {}}, names)
    assert DESCRIPTION.preprocessing is not None
    expected = preprocess(image, DESCRIPTION.preprocessing)
    np.testing.assert_allclose(by_formula.transpose(2, 0, 1)[None], expected, atol=1e-6)


def test_data_that_came_prepared_say_so(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    plain = Description(variant="dense", class_names=("a", "b"), preprocessing=None)
    export_onnx(network, torch.randn(2, 1, 2, 2), tmp_path / "a.onnx", ["out"], plain)
    export_onnx(network, torch.randn(2, 1, 2, 2), tmp_path / "b.onnx", ["out"])

    found, bare = metadata(tmp_path / "a.onnx"), metadata(tmp_path / "b.onnx")

    assert found["greenprune.preprocessing"] == "null"
    assert set(found) - set(bare) == {
        f"greenprune.{key}" for key in ("variant", "class_names", "preprocessing")
    }
    assert json.loads(bare["greenprune.outputs"]) == {
        "out": {"shape": ["batch", 2], "dtype": "float32"}
    }


@pytest.mark.parametrize("step", ["fp32", "int8", "tensorrt_fp16", "tensorrt_int8"])
def test_what_is_made_of_the_graph_keeps_its_metadata_free_batch_opset_and_single_file(
    exported: Exported, tmp_path: Path, step: str
) -> None:
    images, made = torch.randn(8, 1, 32, 32).numpy(), tmp_path / "made.onnx"
    if step == "tensorrt_fp16":
        half.tensorrt_fp16(exported.path, made)
    elif step == "tensorrt_int8":
        quantise.tensorrt_int8(exported.path, images, made)
    else:
        build = Build(runtime="onnxruntime", precision=step, calibration=images)
        made = load_target("x86").compile(exported.path, build, tmp_path / "out", "made")

    assert metadata(made) == metadata(exported.path)
    model = onnx.load(made, load_external_data=False)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions[""] == onnx_export.OPSET
    assert not any(entry.external_data for entry in model.graph.initializer)


def test_the_graph_tells_nothing_of_its_makers_disk(exported: Exported) -> None:
    content = exported.path.read_bytes()

    for place in (Path(torch.__file__).parent, Path(onnx_export.__file__).parent):
        assert str(place).encode() not in content


def test_export_is_quiet(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    export_onnx(network, torch.randn(2, 1, 2, 2), tmp_path / "small.onnx", ["logits"])

    assert capfd.readouterr().out == "", "stdout belongs to --json"


def test_two_outputs_keep_their_names_and_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.layer(torch.flatten(x, 1))
            return logits, torch.softmax(logits, dim=1).amax(dim=1)

    network, example = Two(), torch.randn(3, 3, 2, 2)

    answers = export_onnx(network, example, tmp_path / "two.onnx", ["logits", "score"])

    assert [value.shape for value in answers.values()] == [(3, 5), (3,)]
    logits, score = run(tmp_path / "two.onnx", example[:1])
    np.testing.assert_allclose(logits, answers["logits"][:1], atol=1e-6)
    np.testing.assert_allclose(score, answers["score"][:1], atol=1e-6)


@pytest.mark.parametrize("names", [[], ["logits", "score"]])
def test_another_number_of_outputs_is_refused(tmp_path: Path, names: list[str]) -> None:
    network, path = lenet5(), tmp_path / "lenet5.onnx"

    with pytest.raises(ExportError, match=f"expected {len(names)} output tensors .* gives 1"):
        export_onnx(network, torch.randn(2, 1, 32, 32), path, names)
    assert not path.exists()


def test_check_tells_by_how_much_a_graph_differs(exported: Exported) -> None:
    assert 0.0 <= check(exported.path, exported.example, exported.answers) < 1e-5
    scaled = {"logits": exported.answers["logits"] * np.float32(1 + 5e-5)}
    assert check(exported.path, exported.example, scaled) == pytest.approx(5e-5, rel=0.1)


@pytest.mark.parametrize("value", [1.0, np.inf, np.nan])
def test_a_graph_with_another_weight_is_refused(
    exported: Exported, tmp_path: Path, value: float
) -> None:
    path = tampered(exported, tmp_path / "tampered.onnx", value)

    with pytest.raises(ExportError, match=r"tampered\.onnx: the graph differs"):
        check(path, exported.example, exported.answers)


def test_a_difference_in_one_image_alone_is_noticed(exported: Exported) -> None:
    logits = exported.answers["logits"].copy()
    logits[-1, -1] += np.abs(logits).max() * 2e-4

    with pytest.raises(ExportError, match="the graph differs"):
        check(exported.path, exported.example, {"logits": logits})


def test_a_network_that_answers_nan_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(network[1].bias, torch.nan)

    with pytest.raises(ExportError):
        export_onnx(network, torch.randn(2, 1, 2, 2), tmp_path / "nan.onnx", ["logits"])


def test_a_graph_of_a_fixed_batch_is_refused(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    dimension = model.graph.input[0].type.tensor_type.shape.dim[0]
    dimension.Clear()
    dimension.dim_value = len(exported.example)
    onnx.save(model, tmp_path / "fixed.onnx")

    with pytest.raises(ExportError, match=r"fixed\.onnx"):
        check(tmp_path / "fixed.onnx", exported.example, exported.answers)


def test_a_network_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(ExportError, match=r"branching\.onnx: the network cannot be exported"):
        export_onnx(Branching(), torch.randn(2, 1, 2, 2), tmp_path / "branching.onnx", ["logits"])
