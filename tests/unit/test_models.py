from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from greenprune import models
from greenprune.errors import RecipeError, WeightsError
from greenprune.pruning import surgery
from greenprune.pruning.cost import Cost, count
from greenprune.pruning.graph import analyse


@pytest.mark.parametrize(
    ("factory", "channels", "macs", "params"),
    [
        (models.lenet5, 1, 1_704_832, 124_682),
        (models.vgg16, 3, 313_463_808, 14_991_946),
        (models.resnet20, 3, 40_551_040, 269_722),
        (models.resnet56, 3, 125_485_696, 853_018),
        (models.resnet110, 3, 252_887_680, 1_727_962),
        (models.googlenet, 3, 1_521_756_160, 6_166_250),
        (models.densenet40, 3, 282_917_328, 1_059_298),
        (models.crnn, 1, 3_818_752, 189_562),
    ],
)
def test_built_in_networks_have_their_size(
    factory: Callable[[], nn.Module], channels: int, macs: int, params: int
) -> None:
    """Those of VGG-16, ResNet-56, GoogLeNet and DenseNet-40 are HRankPlus's, to the last unit."""
    model = factory().eval()
    images = torch.zeros(2, channels, 32, 32)
    assert count(model, images) == Cost(macs=macs, params=params)
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("factory", [models.googlenet, models.densenet40])
def test_every_convolution_of_googlenet_and_densenet_can_be_pruned(
    factory: Callable[[], nn.Module],
) -> None:
    model, example = factory(), torch.randn(1, 3, 32, 32)
    analysis = analyse(model, example)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [group.name for group in analysis.groups] == convolutions
    assert [item.name for item in analysis.frozen] == ["classifier"]
    removed = {group.name: range(0, group.channels, 4) for group in analysis.groups}
    assert surgery.prove(model, analysis, example, removed) <= 1e-10


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_crnn_reads_columns_and_is_pruned_in_convolutions_and_units(cell: str, layers: int) -> None:
    model = models.crnn(convolutions=(4, 6, 8), hidden=10, layers=layers, cell=cell)
    example = torch.randn(2, 1, 32, 32)
    analysis = analyse(model, example)
    widths = {group.name: group.channels for group in analysis.groups}
    assert widths == {"features.0": 4, "features.4": 6, "features.8": 8, "recurrent": 10}
    removed = {"features.4": [0], "features.8": [1, 7], "recurrent": [2, 3, 9]}
    compact = surgery.prune_channels(model, example, removed)
    assert (compact.recurrent.input_size, compact.recurrent.hidden_size) == (6 * 4, 7)
    counts = {name: len(gone) for name, gone in removed.items()}
    assert analysis.predict_cost(counts) == count(compact, example)


def test_crnn_refuses_another_cell() -> None:
    with pytest.raises(WeightsError, match=r"'elman'.*lstm, gru"):
        models.crnn(cell="elman")


def test_option_a_shortcut_thins_and_pads_both_sides() -> None:
    shortcut = models.resnet20().layer2[0].shortcut
    x = torch.randn(1, 16, 4, 4)
    y = shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_build_by_module_and_by_file(tmp_path: Path) -> None:
    model = models.build("greenprune.models:lenet5", {"num_classes": 3})
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    file = tmp_path / "net.py"
    file.write_text("import torch\ndef tiny(width=2):\n    return torch.nn.Linear(width, 1)\n")
    assert models.build(f"{file}:tiny", {"width": 5})(torch.zeros(1, 5)).shape == (1, 1)
    assert models.resolve(f"{file}:tiny")[1] == file.resolve()
    assert models.resolve("greenprune.models:lenet5")[1].name == "lenet.py"


def test_a_changed_file_is_loaded_again_and_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "net.py", tmp_path / "b" / "net.py"
    for number, file in enumerate((first, second)):
        file.parent.mkdir()
        file.write_text(f"def answer():\n    return {number}\n")
    assert [models.resolve(f"{file}:answer")[0]() for file in (first, second)] == [0, 1]
    first.write_text("def answer():\n    return 7\n")
    assert models.resolve(f"{first}:answer")[0]() == 7


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("import nowhere_to_be_found", "f", "nowhere_to_be_found"),
        ("def f(:", "f", "SyntaxError"),
        ("g = 1", "f", "no such name"),
        ("f = 1", "f", "holds a int"),
    ],
)
def test_resolve_says_what_is_wrong(tmp_path: Path, text: str, name: str, words: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        models.resolve(f"{file}:{name}", RecipeError)
    assert "mine.py" in str(caught.value)


@pytest.mark.parametrize("spec", ["lenet5", ":f", "module:", "no.such.module:f", "no/such.py:f"])
def test_resolve_refuses_what_is_not_there(spec: str) -> None:
    with pytest.raises(WeightsError, match=r"expected|cannot be imported"):
        models.resolve(spec)


def test_build_names_the_wrong_argument_and_the_failing_factory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"colour.*model\.arguments"):
        models.build("greenprune.models:lenet5", {"colour": 1})
    file = tmp_path / "net.py"
    file.write_text("def bad():\n    return 1 / 0\ndef odd():\n    return 3\n")
    with pytest.raises(WeightsError, match="ZeroDivisionError"):
        models.build(f"{file}:bad")
    with pytest.raises(WeightsError, match=r"torch\.nn\.Module.*int"):
        models.build(f"{file}:odd")


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    return models.resnet20()


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "parallel"])
def test_weights_load_from_every_form(tmp_path: Path, trained: nn.Module, form: str) -> None:
    state = {k: v for k, v in trained.state_dict().items() if "num_batches" not in k}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "parallel":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save({form: state}, path)
    model = models.resnet20()
    models.load_weights(model, path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_unfitting_weights_are_refused_and_leave_the_model_alone(
    tmp_path: Path, trained: nn.Module
) -> None:
    state = trained.state_dict()
    cases = {
        "missing: 'linear.bias'": {k: v for k, v in state.items() if k != "linear.bias"},
        "unexpected: 'extra'": {**state, "extra": torch.zeros(1)},
        r"'conv1.weight': expected shape \(16, 3, 3, 3\), found \(2,\)": {
            **state,
            "conv1.weight": torch.zeros(2),
        },
        "'linear.bias': expected finite": {**state, "linear.bias": torch.full((10,), torch.nan)},
        "'epoch', 'best'": {"epoch": 1, "best": 2.0},
        "found a list": [1, 2],
    }
    model = models.resnet20()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for words, content in cases.items():
        path = tmp_path / "w.pt"
        torch.save(content, path)
        with pytest.raises(WeightsError, match=words) as caught:
            models.load_weights(model, path)
        assert str(path) in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_missing_truncated_and_foreign_files(
    tmp_path: Path, trained: nn.Module, suffix: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(WeightsError, match="no such file"):
        models.load_weights(trained, path)
    if suffix == "pt":
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"hello, world"):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="truncated"):
            models.load_weights(trained, path)


class _Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (Path.touch, (Path("trap-was-sprung"),))  # type: ignore[return-value]


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Trap()}, "w.pt")
    with pytest.raises(WeightsError, match="checkpoint of tensors"):
        models.load_weights(trained, "w.pt")
    assert not Path("trap-was-sprung").exists()
