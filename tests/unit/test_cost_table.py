"""Cost tables: on disk, bound to a device, interpolated, and the block width in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune import schema
from greenprune.errors import MeasurementError
from greenprune.harness import cost_table
from greenprune.harness.cost_table import (
    CostPoint,
    CostTable,
    LayerShape,
    Lookup,
    ShapeCosts,
    find_block,
)
from greenprune.registry import load_target

MACHINE: dict[str, Any] = {
    "cpu": "a test",
    "architecture": "x86_64",
    "isa": ["avx2"],
    "versions": {"onnxruntime": "1.23.0", "openvino": "2026.1"},
}
CONVOLUTION = LayerShape(
    operator="convolution", kernel=(3, 3), padding=(1, 1, 1, 1), input_size=(16, 16)
)
STRIDED = replace(CONVOLUTION, stride=(2, 2))
DEPTHWISE = replace(CONVOLUTION, groups=0)


def point(in_width: int, out_width: int, cost: float, energy: float | None = None) -> CostPoint:
    return CostPoint(
        in_width=in_width,
        out_width=out_width,
        latency_us=cost,
        latency_us_low=0.9 * cost,
        latency_us_high=1.1 * cost,
        energy_uj=energy,
        energy_uj_low=energy,
        energy_uj_high=energy,
    )


def product(in_width: float, out_width: float) -> float:
    return 2.0 + 0.5 * in_width + 0.25 * out_width + 0.1 * in_width * out_width


def table(*costs: ShapeCosts, **changed: Any) -> CostTable:
    made = CostTable(
        target="x86",
        runtime="onnxruntime",
        threads=2,
        machine=MACHINE,
        versions={"python": "3.11"},
        block_width=1,
        block_probe=(point(8, 8, 20.9), point(16, 16, 50.1)),
        costs=costs,
    )
    return replace(made, **changed)


FULL = ShapeCosts(
    shape=STRIDED,
    mirrored=False,
    points=tuple(
        point(i, o, product(i, o), 3 * product(i, o)) for i in (8, 16, 24) for o in (8, 32)
    ),
)
TRIANGLE = ShapeCosts(
    shape=CONVOLUTION,
    mirrored=True,
    points=tuple(point(i, o, 1.0 + i * o) for i in (8, 16, 24) for o in (8, 16, 24) if i <= o),
)
LINE = ShapeCosts(
    shape=DEPTHWISE, mirrored=False, points=tuple(point(w, w, 3.0 * w) for w in (8, 16, 32))
)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = table(FULL, TRIANGLE, LINE, correction={"layer_us": 3.0, "slope": 1.1})
    cost_table.write(made, tmp_path / "table.json")
    assert cost_table.read(tmp_path / "table.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "schema 2, this version of greenprune reads 1"),
        (lambda c: c.update(kind="other"), "expected kind 'greenprune-cost-table', found 'other'"),
        (lambda c: c.pop("threads"), "threads"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c["costs"][0]["points"][0].update(latency_us=0.0), "above zero"),
        (lambda c: c["costs"][0]["points"][0].update(latency_us_low=99.0), "within its interval"),
        (lambda c: c["costs"][0]["points"][0].update(energy_uj=None), "energy_uj"),
        (lambda c: c["costs"][0]["points"].append(c["costs"][0]["points"][0]), "once"),
        (lambda c: c["costs"].append(c["costs"][0]), "twice"),
        (lambda c: c.update(block_width=0), "block_width of 1"),
        (lambda c: c.update(threads=-1), "threads of 1"),
    ],
)
def test_a_table_that_cannot_be_one_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "table.json"
    content = json.loads(json.dumps(schema.encode(table(FULL))))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=message) as caught:
        cost_table.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "nan", "list", "missing"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.json"
    text = json.dumps(schema.encode(table(FULL)))
    broken = {
        "truncated": text[:-20],
        "nan": text.replace("50.1", "NaN"),
        "list": "[1, 2]",
    }
    if damage != "missing":
        path.write_text(broken[damage])
    with pytest.raises(MeasurementError, match=r"table\.json.*(copy|measure)"):
        cost_table.read(path)


def test_numbers_that_no_measurement_gives_are_not_written(tmp_path: Path) -> None:
    broken = replace(FULL, points=(point(8, 8, float("nan")),))
    with pytest.raises(MeasurementError, match="8 to 8"):
        cost_table.write(table(broken), tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


def test_the_device_that_it_was_measured_on_is_accepted() -> None:
    another = {"python": "3.12", "onnxruntime": "1.23.0", "openvino": "none here"}
    here = MACHINE | {"versions": another}  # only the runtime's own version counts
    cost_table.check_device(
        table(FULL), target="x86", runtime="onnxruntime", threads=2, machine=here
    )


@pytest.mark.parametrize(
    ("changed", "machine", "named"),
    [
        ({"target": "arm"}, {}, "target (measured: x86, here: arm)"),
        ({"runtime": "onnxruntime-int8"}, {}, "runtime (measured: onnxruntime, here: onnx"),
        ({"threads": 4}, {}, "threads (measured: 2, here: 4)"),
        ({}, {"cpu": "another"}, "cpu (measured: a test, here: another)"),
        ({}, {"isa": ["avx2", "avx512f"]}, "isa (measured: ['avx2'], here: ['avx2', 'avx512f'])"),
        ({}, {"versions": {"onnxruntime": "1.24"}}, "version of onnxruntime (measured: 1.23.0"),
        ({}, {"gpus": ["one"]}, "gpus (measured: None, here: ['one'])"),
    ],
)
def test_a_table_of_another_device_is_refused(
    changed: dict[str, Any], machine: dict[str, Any], named: str
) -> None:
    asked: dict[str, Any] = {"target": "x86", "runtime": "onnxruntime", "threads": 2}
    with pytest.raises(MeasurementError) as caught:
        cost_table.check_device(table(FULL), **asked | changed, machine=MACHINE | machine)
    assert named in str(caught.value)
    assert "--cost-table" in str(caught.value)


def test_this_machine_is_described_by_its_target() -> None:
    target = load_target("x86")
    assert cost_table.describe_machine(target) == target.probe()
    assert "gpus" in cost_table.describe_machine(load_target("cuda"))


@given(st.integers(8, 24), st.integers(8, 32))
def test_a_cost_that_grows_with_the_product_is_exact(in_width: int, out_width: int) -> None:
    found = Lookup(table(FULL)).latency_us(STRIDED, [in_width], [out_width])
    assert found[0] == pytest.approx(product(in_width, out_width))


def test_a_grid_is_answered_at_once_with_joules() -> None:
    lookup = Lookup(table(FULL, TRIANGLE))
    ins, outs = np.meshgrid([8, 12, 24], [8, 20, 32], indexing="ij")
    expected = np.array([[product(i, o) for o in (8, 20, 32)] for i in (8, 12, 24)])
    assert np.allclose(lookup.latency_us(STRIDED, ins, outs), expected)
    assert np.allclose(lookup.energy_uj(STRIDED, ins, outs), 3 * expected)
    assert lookup.latency_us(STRIDED, ins, outs).dtype == np.float64
    with pytest.raises(MeasurementError, match="no microjoules of this layer"):
        lookup.energy_uj(CONVOLUTION, 8, 8)


def test_a_mirrored_shape_is_symmetric() -> None:
    lookup = Lookup(table(TRIANGLE))
    widths = np.array([8, 10, 16, 21, 24])
    ins, outs = np.meshgrid(widths, widths)
    found = lookup.latency_us(CONVOLUTION, ins, outs)
    assert np.allclose(found, found.T)
    assert np.allclose(found, 1.0 + ins * outs)


def test_a_width_that_was_not_measured_costs_what_its_block_does() -> None:
    lookup = Lookup(replace(table(FULL), block_width=16))
    widths = np.arange(8, 33)
    found = lookup.latency_us(STRIDED, np.full(25, 8), widths)
    for width, cost in zip(widths.tolist(), found.tolist(), strict=True):
        whole = width if width in (8, 32) else 16 * -(-width // 16)  # 8 and 32 were measured
        assert cost == pytest.approx(product(8, whole)), width
    # 24 is the widest that was measured, and no whole block
    ins = lookup.latency_us(STRIDED, [17, 20, 24], [8, 8, 8])
    assert ins == pytest.approx([product(24, 8)] * 3)


def test_a_block_that_goes_on_beyond_the_widest_layer_costs_what_that_does() -> None:
    """Of layers of 96 and 40 to 48 channels in turn nothing is known of 64 to 96, where blocks of
    32 end."""
    pairs = [(96, 8), (96, 32), (96, 48), (32, 8), (32, 32), (32, 48)]
    costs = ShapeCosts(
        shape=CONVOLUTION, mirrored=True, points=tuple(point(i, o, 1.0 * i * o) for i, o in pairs)
    )
    lookup = Lookup(table(costs, block_width=32))
    assert lookup.latency_us(CONVOLUTION, 96, [33, 40, 48]).tolist() == [96.0 * 48] * 3
    assert lookup.latency_us(CONVOLUTION, 40, 96) == 96 * 48


def test_a_depthwise_layer_has_one_width() -> None:
    lookup = Lookup(table(LINE))
    found = lookup.latency_us(DEPTHWISE, [8, 12, 32, 0, 4], [8, 12, 32, 0, 4])
    assert found.tolist() == [24.0, 36.0, 96.0, 0.0, 24.0]
    with pytest.raises(MeasurementError, match="depthwise"):
        lookup.latency_us(DEPTHWISE, [8], [16])


def test_no_layer_costs_nothing_and_a_narrow_one_what_the_narrowest_does() -> None:
    found = Lookup(table(FULL)).latency_us(STRIDED, [0, 8, 0, 1, 8], [8, 0, 0, 1, 8])
    assert found.tolist() == [0.0, 0.0, 0.0, product(8, 8), product(8, 8)]


@pytest.mark.parametrize(("in_width", "out_width"), [(25, 8), (8, 33), (float("nan"), 8), (-1, 8)])
def test_nothing_is_extrapolated(in_width: float, out_width: float) -> None:
    with pytest.raises(MeasurementError, match="expected widths of 0 to"):
        Lookup(table(FULL)).latency_us(STRIDED, [8, in_width], [8, out_width])


def test_a_shape_that_lacks_is_named() -> None:
    asked = replace(CONVOLUTION, kernel=(5, 5), input_size=(32, 32), activation="Relu", groups=4)
    with pytest.raises(MeasurementError) as caught:
        Lookup(table(FULL)).latency_us(asked, 8, 8)
    for part in ("5x5 convolution of 32x32", "4 groups", "Relu", "greenprune-bench --cost-table"):
        assert part in str(caught.value)


def test_a_gap_between_measured_points_is_filled_and_a_missing_corner_is_told() -> None:
    gap = replace(FULL, points=tuple(p for p in FULL.points if p.in_width != 16 or p.out_width < 9))
    lookup = Lookup(table(gap))
    assert lookup.latency_us(STRIDED, [16], [32])[0] == pytest.approx(product(16, 32))
    corner = replace(
        FULL, points=tuple(p for p in FULL.points if p.in_width < 24 or p.out_width < 9)
    )
    lookup = Lookup(table(corner))
    assert lookup.latency_us(STRIDED, [24], [8])[0] == pytest.approx(product(24, 8))
    with pytest.raises(MeasurementError, match=r"24 to 32.*no points on all sides"):
        lookup.latency_us(STRIDED, [8, 24], [8, 32])


def test_a_narrow_corner_that_lacks_costs_what_the_next_wider_layer_does() -> None:
    stem = replace(TRIANGLE, points=(*TRIANGLE.points, point(3, 16, 30.0), point(3, 24, 45.0)))
    lookup = Lookup(table(stem))
    found = lookup.latency_us(CONVOLUTION, [3, 3, 3, 8], [16, 20, 3, 8])
    assert found.tolist() == [30.0, 37.5, 30.0, 65.0]


def test_a_side_of_one_width_is_a_line() -> None:
    shape = LayerShape(operator="linear", input_size=(1, 1))
    costs = ShapeCosts(shape=shape, mirrored=False, points=(point(8, 10, 1.0), point(64, 10, 8.0)))
    found = Lookup(table(costs)).latency_us(shape, [8, 36, 64], [10, 10, 10])
    assert found.tolist() == pytest.approx([1.0, 4.5, 8.0])


# columns of the same layer measured at six widths each: ONNX Runtime and OpenVINO, AVX2, fp32
MEASURED = {
    "onnxruntime 32x32": {8: 20.9, 9: 43.9, 12: 46.4, 13: 70.0, 15: 95.6, 16: 50.1},
    "openvino 32x32": {8: 42.1, 9: 73.2, 12: 79.8, 13: 84.6, 15: 95.0, 16: 61.6},
    "onnxruntime 16x16": {16: 17.9, 19: 48.0, 24: 36.5, 27: 69.9, 31: 80.8, 32: 50.3},
    "openvino 16x16": {16: 26.3, 19: 46.8, 24: 34.4, 27: 64.8, 31: 97.0, 32: 59.5},
    "onnxruntime 8x8": {32: 23.9, 38: 32.4, 40: 24.9, 48: 30.2, 57: 61.1, 64: 36.6},
}


@pytest.mark.parametrize("name", MEASURED)
def test_blocks_of_8_are_found_in_what_was_measured_on_avx2(name: str) -> None:
    assert find_block([point(w, w, cost) for w, cost in MEASURED[name].items()]) == 8


def test_a_width_that_pays_off_only_at_16_is_told() -> None:
    column = {32: 38.9, 38: 47.5, 40: 45.7, 48: 41.8, 57: 64.7, 64: 62.0}  # OpenVINO, 8x8
    assert find_block([point(w, w, cost) for w, cost in column.items()]) == 16


def staircase(block: int, power: float, slow: float) -> dict[int, float]:
    """Costs of widths 4 to 40 that grow with each block begun; ``slow``: of a remainder."""
    return {
        width: 3.0 * (-(-width // block)) ** power * (slow if width % block else 1.0)
        for width in range(4, 41)
    }


@given(
    block=st.sampled_from([1, 2, 4, 8, 16, 32]),
    power=st.sampled_from([1.0, 1.5, 2.0]),
    slow=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**32 - 1),
    outlier=st.integers(4, 40),
)
def test_blocks_are_found_under_noise(
    block: int, power: float, slow: float, seed: int, outlier: int
) -> None:
    draw = np.random.default_rng(seed)
    costs = staircase(block, power, slow)
    noisy = {width: cost * (1 + 0.02 * draw.uniform(-1, 1)) for width, cost in costs.items()}
    noisy[outlier] *= 1.15
    assert find_block([point(w, w, cost) for w, cost in noisy.items()]) == block


@given(st.floats(0, 8), st.floats(1, 2))
def test_a_smooth_cost_has_no_blocks(overhead: float, power: float) -> None:
    costs = {width: overhead + width**power for width in range(4, 41)}
    assert find_block([point(w, w, cost) for w, cost in costs.items()]) == 1
