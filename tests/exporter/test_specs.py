"""Pass specs: options derive from fields, and what is wrong is named with the nearest right thing."""

import dataclasses
import types
import typing

import pytest

from exporter.errors import InputError
from exporter.options import convert
from exporter.specs import describe, join_specs, option_types, parse_passes
from passes import PASSES
from passes.cle import CrossLayerEqualization
from passes.gptq import GPTQ


def refusal(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_passes(text)
    assert str(caught.value).startswith("--passes: ")
    return str(caught.value)


def test_a_spec_becomes_passes_with_typed_options() -> None:
    found = parse_passes("cle, gptq:bits=3:group_size=64:act_order=false:damp=1e-3:scale_search=mse")
    options = GPTQ(bits=3, group_size=64, act_order=False, damp=1e-3, scale_search="mse")
    assert found == (CrossLayerEqualization(), options)


def test_a_toml_list_says_the_same() -> None:
    text = join_specs(["cle", {"name": "gptq", "bits": 3, "act_order": False}, "bias-correct"])
    assert text == "cle,gptq:bits=3:act_order=false,bias-correct"
    for wrong in ({"bits": 3}, 3):
        with pytest.raises(InputError, match="--passes"):
            join_specs([wrong])


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_is_made_from_its_name_and_from_its_described_defaults(name: str) -> None:
    defaults = "".join(f":{option.name}={option.default}" for option in describe(PASSES[name]).options)
    assert parse_passes(name) == parse_passes(name + defaults) == (PASSES[name](),)


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_choice_that_a_pass_lists_can_be_made(name: str) -> None:
    for option in describe(PASSES[name]).options:
        for choice in option.type.split("|") if "|" in option.type else ():
            try:
                (made,) = parse_passes(f"{name}:{option.name}={choice}")
            except InputError as error:
                pytest.fail(f"{option.name}={choice}: {error}")
            assert str(getattr(made, option.name)).lower() == choice


@pytest.mark.parametrize("name", sorted(PASSES))
def test_an_option_has_one_type_or_none(name: str) -> None:
    """What a flag is read as would else leave a type out."""
    for option, hint in option_types(PASSES[name]).items():
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            assert len(set(typing.get_args(hint)) - {type(None)}) == 1, option


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_tells_what_it_is(name: str) -> None:
    shown = describe(PASSES[name])
    assert shown.name == name
    assert shown.summary
    assert {option.name for option in shown.options} == {field.name for field in dataclasses.fields(PASSES[name])}
    assert all(option_types(PASSES[name]).values())


def test_unknown_passes_and_options_name_the_nearest() -> None:
    assert "unknown pass 'gtpq'; did you mean gptq" in refusal("cle,gtpq")
    assert "known are fold-bn" in refusal("zzzzzz")
    assert "gptq has no option 'groupsize'; did you mean group_size" in refusal("gptq:groupsize=64")


def test_values_of_the_wrong_type_name_what_is_accepted() -> None:
    assert "gptq:bits: 'four' is not a whole number" in refusal("gptq:bits=four")
    assert "gptq:damp: 'nan' is not a number" in refusal("gptq:damp=nan")
    assert "gptq:act_order: 'maybe' is neither true nor false" in refusal("gptq:act_order=maybe")
    assert "'max' is not one of minmax, mse" in refusal("gptq:scale_search=max")
    assert "gptq: bits=5 is no width; use bits=2, 3, 4 or 8" in refusal("gptq:bits=5")


def test_specs_that_do_not_parse() -> None:
    assert "names no pass" in refusal("")
    assert "has an empty entry" in refusal("cle,,gptq")
    assert "'bits' is not of the form option=value" in refusal("gptq:bits")
    assert "bits is given twice" in refusal("gptq:bits=4:bits=3")
    assert "cannot follow gptq; put cle in front" in refusal("gptq,cle")


@pytest.mark.parametrize(
    ("value", "hint"),
    [(True, int), (1.5, int), (1, bool), (3, str), ("x", float), ("inf", float), ({}, tuple[int, ...])],
)
def test_no_type_is_taken_for_another(value: object, hint: object) -> None:
    with pytest.raises(ValueError, match=" is n"):
        convert(value, hint)
