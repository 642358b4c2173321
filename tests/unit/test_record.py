"""Saving, rebuilding and refusing networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from greenprune import onnx_export, storage
from greenprune.errors import PruningError, WeightsError
from greenprune.pruning import record, surgery
from greenprune.pruning.graph import analyse

SHAPE = (3, 16, 16)
SOURCE = """
from torch import nn

def network(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.ReLU(), nn.Conv2d(width, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    source = tmp_path / "mine.py"
    source.write_text(SOURCE)
    return f"{source}:network"


@pytest.fixture
def saved(tmp_path: Path, factory: str) -> Path:
    """A pruned network on disk."""
    described = record.NetworkRecord.of(factory, {"width": 10}, SHAPE)
    network = built(described)
    network, described = cut(network, described, {"0": [1, 7], "2": [0]})
    record.save_network(tmp_path / "saved", network, described)
    return tmp_path / "saved"


def built(described: record.NetworkRecord) -> nn.Module:
    from greenprune.models import build

    torch.manual_seed(0)
    return build(described.factory, described.arguments)


def cut(
    network: nn.Module, described: record.NetworkRecord, removed: dict[str, list[int]]
) -> tuple[nn.Module, record.NetworkRecord]:
    example = torch.randn(1, *described.input_shape)
    compact = surgery.prune_channels(network, example, removed)
    return compact, described.pruned(analyse(network, example), removed)


def rewrite(folder: Path, **changes: object) -> None:
    """Change the weights file and its checksum, as someone who edits both would."""
    state = load_file(folder / record.WEIGHTS)
    for name, value in changes.items():
        if value is None:
            del state[name.replace("_", ".")]
        else:
            state[name.replace("_", ".")] = value
    save_file(state, folder / record.WEIGHTS)
    content = json.loads((folder / record.NETWORK).read_text())
    content["weights_sha256"] = storage.sha256(folder / record.WEIGHTS)
    storage.write_json(folder / record.NETWORK, content)


def test_a_resnet_pruned_twice_comes_back_equal(tmp_path: Path) -> None:
    described = record.NetworkRecord.of("greenprune.models:resnet20", {}, SHAPE)
    network = built(described)
    network, described = cut(network, described, {"conv1": [3, 4], "layer2.0.conv2": [0, 9]})
    network, described = cut(network, described, {"layer2.0.conv2": [1], "layer1.1.conv1": [15]})
    surgery.add_bias(network, "layer1.0.conv2")
    network.get_parameter("layer1.0.conv2.bias").data.normal_()
    described = described.with_biases("layer1.0.conv2")
    assert isinstance(network, fx.GraphModule)

    record.save_network(tmp_path / "network", network.eval(), described)
    loaded, read = record.load_network(tmp_path / "network")
    assert read == described
    assert len(read.surgeries) == 2
    assert read.surgeries[0]["conv1"] == (0, 1, 2, *range(5, 16))
    assert not loaded.training
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    loaded, read = cut(loaded, read, {"conv1": [0]})
    record.save_network(tmp_path / "network", loaded, read)
    assert len(record.load_network(tmp_path / "network")[1].surgeries) == 3


REBUILD = """
import sys
from pathlib import Path
import torch
from greenprune.pruning import record
torch.set_num_threads(1)
network, described = record.load_network(Path(sys.argv[1]))
images = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(network(images), sys.argv[3])
"""


def test_a_network_without_blocks_comes_back_in_a_fresh_process(tmp_path: Path) -> None:
    described = record.NetworkRecord.of("greenprune.models:resnet20", {}, SHAPE)
    network = built(described)
    for name in ("layer1.1", "layer3.2"):
        surgery.remove_block(network, name)
        described = described.without_blocks(name)
    network, described = cut(network, described, {"conv1": [3, 4], "layer2.0.conv2": [0, 9]})
    surgery.add_bias(network, "layer1.0.conv2")
    network.get_parameter("layer1.0.conv2.bias").data.normal_()
    described = described.with_biases("layer1.0.conv2")
    record.save_network(tmp_path / "network", network.eval(), described)

    images = torch.randn(3, *SHAPE)
    torch.save(images, tmp_path / "images.pt")
    arguments = [str(tmp_path / name) for name in ("network", "images.pt", "answers.pt")]
    subprocess.run([sys.executable, "-c", REBUILD, *arguments], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "answers.pt", weights_only=True), network(images))


def test_a_network_without_blocks_is_pruned_again_and_exported(tmp_path: Path) -> None:
    described = record.NetworkRecord.of("greenprune.models:resnet20", {}, SHAPE)
    network = built(described)
    surgery.remove_block(network, "layer2.1")
    described = described.without_blocks("layer2.1")
    network, described = cut(network, described, {"layer2.0.conv2": [0, 9]})
    record.save_network(tmp_path / "network", network, described)
    network, described = record.load_network(tmp_path / "network")
    assert not any(name.startswith("layer2.1.") for name, _ in network.named_parameters())
    network, described = cut(network, described, {"conv1": [1], "layer2.2.conv1": [0, 1, 2]})
    record.save_network(tmp_path / "network", network, described)
    loaded, read = record.load_network(tmp_path / "network")
    assert (read.removed_blocks, len(read.surgeries)) == (("layer2.1",), 2)
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))
    onnx_export.export_onnx(loaded, images, tmp_path / "network.onnx", ["logits"])


