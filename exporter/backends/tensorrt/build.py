"""Build a TensorRT engine from an ONNX file in a child process, so that a crash of the builder is an error message.

The child (`builder.py`) gets a deep stack, writes the engine into a temporary folder beside the final place and its
account of the build into a JSON file there. Only a finished engine is renamed into place; the folder goes in any case.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.backends.tensorrt import builder
from exporter.backends.tensorrt.layer_table import EngineLayer, parse_layer_table

Flavor = Literal["tensorrt", "rtx"]
Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # min, opt, max shape of one input

MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # in the order `auto` prefers them
PROBE_TIMEOUT_S = 120.0  # importing the full library from a cold disk takes tens of seconds
MESSAGE_CHARS = 1000  # TensorRT repeats a cause through its layers; the first sentences hold it

CRASH_CAUSES: dict[int, str] = {
    signal.SIGFPE: "an integer Div or Mod by a constant zero does this",
    signal.SIGSEGV: "very deep graphs and recursive functions do this",
    signal.SIGKILL: "the system ended it, usually for want of memory",
}
REFUSALS = {  # by the stage the child names
    "parse": "TensorRT's parser refuses {model}",
    "arch": "TensorRT cannot build {model} for these architectures",
    "profile": "TensorRT needs shapes that fit the inputs of {model}",
    "build": "TensorRT's builder refuses {model}",
}


class BuildError(Exception):
    """No engine was built; `str()` is one line that says which model, at what stage and why."""


@dataclass(frozen=True)
class EngineBuild:
    """A finished engine and what the builder said about it. Sizes are in bytes, `seconds` is the wall time.

    `weights_bytes` are the constants the engine holds, `scratch_bytes` the largest temporary memory of a kernel.
    `layers` is empty where the library gives no layer table.
    """

    engine: Path
    flavor: Flavor
    version: str
    engine_bytes: int
    sha256: str
    layers: tuple[EngineLayer, ...]
    weights_bytes: int
    scratch_bytes: int
    warnings: tuple[str, ...]
    seconds: float


def available_flavor(requested: Literal["auto", "tensorrt", "rtx"]) -> Flavor | None:
    """The flavor to build with here: the one requested if it works, for `auto` the first that does, else None.

    The engines are imported in child processes only; full TensorRT counts where it also finds a GPU.
    """
    candidates = list(MODULES) if requested == "auto" else [requested]
    return next((flavor for flavor in candidates if _works(MODULES[flavor])), None)


def build_engine(
    model: Path,
    engine: Path,
    flavor: Flavor,
    *,
    arch: Sequence[str] = (),
    profiles: Mapping[str, Profile],
    plugins: tuple[Path, Mapping[str, Any]] | None = None,
    timeout_s: float = 3600.0,
) -> EngineBuild:
    """Build `model` (ONNX, external data beside it) into the file `engine`; replaces an engine that is there.

    `arch` names GPU architectures (`sm80`, `sm89`) for the rtx flavor; none means each from Ampere on that supports the
    model's types. `profiles` gives the (min, opt, max) shapes of every input that has a dynamic dimension.
    `plugins` are a bundle's folder and its kernel sets, for full TensorRT.
    Raises BuildError when the builder refuses, crashes or takes longer than `timeout_s` seconds, and OSError when the
    folder of `engine` cannot be written; neither leaves a file behind.
    """
    if arch and flavor == "tensorrt":
        raise BuildError(f"{model.name}: architectures are for rtx; full TensorRT builds for the GPU of this machine")
    with tempfile.TemporaryDirectory(prefix=".engine-", dir=engine.parent) as folder:
        unfinished = Path(folder, "engine")
        request = {
            "module": MODULES[flavor],
            "model": str(model),
            "engine": str(unfinished),
            "arch": list(arch),
            "plugins": None if plugins is None else [str(plugins[0]), plugins[1]],
            "profiles": {name: [list(shape) for shape in shapes] for name, shapes in profiles.items()},
        }
        started = time.monotonic()
        result = _run_builder(model.name, request, Path(folder), timeout_s)
        seconds = time.monotonic() - started
        unfinished.replace(engine)
    return EngineBuild(
        engine=engine,
        flavor=flavor,
        version=result["version"],
        engine_bytes=result["engine_bytes"],
        sha256=result["sha256"],
        layers=parse_layer_table(result["layer_table"]),
        weights_bytes=result["weights_bytes"],
        scratch_bytes=result["scratch_bytes"],
        warnings=tuple(result["warnings"]),
        seconds=seconds,
    )


def _works(module: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    try:
        return subprocess.run(_command("probe", module), capture_output=True, timeout=PROBE_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _command(*arguments: str) -> list[str]:
    """The child runs as a file, with `-P`: neither this package nor a module in the user's folder is imported by it."""
    return [sys.executable, "-P", builder.__file__, *arguments]


def _run_builder(model: str, request: dict[str, Any], folder: Path, timeout_s: float) -> dict[str, Any]:
    asked, answered, complaints = folder / "request.json", folder / "result.json", folder / "stderr"
    asked.write_text(json.dumps(request), encoding="utf-8")
    with complaints.open("wb") as stderr:
        try:
            child = subprocess.run(
                _command("build", str(asked), str(answered)), stdout=stderr, stderr=stderr, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise BuildError(f"TensorRT's builder did not finish {model} in {timeout_s:g} s") from None
    last_words = complaints.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if child.returncode < 0:
        raise BuildError(_crash(model, -child.returncode, last_words))
    if child.returncode > 0:
        raise BuildError(_line(f"TensorRT's builder failed on {model}: {last_words}"))
    result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if refused := result.get("refused"):
        reasons = "; ".join(dict.fromkeys(refused["reasons"]))
        raise BuildError(_line(f"{REFUSALS[refused['stage']].format(model=model)}: {reasons}"))
    return result


def _crash(model: str, number: int, last_words: str) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    cause = CRASH_CAUSES.get(number) or last_words or "it gave no reason"
    return _line(f"TensorRT's builder crashed ({name}) on {model}; {cause}")


def _line(message: str) -> str:
    words = " ".join(message.split())
    return words if len(words) <= MESSAGE_CHARS else words[: MESSAGE_CHARS - 3] + "..."
