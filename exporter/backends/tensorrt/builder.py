"""The child process that talks to TensorRT: parse an ONNX file, build an engine, write down what happened.

TensorRT's parser and builder can kill the process they run in (SIGFPE on a constant integer division by zero, SIGSEGV
on deep graphs), so `build.py` runs this file as a script and reads the result from a file. It needs nothing but the
engine's Python module (and `plugin.py`, for plugins): no torch and nothing else of this package, so it starts fast and
crashes alone.

    builder.py probe MODULE               exit 0 if MODULE can build engines on this machine
    builder.py build REQUEST RESULT       both JSON; RESULT is only written when the builder lived to tell

One code serves both flavors: `tensorrt_rtx` builds ahead of time for named compute capabilities, on any CPU;
`tensorrt` builds for the GPU of this machine and can inspect the finished engine there.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

STACK_BYTES = 512 << 20  # 8 MB, the usual limit, overflows in TensorRT's recursion at about 3000 chained nodes

MEMORY_LINE = re.compile(r"(Total Weights|Max Scratch) Memory: (\d+) bytes")


class Refusal(Exception):
    """TensorRT, or a check made on its behalf, declined the model; the fields go into the result file."""

    def __init__(self, stage: str, reasons: list[str]) -> None:
        super().__init__(stage)
        self.stage = stage
        self.reasons = reasons


def main(argv: list[str]) -> int:
    if argv[1] == "probe":
        return 0 if can_build(argv[2]) else 1
    restart_with_deep_stack(argv)
    request = json.loads(Path(argv[2]).read_text(encoding="utf-8"))
    try:
        result: dict[str, Any] = build(request)
    except Refusal as refusal:
        result = {"refused": {"stage": refusal.stage, "reasons": refusal.reasons}}
    Path(argv[3]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def can_build(module: str) -> bool:
    """The module imports with its shared libraries; full TensorRT also needs a GPU to build on."""
    engine = importlib.import_module(module)
    return hasattr(engine, "Builder") and (module == "tensorrt_rtx" or gpu_count() > 0)


def gpu_count() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def restart_with_deep_stack(argv: list[str]) -> None:
    """Execute this process anew with a large stack: the main thread's and new threads' stacks are sized at start-up."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash drops no file
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, [sys.executable, "-P", *argv])


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build `request["model"]` into `request["engine"]`; the facts about it as plain data, the layer table as text."""
    trt = importlib.import_module(request["module"])
    if request["plugins"]:
        register_plugins(*request["plugins"])
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        raise Refusal("parse", parse_errors(parser) or log.errors)
    if network.num_outputs == 0:  # an empty or foreign file parses "successfully" into an empty network
        raise Refusal("parse", ["the file holds no graph with an output"])

    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer table is empty otherwise
    config.max_aux_streams = 0  # else all weights that a separate kernel dequantizes are in memory at the same time
    if request["arch"]:
        set_architectures(trt, config, request["arch"])
    add_profile(builder, network, config, request["profiles"])
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refusal("build", log.errors or ["the builder returned no engine and gave no reason"])

    data = memoryview(engine)
    Path(request["engine"]).write_bytes(data)
    return {
        "version": trt.__version__,
        "engine_bytes": data.nbytes,
        "sha256": hashlib.sha256(data).hexdigest(),
        "layer_table": log.layer_table or inspect(trt, log, data),
        "weights_bytes": log.memory.get("Total Weights", 0),
        "scratch_bytes": log.memory.get("Max Scratch", 0),
        "warnings": log.warnings,
    }


def register_plugins(folder: str, kernel_sets: dict[str, Any]) -> None:
    """By the file beside this one, loaded as a module of its own: the package's root may be out of reach."""
    spec = importlib.util.spec_from_file_location("qexport_plugin", Path(__file__).with_name("plugin.py"))
    assert spec is not None
    assert spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    plugin.register(Path(folder), kernel_sets)


def make_logger(trt: Any) -> Any:
    """A verbose logger that keeps errors, warnings, memory totals, and the layer table, which only the log has."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is whichever engine was asked for
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.memory: dict[str, int] = {}
            self.layer_table = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity <= trt.ILogger.Severity.WARNING:
                self.warnings.append(message)
            elif message.startswith("Layers:"):
                self.layer_table = message
            elif found := MEMORY_LINE.match(message):
                self.memory[found[1]] = int(found[2])

    return Log()


def parse_errors(parser: Any) -> list[str]:
    """One line per error: the node that was refused, its operator, and the parser's reason."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    where = [f"node {e.node_name()!r} ({e.node_operator()}): " if e.node_operator() else "" for e in errors]
    return [node + error.desc() for node, error in zip(where, errors, strict=True)]


def set_architectures(trt: Any, config: Any, names: list[str]) -> None:
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if unknown := [name for name in names if name not in known]:
        raise Refusal("arch", [f"unknown: {', '.join(unknown)}; this version knows {', '.join(known)}"])
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)


def add_profile(builder: Any, network: Any, config: Any, profiles: dict[str, list[list[int]]]) -> None:
    """One optimization profile for all dynamic inputs, checked here because TensorRT's own message names no input."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    wrong = [f"there is no input {name!r} to give shapes to" for name in profiles if name not in inputs]
    profile = builder.create_optimization_profile()
    for name, dims in inputs.items():
        if name not in profiles:
            if -1 in dims:
                wrong.append(f"input {name!r} has dynamic shape {list(dims)} and no (min, opt, max) shapes are given")
            continue
        low, opt, high = profiles[name]
        if not fits(dims, low, opt, high):
            wrong.append(f"shapes {low}, {opt}, {high} (min, opt, max) do not fit input {name!r} of shape {list(dims)}")
            continue
        profile.set_shape(name, low, opt, high)
    if wrong:
        raise Refusal("profile", wrong)
    if any(-1 in dims for dims in inputs.values()):
        config.add_optimization_profile(profile)


def fits(dims: tuple[int, ...], low: list[int], opt: list[int], high: list[int]) -> bool:
    if not len(dims) == len(low) == len(opt) == len(high):
        return False
    return all(
        (0 < a <= b <= c) if dim == -1 else (a == b == c == dim)
        for dim, a, b, c in zip(dims, low, opt, high, strict=True)
    )


def inspect(trt: Any, log: Any, data: memoryview) -> str:
    """The same table from the finished engine, for a library that does not log it; empty without a GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
