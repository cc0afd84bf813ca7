"""What all weight passes share: the walk over the layers, and putting quantized weights on the graph.

Layers are taken in the graph's order. The calibration batches run through the graph as it is then: whatever stands in
front of a layer is quantized already, weights and activations, so a layer is fitted to the inputs it will really see.
Only one layer's inputs and second moments are held at a time; layers that read the same value share them. Where a pass
asks for the float network's inputs too, a second stream runs the float twin beside the graph.

A layer's weight argument becomes

    get_attr codes, scale, zero_point -> qexport.dequantize [out, in] -> view, transpose to the weight's own shape
"""

import abc
import dataclasses
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx

from passes.affine_grid import ScaleSearch, fit_grid
from passes.asymmetric import cross_of
from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import Stream
from passes.graph import Layer, add_tensor, aten, call_before, find_layers, outputs_of, set_argument, slot, weight_of
from passes.layer_inputs import hessian_of
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weights import AffineWeight

WIDTHS = (2, 3, 4, 8)
HEAD_BITS = 8
"""The output head decides the answer by itself and is small: it is not quantized to less than this unless named."""

RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.contiguous.default,
        aten.clone.default,
        aten.to.dtype,
        aten._to_copy.default,
        FAKE_QUANTIZE,
        FAKE_QUANTIZE_DYNAMIC,
    }
)
"""What may stand between the output head and the graph's output."""


