"""In a pipeline: action.yml and the GitLab template run as they stand, nothing is done twice, scripts read JSON."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import exporter.compile
from exporter.cli import run

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = {"timings.json", "report.html"}
"""What shows how long a run took."""

pytestmark = pytest.mark.ort


class Small(nn.Module):
    """Sums that torch splits between threads: linear layers, and a 1x1 convolution at 8 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pointwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1)
        self.first, self.second = nn.Linear(1152, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] -> [N, 4]."""
        value = torch.relu(self.pointwise(torch.relu(self.conv(x))))
        value = self.second(torch.relu(self.first(value.flatten(1))))
        return value


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: model.pt2, data.npz, pyproject.toml, and `qexport` and `python` under bin."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Small().eval(), (), {"x": torch.randn(4, 3, 8, 8)}, dynamic_shapes=batch)
    torch.export.save(program, folder / "model.pt2")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32))
    (folder / "pyproject.toml").write_text('[tool.qexport]\nmodel = "model.pt2"\ncalib = "data.npz"\nthreads = 1\n')
    (folder / "bin").mkdir()
    for name, command in (("qexport", f'{sys.executable} -m exporter.cli "$@"'), ("python", f'{sys.executable} "$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / "bin" / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture(scope="module")
def out(here: Path) -> Path:
    """What `qexport` without a word makes of the project."""
    before = Path.cwd()
    os.chdir(here)
    try:
        assert run([]) == 0
    finally:
        os.chdir(before)
    return here / "out"


def in_project(here: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{here / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}


# ---- nothing is done twice -----------------------------------------------------------------------------------------


def test_what_is_up_to_date_is_kept(
    here: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["key"]
    with monkeypatch.context() as patched:
        patched.setattr(exporter.compile, "load_model", None)  # loading would fail
        assert run(["--reuse", "--threads", "2"]) == 0
        assert "up to date, nothing was done: out" in capsys.readouterr().out
    before = (out / "report.json").read_bytes()
    assert run(["--reuse", "--gate", "sqnr_db>=200"]) == 3  # another recipe: made again
    assert (out / "report.json").read_bytes() != before
    capsys.readouterr()
    assert run(["--reuse", "--gate", "sqnr_db>=200", "--json"]) == 3  # up to date, and the gate still fails
    (entry,) = json.loads(capsys.readouterr().out)["models"]
    assert (entry["reused"], entry["exit_code"]) == (True, 3)
    assert entry["messages"][0].startswith("gate failed: sqnr_db>=200")
    (out / "model.onnx").write_bytes(b"damaged")
    assert run(["--reuse", "--quiet"]) == 0
    assert (out / "report.json").read_bytes() == before


def test_without_reuse_a_folder_stays(here: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    assert run([]) == 2


def test_one_and_two_threads_write_the_same_bytes(
    here: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))  # another number than that of `out`
    try:
        assert run(["--threads", "2", "--out", str(tmp_path / "two"), "--quiet"]) == 0
    finally:
        torch.set_num_threads(before)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").rglob("*")}
    for name in sorted(names - TIMINGS):
        assert (tmp_path / "two" / name).read_bytes() == (out / name).read_bytes(), name


# ---- for scripts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["inspect", "out"], {"files", "key", "report"}),
        (["diff", "out", "out"], {"outputs", "layers", "gates"}),
        (["bench", "out", "--rounds", "3", "--batch", "1"], {"timings", "runtime", "threads", "rounds"}),
    ],
)
def test_commands_on_an_output_print_json(
    here: Path,
    out: Path,
    words: list[str],
    keys: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(here)
    assert run([*words, "--json"]) == 0
    assert keys <= json.loads(capsys.readouterr().out).keys()


def test_passes_and_doctor_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes", "gptq", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "gptq"
    assert {"bits": "4", "group_size": "128"}.items() <= {
        entry["name"]: entry["default"] for entry in found["options"]
    }.items()
    assert run(["passes", "--json"]) == 0
    assert {"cle", "gptaq"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert run(["doctor", "--json"]) == 0
    assert {"torch", "onnxruntime"} <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("", {"diff", "inspect", "passes", "doctor", "build", "bench"}),
        ("model.pt2 --pas", {"--passes"}),
        ("bench --thr", {"--threads"}),
    ],
)
def test_a_shell_completes_words(here: Path, words: str, offered: set[str]) -> None:
    line = f"qexport {words}"
    variables = {"_QEXPORT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(
        ["qexport"], cwd=here, env=in_project(here, **variables), capture_output=True, encoding="utf-8"
    )
    assert offered <= {entry.partition(",")[2] for entry in done.stdout.splitlines()}, done.stderr


def test_a_log_holds_plain_lines(here: Path, out: Path) -> None:
    done = subprocess.run(
        ["qexport", "--reuse", "--out", "log"], cwd=here, env=in_project(here), capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0
    assert not re.search("[\x00-\x08\x0b-\x1f]", done.stdout + done.stderr)


# ---- action.yml ----------------------------------------------------------------------------------------------------


ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: dict[str, Any] = {step["name"]: step for step in ACTION["runs"]["steps"]}


def run_step(
    name: str, here: Path, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> tuple[int, dict[str, str]]:
    """A step's shell as GitHub runs it: its exit code and outputs. `outputs` are those of earlier steps, `id.name`."""
    step = STEPS[name]
    assert step["shell"] == "bash"
    assert "${{" not in step["run"], "what a user gives must reach a shell as a variable, never as a part of it"
    values = {f"inputs.{key}": inputs.get(key, entry["default"]) for key, entry in ACTION["inputs"].items()}
    values |= {f"steps.{key.replace('.', '.outputs.')}": value for key, value in outputs.items()}
    environment = {
        key: re.sub(r"\$\{\{ (.*?) \}\}", lambda match: values.get(match[1], ""), text)
        for key, text in step.get("env", {}).items()
    }
    temporary = here / "runner"
    temporary.mkdir(exist_ok=True)
    output = temporary / "output"
    output.write_text("")
    environment |= {"RUNNER_TEMP": str(temporary), "GITHUB_OUTPUT": str(output)}
    environment |= {"GITHUB_STEP_SUMMARY": str(temporary / "summary.md")}
    script = temporary / "step.sh"
    script.write_text(step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(command, cwd=here, env=in_project(here, **environment), capture_output=True, encoding="utf-8")
    found = dict(line.split("=", 1) for line in output.read_text(encoding="utf-8").splitlines())
    return done.returncode, {**outputs, **{f"{step.get('id', name)}.{key}": value for key, value in found.items()}}


def test_the_action_compiles_compares_and_gates(here: Path, out: Path) -> None:
    shutil.rmtree(here / "runner", ignore_errors=True)
    inputs = {
        "model": "model.pt2",
        "options": "--calib 'data.npz' --gate 'sqnr_db>=200' --skip '*$(touch broken)'",
        "out": "built",
        "baseline": "out",
        "diff-gates": "sqnr_db.drop<=100\nsize_ratio.drop<=100\n",
    }
    code, outputs = run_step("compile", here, inputs, {})
    assert (code, outputs) == (0, {"compile.exit-code": "3", "compile.reused": "false"})
    assert not (here / "broken").exists()
    code, again = run_step("compile", here, inputs, {})
    assert (code, again["compile.reused"]) == (0, "true")
    assert "1 of 1 gate failed" in (here / "runner" / "summary.md").read_text(encoding="utf-8")
    code, outputs = run_step("compare", here, inputs, outputs)
    assert code == 0
    comment = (here / "runner" / "qexport.md").read_text(encoding="utf-8")
    assert "1 of 1 gate failed" in comment
    assert run_step("gate", here, inputs, outputs)[0] == 3
    assert run_step("gate", here, inputs, {"compile.exit-code": "0"})[0] == 0
    assert run_step("gate", here, inputs, {"compile.exit-code": "0", "compare.exit-code": "3"})[0] == 3


def test_the_action_stops_at_bad_input(here: Path) -> None:
    code, outputs = run_step("compile", here, {"model": "nothing.pt2"}, {})
    assert (code, outputs) == (2, {"compile.exit-code": "2"})


def test_every_step_runs_when_it_should() -> None:
    steps = list(STEPS)
    assert steps.index("compile") < steps.index("comment") < steps.index("gate") == len(steps) - 1
    ids = {step["id"] for step in STEPS.values() if "id" in step}
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"steps\.([\w-]+)\.outputs", text)) <= ids
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(ACTION["inputs"])


# ---- the GitLab template -------------------------------------------------------------------------------------------


def test_the_gitlab_job_fails_with_its_gate_and_keeps_reports(here: Path, out: Path) -> None:
    job = yaml.safe_load((ROOT / "ci" / "qexport.gitlab-ci.yml").read_text(encoding="utf-8"))[".qexport"]
    assert job["artifacts"]["when"] == "always"
    given = {"QEXPORT_INSTALL": "none", "QEXPORT_OPTIONS": "--gate sqnr_db>=200", "QEXPORT_OUT": "gitlab"}
    script = "\n".join(["set -e", *job["before_script"], *job["script"]])

    def run_job(**changed: str) -> int:
        variables = {**job["variables"], **given, **changed}
        return subprocess.run(["sh", "-c", script], cwd=here, env=in_project(here, **variables)).returncode

    assert run_job() == 3
    assert (here / "gitlab" / "junit.xml").is_file()
    assert run_job(QEXPORT_OPTIONS="", QEXPORT_BASELINE="out", QEXPORT_DIFF_GATES="sqnr_db.drop<=1") == 0
    assert (here / "gitlab-diff.md").is_file()
