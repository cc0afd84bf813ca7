"""onnxruntime: what was asked for is what runs, a silent fallback to another provider is a fault.

Left alone, onnxruntime runs on the CPU when CUDA or TensorRT cannot be loaded, and says so in a log line only. Here the
session's own list of providers is compared with what was asked for. Single nodes without a GPU kernel still run on the
CPU: `OnnxRuntime.placement` counts them.
"""

import collections
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from runtimes.base import Array, Artifact, Runtime, RuntimeFault, Session

Provider = Literal["cpu", "cuda", "tensorrt"]

PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""onnxruntime's name of what is asked for, then those that take the nodes it has no kernel for."""

ERRORS_ONLY = 3
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"


class OnnxSession(Session):
    """A session of onnxruntime on the provider that was asked for."""

    def __init__(self, session: Any, artifact: Artifact) -> None:
        self._session = session
        self.inputs, self.outputs = artifact.inputs, artifact.outputs

    @property
    def providers(self) -> tuple[str, ...]:
        """onnxruntime's names of the providers in use, first choice first."""
        return tuple(self._session.get_providers())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self.check(feeds)
        try:
            values = self._session.run(list(self.outputs), dict(feeds))
        except Exception as error:  # onnxruntime's own kinds derive from Exception only
            raise RuntimeFault(f"onnxruntime failed: {error}") from error
        return dict(zip(self.outputs, values, strict=True))


@dataclasses.dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """onnxruntime with its settings.

    provider        where to run
    threads         of one operator; 0 leaves the number to onnxruntime
    optimize        False runs the graph node by node as it stands in the file: the reference for a lowering's parity
    accuracy_level  of block-quantized MatMuls: 4 (onnxruntime's default) rounds the activations of each block to int8,
                    1 computes in float32; None leaves it alone
    """

    provider: Provider = "cpu"
    threads: int = 0
    optimize: bool = True
    accuracy_level: int | None = None

    def load(self, artifact: Artifact) -> OnnxSession:
        """A session on `artifact.model`. Raises RuntimeFault when the provider is missing or the file is refused."""
        return OnnxSession(self._open(artifact, self._options()), artifact)

    def write_optimized(self, artifact: Artifact, path: Path) -> None:
        """Write the graph that onnxruntime runs after its optimizations to `path`, its weights beside it."""
        options = self._options()
        options.optimized_model_filepath = str(path)
        # One protobuf file cannot pass 2 GB; onnxruntime does not split by itself.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
        self._open(artifact, options)

    def placement(self, artifact: Artifact, feeds: Mapping[str, Array]) -> dict[str, int]:
        """How many nodes ran on each provider, {onnxruntime's name: nodes}, from a profile of one run."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = OnnxSession(self._open(artifact, options), artifact)
            session.run(feeds)
            events = json.loads(Path(session._session.end_profiling()).read_text())
        places = {event["name"]: event["args"]["provider"] for event in events if event.get("args", {}).get("provider")}
        return dict(sorted(collections.Counter(places.values()).items()))

    def _options(self) -> Any:
        onnxruntime = _import()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = self.threads
        if not self.optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Every weight is dequantized on the way: when its turn comes, not all at once, and no arena keeps it.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = False
        if self.accuracy_level is not None:
            options.add_session_config_entry(ACCURACY_LEVEL, str(self.accuracy_level))
        return options

    def _open(self, artifact: Artifact, options: Any) -> Any:
        onnxruntime = _import()
        asked = PROVIDERS[self.provider][0]
        if asked not in onnxruntime.get_available_providers():
            raise RuntimeFault(
                f"this onnxruntime has no {asked} (it has {', '.join(onnxruntime.get_available_providers())})",
                fix="pip uninstall onnxruntime, then pip install 'qexport[gpu]'",
            )
        try:
            session = onnxruntime.InferenceSession(
                str(artifact.model), options, providers=list(PROVIDERS[self.provider])
            )
        except Exception as error:  # onnxruntime's own kinds derive from Exception only
            raise RuntimeFault(f"onnxruntime cannot load {artifact.model.name}: {error}") from error
        if session.get_providers()[0] != asked:
            raise RuntimeFault(
                f"{asked} was asked for but could not start; onnxruntime fell back to {session.get_providers()[0]}",
                fix="check the GPU driver and the CUDA, cuDNN and TensorRT libraries (see `qexport doctor`)",
            )
        session.disable_fallback()
        return session


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeFault("onnxruntime is not installed", fix="pip install 'qexport[cpu]'") from error
    return onnxruntime
