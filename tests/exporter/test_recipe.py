"""The recipe: flags over TOML, everything checked when it is made, and written back as flags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import InputError
from exporter.recipe import DEFAULT_PASSES, NOT_IN_REPORT, Recipe, flag_of, read_recipe
from exporter.recipe_values import InputSpec
from passes.base import LayerRule


def refusal(**fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults() -> None:
    recipe = Recipe()
    assert recipe.passes is None
    assert [work.name for work in recipe.parsed_passes] == ["cle", "gptaq"]
    assert recipe.for_model(quantized=False).passes == DEFAULT_PASSES
    assert recipe.for_model(quantized=True).parsed_passes == ()
    assert Recipe(passes="gptq").for_model(quantized=True).passes == "gptq"
    assert recipe.target == ("onnx",)


def test_lists_and_the_texts_of_flags_are_accepted() -> None:
    recipe = Recipe(
        passes=["cle", {"name": "gptq", "bits": 3}],
        target=["trt", "onnx", "trt"],
        inputs=["x=8x3x32x32", "4,7:int64"],
        dynamic=["x:0", "y:1=time", "y:2"],
        trt_profiles="x=1x2/4x2/8x2",
        trt_arch="sm80,sm89",
        layers=[{"match": "*.fc2", "bits": 8}],
        skip="head*",
        out="folder",
    )
    assert recipe.passes == "cle,gptq:bits=3"
    assert recipe.target == ("trt", "onnx")
    assert recipe.inputs == (InputSpec("x", (8, 3, 32, 32)), InputSpec(None, (4, 7), "int64"))
    assert recipe.dynamic == {"x": {0: "batch"}, "y": {1: "time", 2: "y_2"}}
    assert recipe.trt_profiles == {"x": ((1, 2), (4, 2), (8, 2))}
    assert recipe.trt_arch == ("sm80", "sm89")
    assert recipe.layer_rules == (LayerRule("head*", skip=True), LayerRule("*.fc2", options={"bits": 8}))
    assert recipe.out == Path("folder")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"passes": "gptqq"}, "--passes: unknown pass 'gptqq'; did you mean gptq"),
        ({"target": ["onxx"]}, "--target: 'onxx' is not one of onnx, trt"),
        ({"target": []}, "--target: no target"),
        ({"gates": ["sqnr>=20"]}, "--gate: unknown figure 'sqnr'; did you mean sqnr_db"),
        ({"provider": "gpu"}, "--provider: 'gpu' is not one of cpu, cuda, tensorrt"),
        ({"dtype": "float16"}, "--dtype: target onnx has no float16; give --target trt alone"),
        ({"dtype": "half", "target": "trt"}, "--dtype: 'half' is not one of float32, float16, bfloat16"),
        ({"weights_as": "small"}, "--weights-as: 'small' is not one of auto, fast, compact"),
        ({"layers": [{"match": "*", "weights_as": "x"}]}, "weights_as of '*': 'x' is not one of auto, fast, compact"),
        ({"seed": "zero"}, "--seed: 'zero' is not a whole number"),
        ({"seed": -1}, "--seed: -1 is less than 0"),
        ({"calib_samples": 0}, "--calib-samples: 0 is less than 1"),
        ({"force": "perhaps"}, "--force: 'perhaps' is neither true nor false"),
        ({"inputs": "x=3xx"}, "--input: '3xx' is not a shape"),
        ({"inputs": "x=0x3"}, "--input: a size of 0x3 is less than 1"),
        ({"inputs": "x=3:int3"}, "--input: unknown type 'int3'; known are float32"),
        ({"inputs": ["x=3", "x=4"]}, "--input: x is given twice"),
        ({"inputs": 3}, "--input: 3 is not a list"),
        ({"dynamic": "x"}, "--dynamic: 'x' is not NAME:AXIS[=label]"),
        ({"dynamic": ["x:0", "x:0=n"]}, "--dynamic: axis 0 of x is given twice"),
        ({"trt_profiles": "x=1/2"}, "--trt-profile: 'x' has no three shapes"),
        ({"trt_profiles": "x=2/1/3"}, "--trt-profile: the shapes of x do not grow"),
        ({"layers": [{"bits": 8}]}, "[[layers]]: {'bits': 8} is not a rule for layers"),
        ({"layers": [{"match": "*", "bit": 8}]}, "no pass of the recipe has an option 'bit' (in the rule for '*')"),
        ({"layers": [{"match": "*", "bits": "many"}]}, "bits of '*': 'many' is not a whole number"),
    ],
)
def test_what_is_wrong_is_said_when_the_recipe_is_made(fields: dict[str, Any], said: str) -> None:
    assert said in refusal(**fields)


def test_flags_win_over_toml_and_a_file_over_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.qexport]\nseed = 1\ntarget = "trt"\n')
    assert read_recipe({}, folder=tmp_path) == Recipe(seed=1, target=("trt",))
    flags = {"seed": 0, "target": (), "calib": None, "force": False}  # all but the seed were not given
    assert read_recipe(flags, folder=tmp_path) == Recipe(seed=0, target=("trt",))
    file = tmp_path / "recipe.toml"
    file.write_text('seed = 2\ngate = ["sqnr_db>=20"]\ncalib-samples = 7\n[[layers]]\nmatch = "*.fc2"\nbits = 8\n')
    layers = (LayerRule("*.fc2", options={"bits": 8}),)
    assert read_recipe({}, file, tmp_path) == Recipe(seed=2, gates=("sqnr_db>=20",), calib_samples=7, layers=layers)


def test_without_a_table_of_ours_pyproject_says_nothing(tmp_path: Path) -> None:
    assert read_recipe({}, folder=tmp_path) == Recipe()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\n")
    assert read_recipe({}, folder=tmp_path) == Recipe()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = ", "cannot be read as TOML"),
        ("sead = 1", "unknown key 'sead'; did you mean seed"),
        ("gates = []", "unknown key 'gates'; did you mean gate"),
        ('seed = "a"', "seed: 'a' is not a whole number"),
        ('passes = "nope"', "passes: unknown pass 'nope'"),
        ("trust-model = true", "trust-model is not taken from a file; give --trust-model"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe({}, file)
    assert f"{file}: " in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.toml: cannot be read as TOML: No such file"):
        read_recipe({}, tmp_path / "nothing.toml")


def test_the_json_names_flags_and_no_place_on_the_machine() -> None:
    recipe = Recipe(
        calib="/home/somebody/data.npz",
        out=Path("/home/somebody/out"),
        inputs=(InputSpec("x", (1, 2), "int64"),),
        dynamic={"x": {0: "batch"}},
        layers=(LayerRule("*.fc2", options={"bits": 8}),),
    )
    written = recipe.to_json()
    assert "somebody" not in json.dumps(written)
    assert written["calib"] == "data.npz"
    assert written["input"] == ["x=1x2:int64"]
    assert written["dynamic"] == ["x:0=batch"]
    assert written["layers"] == [{"match": "*.fc2", "bits": 8}]
    flags = {flag_of(field.name)[2:] for field in dataclasses.fields(Recipe) if field.name not in NOT_IN_REPORT}
    assert set(written) == flags


def test_the_json_makes_the_same_recipe_again(tmp_path: Path) -> None:
    recipe = Recipe(
        passes="gptq:bits=4",
        inputs=(InputSpec("x", (1, 2)),),
        dynamic={"x": {0: "n"}},
        trt_profiles={"x": ((1, 2), (2, 2), (3, 2))},
    )
    fields = {"gate": "gates", "input": "inputs", "trt-profile": "trt_profiles"}
    again = {fields.get(key, key.replace("-", "_")): value for key, value in recipe.to_json().items()}
    assert Recipe(**again) == recipe


def test_toml_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("gate = " + "[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as TOML"):
        read_recipe({}, tmp_path / "recipe.toml")
