"""The builder's layer table: one engine layer per line, read into `EngineLayer`s.

With detailed profiling verbosity TensorRT logs one message that starts with `Layers:`. A line of it, wrapped here for
reading:

    Name: n_fc1_myl0_1, LayerType: gemm,
    Inputs: [ { Name: x, Dimensions: [4,64], Strides: ..., Datatype: Int8, Format: ... }],
    Constants: [ { Name: w_constantInt8_myl0, Dimensions: [64,48], Strides: ..., Datatype: Int8, Format: ... }, ... ],
    Outputs: [ ... ], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: n_fc1][ONNX Layer: n_fc1_w_dq]

Names come from the model and may hold any of these punctuation marks, so sections are cut at their full separators.
"""

import re
from dataclasses import dataclass

TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\], Strides: .*?, Datatype: (\w+)", re.DOTALL)
SECTION_END = re.compile(r"\], (?=Constants: \[|Outputs: \[|TacticName: )")
NODE = "[ONNX Layer: "
GENERATED_NAME = re.compile(r"^__myl_|_0x[0-9a-f]{32}$|_myl\d+_\d+$")
JIT_PLACEHOLDER = "__myelin_CASK_STUB"  # tensorrt-rtx picks the kernel on the user's GPU


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of the engine: `dtype` is TensorRT's word (Int8, Int4, FP8, Half, Float, ...), -1 a dynamic dim."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of the engine.

    `kind` is gemm, correlation (convolution), deconv, runtime_fusion (fused weight-only matmul), kgen (generated
    elementwise kernel), ...; `nodes` are the ONNX nodes it computes, wholly or in part; `tactic` is the kernel's name,
    empty where it is only chosen on the user's GPU.
    """

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]

    @property
    def kernel(self) -> str:
        """A short name for reports: kind, the fused operations if it is a generated kernel, and the input types."""
        fused = self.tactic or (self.name if self.name.startswith("__myl_") else "")
        types = "+".join(dict.fromkeys(tensor.dtype for tensor in self.inputs))
        words = [self.kind, GENERATED_NAME.sub("", fused), f"({types})" if types else ""]
        return " ".join(word for word in words if word)


def parse_layer_table(text: str) -> tuple[EngineLayer, ...]:
    """The engine's layers in execution order; empty for an empty text (a library that gave no table)."""
    table = text.partition("\nI/O Tensors:")[0]
    return tuple(_layer(line) for line in re.split(r"\n(?=Name: )", table)[1:])


def _layer(line: str) -> EngineLayer:
    tactic = _between(line, ", TacticName: ", ", StreamId: ")
    return EngineLayer(
        name=_between(line, "Name: ", ", LayerType: "),
        kind=_between(line, ", LayerType: ", ", Inputs: ["),
        tactic="" if tactic == JIT_PLACEHOLDER else tactic,
        nodes=tuple(node.strip().removesuffix("]") for node in line.split(NODE)[1:]),
        inputs=_tensors(line, ", Inputs: ["),
        constants=_tensors(line, ", Constants: ["),
    )


def _between(line: str, start: str, end: str) -> str:
    return line.partition(start)[2].partition(end)[0]


def _tensors(line: str, start: str) -> tuple[EngineTensor, ...]:
    section = SECTION_END.split(line.partition(start)[2], maxsplit=1)[0]
    return tuple(
        EngineTensor(name, dtype, tuple(int(dim) for dim in dims.split(",") if dim))
        for name, dims, dtype in TENSOR.findall(section)
    )
