"""Which models a command compiles: MODEL, the recipe's own, or several."""

from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.jobs import names_a_model, read_jobs


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


SEVERAL = """
passes = "cle,gptaq"
seed = 3
[[models]]
model = "encoder.pt2"
out = "out/encoder"
[[models]]
model = "decoder.pt2"
out = "out/decoder"
passes = "gptq:bits=4"
"""


def test_one_model_of_a_recipe(tmp_path: Path) -> None:
    (job,) = read_jobs(None, {"out": Path("elsewhere")}, recipe(tmp_path, 'model = "net.pt2"\nseed = 3\nout = "out"\n'))
    assert (job.model, job.recipe.seed, job.recipe.out) == (Path("net.pt2"), 3, Path("elsewhere"))


def test_several_models_share_what_stands_above(tmp_path: Path) -> None:
    one, other = read_jobs(None, {"calib_samples": 7}, recipe(tmp_path, SEVERAL))
    assert [str(job.model) for job in (one, other)] == ["encoder.pt2", "decoder.pt2"]
    assert [job.recipe.passes for job in (one, other)] == ["cle,gptaq", "gptq:bits=4"]
    assert [job.recipe.out for job in (one, other)] == [Path("out/encoder"), Path("out/decoder")]
    assert {(job.recipe.seed, job.recipe.calib_samples) for job in (one, other)} == {(3, 7)}


def test_a_model_on_the_command_line_wins(tmp_path: Path) -> None:
    (job,) = read_jobs(Path("mine.pt2"), {}, recipe(tmp_path, SEVERAL))
    assert (job.model, job.recipe.passes) == (Path("mine.pt2"), "cle,gptaq")


def test_pyproject_says_what_to_compile(tmp_path: Path) -> None:
    assert not names_a_model(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.qexport]\nmodel = "net.pt2"\n')
    assert names_a_model(tmp_path)
    (job,) = read_jobs(None, {}, folder=tmp_path)
    assert job.model == Path("net.pt2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 1", "no MODEL"),
        ("model = 3", "model: 3 is not a path"),
        ('model = "a"\n[[models]]\nmodel = "b"', "has both model and"),
        ("models = 3", "models is not a list of tables"),
        ('[[models]]\nout = "a"', "model: None is not a path"),
        ('[[models]]\nmodel = "a"\nsead = 1', "unknown key 'sead'; did you mean seed"),
        ('[[models]]\nmodel = "a"\n[[models]]\nmodel = "b"', "two models are written to out"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_jobs(None, {}, recipe(tmp_path, text))
    assert said in str(caught.value)


def test_one_folder_for_several_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two models are written to all; give each"):
        read_jobs(None, {"out": Path("all")}, recipe(tmp_path, SEVERAL))
