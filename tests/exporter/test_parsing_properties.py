"""Any text or TOML: a value that says the same when it is written again, or one line that says what is wrong."""

import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.budget_terms import parse_budget
from exporter.errors import QExportError
from exporter.gates import FIGURES, RELATIONS, RUNTIMES, judge, margin, parse_gate
from exporter.options import convert, describe_value
from exporter.recipe import FLAGS, Recipe, read_recipe
from exporter.recipe_values import parse_dynamic, parse_input, parse_profile, parse_size
from exporter.specs import describe, join_specs, option_types, parse_passes
from passes import PASSES

LETTERS = string.ascii_letters + string.digits + " :=,.<>-_*/[]{}\"'\n\0é"
NEAR = st.text(LETTERS, max_size=40)
"""Text made of what the small languages are made of."""
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NEAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NEAR, inner, max_size=4),
    max_leaves=8,
)
WORDS = st.sampled_from([*PASSES, "bits", "group_size", "4", "-1", "nan", ":", "=", ",", "x", " "])
SPECS = NEAR | st.lists(WORDS, max_size=8).map("".join)


def refused_in_one_line(parse: Any, *args: Any) -> Any:
    """What `parse` makes of the arguments; None when it refuses them as it should."""
    try:
        return parse(*args)
    except QExportError as error:
        refusal = error
    assert refusal.exit_code == 2
    assert refusal.what
    assert "\n" not in str(refusal)
    return None


@settings(max_examples=200, deadline=None)
@given(SPECS)
def test_any_spec_is_read_or_refused(text: str) -> None:
    refused_in_one_line(parse_passes, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(NEAR | st.dictionaries(NEAR | st.just("name"), JSON, max_size=3), max_size=3))
def test_any_list_of_specs_is_read_or_refused(entries: list[Any]) -> None:
    refused_in_one_line(lambda: parse_passes(join_specs(entries)))


@pytest.mark.parametrize("name", PASSES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_options_written_out_are_read_as_they_were(name: str, data: st.DataObject) -> None:
    defaults = {option.name: option.default for option in describe(PASSES[name]).options}
    for option in data.draw(st.sets(st.sampled_from(sorted(defaults)))) if defaults else ():
        value = data.draw(JSON | st.integers(0, 16) | st.floats(0, 1) | st.booleans())
        try:
            typed = convert(value, option_types(PASSES[name])[option])
        except ValueError:
            continue
        spec = f"{name}:{option}={describe_value(typed)}"
        read = refused_in_one_line(parse_passes, spec)
        if read is not None and isinstance(typed, int | bool):
            assert getattr(read[0], option) == typed


@settings(max_examples=200, deadline=None)
@given(NEAR)
def test_any_gate_is_read_or_refused(text: str) -> None:
    refused_in_one_line(parse_gate, text)
    refused_in_one_line(parse_budget, text)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["", *(f"{runtime}." for runtime in RUNTIMES)]),
    st.sampled_from(FIGURES),
    st.sampled_from(sorted(RELATIONS)),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(),
)
def test_a_gate_means_what_it_says(runtime: str, figure: str, relation: str, bound: float, value: float) -> None:
    gate = parse_gate(f" {runtime}{figure} {relation} {bound!r} ")
    assert (gate.runtime or "", gate.figure, gate.relation, gate.bound) == (runtime[:-1], figure, relation, bound)
    assert parse_gate(gate.expr) == gate
    result = judge(gate.expr, relation, bound, {"here": value})
    assert result.passed == (not math.isnan(value) and RELATIONS[relation](value, bound))
    if math.isfinite(value) and relation in (">=", "<="):
        assert (margin(relation, bound, value) >= 0) == result.passed


@settings(max_examples=200, deadline=None)
@given(NEAR | JSON)
def test_any_value_of_a_flag_is_read_or_refused(value: Any) -> None:
    refused_in_one_line(parse_input, value)
    refused_in_one_line(parse_size, value)
    if isinstance(value, dict | list):
        refused_in_one_line(parse_dynamic, value)
        refused_in_one_line(parse_profile, value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=5), st.sampled_from(["float32", "int64", "bool"]))
def test_an_input_written_out_is_read_as_it_was(shape: list[int], dtype: str) -> None:
    spec = parse_input(f"x={'x'.join(map(str, shape))}:{dtype}")
    assert (spec.name, spec.shape, spec.dtype) == ("x", tuple(shape), dtype)
    assert parse_input(str(spec)) == spec


FIELDS = sorted(Recipe.__dataclass_fields__)
KEYS = [*FIELDS, *FLAGS.values()]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), NEAR | JSON, max_size=2))
def test_any_recipe_is_read_or_refused(fields: dict[str, Any]) -> None:
    recipe = refused_in_one_line(lambda: Recipe(**fields))
    if recipe is not None:
        assert recipe.to_json() == Recipe(**fields).to_json()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([*FIELDS, *FLAGS.values(), "=", "\n", "[", "]", '"', "1", "true", "{", "}", "[[layers]]"]))
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text("".join(words), encoding="utf-8")
    refused_in_one_line(read_recipe, {}, Path(path))
