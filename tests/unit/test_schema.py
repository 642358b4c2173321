"""Plain data into dataclasses and back; messages that name the key."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from greenprune import schema
from greenprune.errors import BundleError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Part:
    label: str
    weight: Annotated[float, Meta(gt=0.0)] = 1.0
    kind: Literal["one", "two"] = "one"


@dataclass(frozen=True, kw_only=True)
class Whole:
    count: int
    on: bool = False
    note: str | None = None
    pair: tuple[int, int] | None = None
    main: Part = field(default_factory=lambda: Part(label="main"))
    spare: Part | None = None
    named: dict[str, Part] = field(default_factory=dict)
    several: tuple[Part, ...] = ()
    anything: dict[str, Any] = field(default_factory=dict)


integers = st.integers(-(2**63), 2**63 - 1)
plain = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
parts = st.builds(
    Part,
    label=st.text(),
    weight=st.floats(min_value=1e-6, max_value=1e6),
    kind=st.sampled_from(["one", "two"]),
)
wholes = st.builds(
    Whole,
    count=integers,
    on=st.booleans(),
    note=st.none() | st.text(),
    pair=st.none() | st.tuples(integers, integers),
    main=parts,
    spare=st.none() | parts,
    named=st.dictionaries(st.text(), parts, max_size=2),
    several=st.lists(parts, max_size=2).map(tuple),
    anything=st.dictionaries(st.text(), plain, max_size=2),
)


@given(wholes)
def test_decode_is_the_inverse_of_encode_through_json(value: Whole) -> None:
    text = json.dumps(schema.encode(value))

    assert schema.decode(json.loads(text), Whole, "file", BundleError) == value


def test_defaults_fill_what_is_left_out() -> None:
    made = schema.decode({"count": 3, "main": {"label": "x"}}, Whole, "file", BundleError)

    assert made == Whole(count=3, main=Part(label="x"))


def test_an_integer_will_do_for_a_float_and_becomes_one() -> None:
    made = schema.decode({"label": "x", "weight": 2}, Part, "file", BundleError)

    assert made.weight == 2.0
    assert isinstance(made.weight, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuont": 1}, "unknown key 'cuont' (did you mean 'count'?)"),
        (
            {"main": {"label": "x", "lable": "y"}},
            "unknown key 'main.lable' (did you mean 'label'?)",
        ),
        ({"spare": {"label": "x", "zzz": 1}}, "unknown key 'spare.zzz'; known here: label, weight"),
        ({"named": {"a": {"label": "x", "kid": 1}}}, "unknown key 'named.a.kid'"),
        ({"several": [{"label": "x"}, {"label": "x", "q": 1}]}, "unknown key 'several[1].q'"),
        ({"main": {}}, "key 'main': object missing required field 'label'"),
        ({"count": "3"}, "key 'count': expected 'int', got 'str'"),
        ({"count": 3.5}, "key 'count': expected 'int', got 'float'"),
        ({"count": True}, "key 'count': expected 'int', got 'bool'"),
        ({"count": None}, "key 'count': expected 'int', got 'null'"),
        ({"on": 1}, "key 'on': expected 'bool', got 'int'"),
        ({"note": 1}, "key 'note'"),
        ({"pair": [1]}, "key 'pair'"),
        ({"pair": [1, "2"]}, "key 'pair[1]'"),
        ({"main": [1]}, "key 'main': expected 'object', got 'array'"),
        ({"main": {"label": "x", "weight": 0}}, "key 'main.weight': expected 'float' > 0.0"),
        ({"main": {"label": "x", "kind": "three"}}, "key 'main.kind': invalid enum value 'three'"),
        ({"several": [{"label": 1}]}, "key 'several[0].label': expected 'str', got 'int'"),
    ],
)
def test_messages_name_what_was_expected_and_where(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.decode({"count": 1} | change, Whole, "file.toml", RecipeError)

    assert str(caught.value).startswith("file.toml: ")
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BundleError, match=r"^manifest: .*missing required field 'count'"):
        schema.decode({}, Whole, "manifest", BundleError)


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_content_that_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(BundleError, match=r"^manifest: .*expected 'object'"):
        schema.decode(content, Whole, "manifest", BundleError)


def test_free_form_values_are_not_searched_for_unknown_keys() -> None:
    content = {"count": 1, "anything": {"made": {"up": [1, {"deep": None}]}}}

    assert schema.decode(content, Whole, "file", BundleError).anything == content["anything"]


def test_encode_gives_plain_data() -> None:
    made = schema.encode(Whole(count=1, pair=(2, 3), several=(Part(label="x"),)))

    assert list(made["pair"]) == [2, 3]
    assert list(made["several"]) == [dataclasses.asdict(Part(label="x"))]
    assert made["main"] == dataclasses.asdict(Part(label="main"))
    assert set(made) == {entry.name for entry in dataclasses.fields(Whole)}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"main": {"label": "x", "kind": "three"}}, "main.kind"),
        ({"spare": {"label": "x", "kind": "three"}}, "spare.kind"),
        ({"several": [{"label": "x", "kind": "three"}]}, "several[0].kind"),
        ({"named": {"a": {"label": "x", "kind": "three"}}}, "named[...].kind"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_told_these(
    content: dict[str, Any], key: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.decode({"count": 1, **content}, Whole, "here", RecipeError)

    expected = f"here: key '{key}': invalid enum value 'three'; expected one of: one, two"
    assert str(caught.value) == expected
