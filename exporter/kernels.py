"""Which kernel of onnxruntime runs each quantized layer, read from the graph that onnxruntime made of the file.

A layer is known in the file by the initializer of its codes, `<layer>.weight_codes`. It is found again in the optimized
graph by what survives fusion (onnxruntime 1.31):

    1. the initializer: QLinearConv, QGemm, MatMulIntegerToFloat and DynamicQuantizeMatMul keep its name, MatMulNBits
       repacks it under its name and a suffix (`..._T`);
    2. the node that multiplies: fused kernels take its name, moved ones with a suffix (`..._token_3`); needed where the
       codes were transposed or decoded while loading, and got a name that tells nothing;
    3. that node's output; a convolution in channel blocks (NCHWc) is called after its output, or that of the activation
       it took in, and `_nchwc`.

A node that reads constants only was not folded while loading: it repeats the same work at every run, for a weight's
DequantizeLinear at a multiple of the layer's own time.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime

CODES = ".weight_codes"
CHANNEL_BLOCKS = "_nchwc"
ACTIVATIONS = frozenset({"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid"})


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A node of a graph; `constants` are those of its inputs that are initializers."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]


def kernels_in(model: onnx.ModelProto) -> tuple[Kernel, ...]:
    """The nodes of a model's main graph in order."""
    overridable = {value.name for value in model.graph.input}
    constants = {tensor.name for tensor in model.graph.initializer} - overridable
    return tuple(
        Kernel(
            op=node.op_type,
            domain=node.domain,
            name=node.name,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            constants=tuple(name for name in node.input if name in constants),
        )
        for node in model.graph.node
    )


def optimized_kernels(artifact: Artifact, runtime: OnnxRuntime | None = None) -> tuple[Kernel, ...]:
    """What `runtime` (default: the CPU as shipped) runs for the artifact. Raises RuntimeFault when it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        (runtime or OnnxRuntime()).write_optimized(artifact, path)
        return kernels_in(onnx.load(path, load_external_data=False))


def kernel_of_layers(
    model: Path, optimized: Sequence[Kernel], layers: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """{layer: kernel}; None where nothing of the layer was found again.

    `layers` is {layer: initializer of its codes}, by default every `<layer>.weight_codes` in the file. A kernel whose
    constants are prepared at every run shows it: "DequantizeLinear+Gemm". Codes used twice name both kernels.
    """
    written = onnx.load(model, load_external_data=False)
    if layers is None:
        names = [tensor.name for tensor in written.graph.initializer if tensor.name.endswith(CODES)]
        layers = {name.removesuffix(CODES): name for name in names}
    before, after = _Graph(kernels_in(written)), _Graph(optimized)
    return {layer: _kernel(codes, layers.values(), before, after) for layer, codes in layers.items()}


def weight_dequantize_left(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Nodes that read constants only: in an optimized graph, work that is repeated at every run."""
    constant: set[str] = set()
    found = []
    for kernel in kernels:
        inputs = [name for name in kernel.inputs if name]
        if inputs and all(name in constant or name in kernel.constants for name in inputs):
            constant.update(kernel.outputs)
            found.append(kernel)
    return tuple(found)


class _Graph:
    """Who reads and who makes a value, of all the kernels of a graph."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = tuple(kernels)
        self._prepares = frozenset(weight_dequantize_left(kernels))
        self._makes = {output: kernel for kernel in self._prepares for output in kernel.outputs}
        self._reads: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            for name in dict.fromkeys(kernel.inputs):
                self._reads.setdefault(name, []).append(kernel)

    def users(self, constant: str) -> Iterator[Kernel]:
        """The nodes that combine a constant with something else, directly or after others prepared it."""
        for kernel in self._reads.get(constant, []):
            if kernel in self._prepares:
                for output in kernel.outputs:
                    yield from self.users(output)
            else:
                yield kernel

    def results(self, kernel: Kernel) -> set[str]:
        """Its outputs, and those of the activations that may be taken into it."""
        readers = [reader for output in kernel.outputs for reader in self._reads.get(output, [])]
        return {*kernel.outputs, *(name for reader in readers if reader.op in ACTIVATIONS for name in reader.outputs)}

    def label(self, kernel: Kernel) -> str:
        """The operators that prepare its constants at every run, and its own."""
        return "+".join(dict.fromkeys([*self._prepared_by(kernel), kernel.op]))

    def _prepared_by(self, kernel: Kernel) -> list[str]:
        makers = [self._makes[name] for name in kernel.inputs if name in self._makes]
        return [op for maker in makers for op in (*self._prepared_by(maker), maker.op)]


def _kernel(codes: str, all_codes: Iterable[str], before: _Graph, after: _Graph) -> str | None:
    others = tuple(name for name in all_codes if name != codes and name.startswith(codes))
    names = {
        name
        for kernel in after.kernels
        for name in kernel.constants
        if (name == codes or name.startswith(f"{codes}_")) and not name.startswith(others)
    }
    found = [kernel for name in sorted(names) for kernel in after.users(name)]
    for origin in before.users(codes):
        blocked = {f"{name}{CHANNEL_BLOCKS}" for name in before.results(origin)}
        if not any(_same(origin, kernel) for kernel in found):
            found += [kernel for kernel in after.kernels if _same(origin, kernel) or kernel.name in blocked]
    return ", ".join(dict.fromkeys(after.label(kernel) for kernel in found)) or None


def _same(origin: Kernel, kernel: Kernel) -> bool:
    if origin.name and (kernel.name == origin.name or kernel.name.startswith(f"{origin.name}_token_")):
        return True
    return any(output in kernel.outputs for output in origin.outputs)