@dataclasses.dataclass(frozen=True)
class WeightPass(Pass):
    """A pass that quantizes weights; the options all of them have.

    bits          2, 3, 4 or 8
    group_size    k: groups of k inputs (a layer with no more than k gets one group); -1: per output channel; 0: per
                  tensor
    symmetric     no zero points
    scale_search  minmax; mse: the range shrunk to the least squared error; hessian: the same, errors counted by their
                  inputs' mean square, where the pass looks at inputs
    embeddings    bits of embedding tables, one scale a row; 0: float

    The output head keeps at least 8 bits, and is then per output channel, unless the recipe sets its bits by name.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_search: ScaleSearch
    embeddings: int

    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)
    needs_hessian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise PassError(f"{self.name}: bits={self.bits} is no width", fix="use bits=2, 3, 4 or 8")
        if self.embeddings not in (0, 4, 8):
            raise PassError(f"{self.name}: embeddings={self.embeddings} is no width", fix="use embeddings=8, 4 or 0")
        if self.group_size < -1:
            raise PassError(f"{self.name}: group_size={self.group_size} is negative", fix="use -1 for per channel")
        if self.scale_search not in get_args(ScaleSearch):
            raise PassError(f"{self.name}: scale_search={self.scale_search} is no search", fix="use minmax or mse")

    @abc.abstractmethod
    def quantize(self, matrix: Tensor, hessian: Tensor | None) -> AffineWeight:
        """Quantize `matrix` [out, in]; `hessian` [groups, in, in] is there when `needs_hessian` says so."""

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: "Walk") -> AffineWeight:
        """Quantize a layer's matrix [out, in]; passes that want more of its inputs than a Hessian ask the walk."""
        return self.quantize(matrix, walk.hessian(layer) if self.needs_hessian else None)

    def requires(self, program: Program) -> None:
        """The target must be able to run the options, and there must be data if the pass looks at any."""
        rules = program.rules
        if not self.symmetric and not rules.weight_zero_point:
            raise PassError(f"target {rules.name} has no weights with zero points", fix=f"{self.name}:symmetric=true")
        kinds = {layer.kind for layer in program.layers() if not program.is_skipped(layer.name)}
        if "embedding" in kinds and self.embeddings:
            self._require("embeddings", self.embeddings, rules.embedding_bits, rules.name)
        widths = [_widths(program, kind) for kind in kinds - {"embedding"}]
        if widths:
            self._require("bits", self.bits, frozenset.union(*widths), rules.name)
        if self.needs_hessian and not program.calibration.batches:
            raise PassError(f"{self.name} needs calibration data", fix="give --calib")

    def _require(self, option: str, bits: int, possible: frozenset[int], target: str) -> None:
        if bits not in possible:
            nearest = min(possible, key=lambda width: (abs(width - bits), width), default=0)
            fix = f"the nearest it can is {self.name}:{option}={nearest}" if nearest else "leave these layers in float"
            raise PassError(f"target {target} cannot run {self.name} with {option}={bits}", fix=fix)

    def run(self, program: Program) -> PassResult:
        """Quantize every layer that can be, in the graph's order."""
        changed, skipped = [], []
        walk = Walk(program)
        stored_bits = weights = 0.0
        layers = program.layers()
        for done, layer in enumerate(layers):
            program.on_step(layer.name, done, len(layers))
            try:
                options = self._for_layer(program, layer)
                reason = options._reason_to_skip(program, layer)
                if reason:
                    skipped.append(Skip(layer.name, reason))
                    continue
                matrix = layer.to_matrix(weight_of(program.graph, layer))
                if layer.kind == "embedding":
                    quantized = options._quantize_table(matrix)
                else:
                    quantized = options.quantize_layer(matrix, layer, walk)
            except PassError as error:
                raise PassError(error.what, node=layer.name, fix=error.fix) from error
            replace_weight(program.graph, layer, quantized)
            changed.append(layer.name)
            stored_bits += quantized.bits_per_weight * matrix.numel()
            weights += matrix.numel()
        measured = {"bits_per_weight": stored_bits / weights} if weights else {}
        return PassResult(tuple(changed), tuple(skipped), measured)

    def _for_layer(self, program: Program, layer: Layer) -> "WeightPass":
        """These options as they hold for one layer.

        Raises PassError when the recipe names the layer and asks for what the target cannot run.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        named = program.options_for(layer.name).items()
        overrides: dict[str, Any] = {key: value for key, value in named if key in fields}
        options = dataclasses.replace(self, **overrides)
        if layer.kind == "embedding":
            return dataclasses.replace(options, embeddings=overrides["bits"]) if "bits" in overrides else options
        if "bits" not in overrides and options.bits < HEAD_BITS and is_head(program.graph, layer):
            options = dataclasses.replace(options, bits=HEAD_BITS, group_size=-1)
        if layer.kind != "linear" and not program.rules.conv_groups and options.group_size > 0:
            options = dataclasses.replace(options, group_size=-1)
        if "bits" in overrides:
            self._require("bits", options.bits, _widths(program, layer.kind), program.rules.name)
        return options

    def _reason_to_skip(self, program: Program, layer: Layer) -> str:
        """Why this layer's weight stays as it is; empty when it does not."""
        if program.is_skipped(layer.name):
            return "left in float by the recipe"
        if layer.weight.op != "get_attr":
            return "its weight is quantized already" if is_quantized(layer) else "its weight is computed in the graph"
        if not weight_of(program.graph, layer).is_floating_point():
            return "its weight is not floating point"
        bits = self.embeddings if layer.kind == "embedding" else self.bits
        if not bits:
            return "embeddings=0 leaves tables in float"
        if bits not in _widths(program, layer.kind):
            return f"{program.rules.name} has no {bits}-bit weights for {layer.kind}"
        return ""

    def _quantize_table(self, table: Tensor) -> AffineWeight:
        """Round an embedding table [rows, dim] with one scale a row."""
        return fit_grid(table, self.embeddings, -1, self.symmetric, self.scale_search).round(table)