def test_blocks_go_first(saved: Path) -> None:
    described = record.load_network(saved)[1]
    with pytest.raises(PruningError, match="remove the blocks first"):
        described.without_blocks("2")


def test_only_json_and_safetensors_are_written(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [record.NETWORK, record.WEIGHTS]
    content = json.loads((saved / record.NETWORK).read_text())
    assert content["weights_sha256"] == storage.sha256(saved / record.WEIGHTS)
    assert content["record"]["surgeries"] == [{"0": [0, 2, 3, 4, 5, 6, 8, 9], "2": [1, 2, 3, 4, 5]}]


def test_a_changed_factory_is_refused(saved: Path, factory: str) -> None:
    Path(factory.partition(":")[0]).write_text(SOURCE + "\n# another version\n")
    with pytest.raises(WeightsError, match=r"source of factory .* has changed"):
        record.load_network(saved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_weights(saved: Path, share: float) -> None:
    weights = saved / record.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=f"{record.WEIGHTS}: truncated or damaged"):
        record.load_network(saved)


def test_weights_of_another_save(saved: Path) -> None:
    weights = saved / record.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WeightsError, match="expected sha256"):
        record.load_network(saved)


def test_weights_that_do_not_fit_name_key_and_shapes(saved: Path) -> None:
    rewrite(saved, **{"0_weight": torch.zeros(10, 3, 3, 3)})
    expected = r"key '0.weight': expected shape \[8, 3, 3, 3\], found \[10, 3, 3, 3\]"
    with pytest.raises(WeightsError, match=expected):
        record.load_network(saved)
    rewrite(saved, **{"0_weight": None})
    with pytest.raises(WeightsError, match=r"key '0.weight': expected shape .*, found nothing"):
        record.load_network(saved)
    rewrite(saved, **{"0_weight": torch.zeros(8, 3, 3, 3), "9_bias": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"key '9.bias': expected nothing, found shape \[2\]"):
        record.load_network(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        record.load_network(tmp_path / "nowhere")
    (saved / record.WEIGHTS).unlink()
    with pytest.raises(WeightsError, match="no such file"):
        record.load_network(saved)


def test_a_damaged_record(saved: Path) -> None:
    path = saved / record.NETWORK
    content = json.loads(path.read_text())
    content["record"]["surgeries"][0] = {"seven": [0]}
    storage.write_json(path, content)
    with pytest.raises(WeightsError, match="cannot be built again: group 'seven' is unknown"):
        record.load_network(saved)
    content["record"]["surgeries"] = []
    content["record"]["removed_blocks"] = ["2"]
    storage.write_json(path, content)
    with pytest.raises(WeightsError, match=r"cannot be built again: .2. .*residual block"):
        record.load_network(saved)
    path.write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        record.load_network(saved)
    storage.write_json(path, {"schema": 1, "weights": "x"})
    with pytest.raises(WeightsError, match="unknown key 'weights'"):
        record.load_network(saved)
    storage.write_json(path, {**content, "schema": 2})
    with pytest.raises(WeightsError, match="expected schema 1, found 2"):
        record.load_network(saved)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, factory: str) -> None:
    described = record.NetworkRecord.of(factory, {}, SHAPE)
    network = built(described)
    network[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"key '0.weight': expected finite values"):
        record.save_network(tmp_path / "saved", network, described)
    assert not (tmp_path / "saved").exists()
