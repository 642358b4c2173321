"""Budgets as they are written: what is read, what is refused, and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprune.errors import RecipeError
from greenprune.pruning.limits import Limit, allowed, parse, parse_all


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("latency_ms <= 4", Limit(quantity="latency_ms", value=4.0)),
        ("energy_mj <= 2.5", Limit(quantity="energy_mj", value=2.5)),
        ("params <= 400000", Limit(quantity="params", value=400_000.0)),
        ("params<=4e5", Limit(quantity="params", value=400_000.0)),
        ("  macs  <=  6.3e7 ", Limit(quantity="macs", value=6.3e7)),
        ("latency x0.5", Limit(quantity="latency_ms", share=0.5)),
        ("energy x 0.4", Limit(quantity="energy_mj", share=0.4)),
        ("macs x.5", Limit(quantity="macs", share=0.5)),
        ("params x1", Limit(quantity="params", share=1.0)),
    ],
)
def test_both_forms_of_every_quantity_are_read(text: str, limit: Limit) -> None:
    assert parse(text) == limit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "another form"),
        ("latency_ms", "another form"),
        ("latency_ms < 4", "another form"),
        ("latency_ms = 4", "another form"),
        ("latency_ms >= 4", "another form"),
        ("latency_ms <= 4 ms", "another form"),
        ("latency_ms <= 4, macs <= 5", "another form"),
        ("macsx0.5", "another form"),
        ("latency <= 4", "'latency' before '<='"),
        ("LATENCY_MS <= 4", "'LATENCY_MS' before '<='"),
        ("latency_us <= 4", "'latency_us' before '<='"),
        ("latency_ms x0.5", "'latency_ms' before 'x'"),
        ("bytes x0.5", "'bytes' before 'x'"),
        ("params <= 400k", "'400k', which is no plain number"),
        ("macs x50%", "'50%', which is no plain number"),
        ("latency_ms <= nan", "nan, which is not a finite number above 0"),
        ("latency_ms <= inf", "inf, which is not"),
        ("latency_ms <= 1e999", "1e999, which is not"),
        ("latency_ms <= 0", "0, which is not"),
        ("latency_ms <= -4", "-4, which is not"),
        ("macs x0", "0, which is not"),
        ("macs xnan", "nan, which is not"),
        ("macs x1.01", "a share above 1"),
    ],
)
def test_anything_else_is_refused_with_what_came_and_an_example(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)

    message = str(caught.value)
    assert message.startswith(f"budget '{text}': expected QUANTITY <= NUMBER (latency_ms, ")
    assert said in message
    assert "for example 'latency_ms <= 4' or 'latency x0.5'" in message


@given(st.text(max_size=20))
def test_whatever_is_written_is_read_or_refused(text: str) -> None:
    try:
        limit = parse(text)
    except RecipeError:
        return
    assert parse(str(limit)) == limit


@given(
    st.sampled_from(["latency_ms", "energy_mj", "macs", "params"]),
    st.floats(0.001, 1.0),
    st.booleans(),
)
def test_a_limit_is_written_as_it_is_read(quantity: str, number: float, relative: bool) -> None:
    number = float(f"{number:.6g}")
    text = f"{quantity.split('_')[0]} x{number}" if relative else f"{quantity} <= {number}"

    limit = parse(text)

    assert limit.quantity == quantity
    assert parse(str(limit)) == limit
    assert allowed(limit, 8.0) == (8.0 * number if relative else number)


def test_several_hold_at_once_but_one_for_a_quantity() -> None:
    assert [limit.quantity for limit in parse_all(["latency x0.5", "params <= 4e5"])] == [
        "latency_ms",
        "params",
    ]
    assert parse_all([]) == ()
    with pytest.raises(RecipeError, match=r"'latency x0\.5' and 'latency_ms <= 4'.*two for lat"):
        parse_all(["latency x0.5", "macs x0.5", "latency_ms <= 4"])