class Walk:
    """Moments of layers' inputs as the graph is when their turn comes."""

    def __init__(self, program: Program) -> None:
        self._stream = Stream(program.graph, program.calibration.batches)
        self._floats: Stream | None = None
        self._twins: dict[str, Layer] = {}
        if program.float_twin is not None:
            self._floats = Stream(program.float_twin, program.calibration.batches)
            self._twins = {layer.name: layer for layer in find_layers(program.float_twin)}
        self._reads: list[object] = []
        self._hessian: Tensor | None = None
        self._cross: Tensor | None = None

    def hessian(self, layer: Layer) -> Tensor:
        """Xq^T Xq / n of the layer's input, [groups, in, in]."""
        self._turn_to(layer)
        if self._hessian is None:
            self._hessian = hessian_of(layer, self._stream.values(layer.input))
        return self._hessian

    def cross(self, layer: Layer) -> Tensor:
        """X^T Xq / n, [groups, in, in], X being the layer's input in the float twin, which there must be."""
        self._turn_to(layer)
        if self._cross is None:
            assert self._floats is not None  # the pipeline made a twin in front of the first pass that quantizes
            twin = self._twins[layer.name]
            self._floats.advance(twin.node)
            floats, inputs = self._floats.values(twin.input), self._stream.values(layer.input)
            self._cross = cross_of(layer, floats, inputs)
        return self._cross

    def _turn_to(self, layer: Layer) -> None:
        # What the rows depend on: the value, and for a convolution the kernel and how it moves.
        reads: list[object] = [layer.input, layer.kind]
        if layer.kind != "linear":
            reads += [layer.weight.meta["val"].shape[2:], layer.groups, layer.node.args[3:]]
        if self._reads != reads:
            self._reads, self._hessian, self._cross = reads, None, None  # two layers' moments are never held
            self._stream.advance(layer.node)


def replace_weight(graph: fx.GraphModule, layer: Layer, weight: AffineWeight) -> None:
    """Have the layer read `weight` through qexport.dequantize; its dtype and shape stay."""
    original = weight_of(graph, layer)
    before, name = layer.node, slot(layer)
    codes = add_tensor(graph, f"{name}.weight_codes", weight.codes, before)
    scale = add_tensor(graph, f"{name}.weight_scale", weight.scale.to(original.dtype), before)
    zero_point = None
    if weight.zero_point is not None:
        zero_point = add_tensor(graph, f"{name}.weight_zero_point", weight.zero_point.to(original.dtype), before)
    node = call_before(graph, before, DEQUANTIZE, (codes, scale, zero_point, weight.bits, weight.group_size))
    shape = list(original.shape)
    if layer.kind == "linear" and layer.transposed:
        node = call_before(graph, before, aten.t.default, (node,))
    elif layer.kind == "conv":
        node = call_before(graph, before, aten.view.default, (node, shape))
    elif layer.kind == "conv_transpose":
        per_group = [layer.groups, shape[1], shape[0] // layer.groups, *shape[2:]]
        node = call_before(graph, before, aten.view.default, (node, per_group))
        node = call_before(graph, before, aten.transpose.int, (node, 1, 2))
        node = call_before(graph, before, aten.reshape.default, (node, shape))
    node.meta["val"] = torch.empty(shape, dtype=original.dtype, device="meta")
    set_argument(layer.node, layer.weight_arg, node)


def is_quantized(layer: Layer) -> bool:
    """True when the layer's weight comes from qexport.dequantize."""
    node = layer.weight
    while node.target is not DEQUANTIZE and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.target is DEQUANTIZE


def is_head(graph: fx.GraphModule, layer: Layer) -> bool:
    """True when the graph returns the layer's output, but for reshapes and the quantization of it."""
    ends = set(outputs_of(graph))
    reached = [layer.node]
    for node in reached:
        if node in ends:
            return True
        reached += [user for user in node.users if user.target in RESHAPES]
    return False


def _widths(program: Program, kind: str) -> frozenset[int]:
    """Widths of the weights the target can store for a kind of layer."""
    rules = program.rules
    return {"linear": rules.linear_bits, "embedding": rules.embedding_bits}.get(kind, rules.conv_bits)
