"""What all weight passes share: the walk over the layers, and options of those whose weights lie on a grid.

Layers are taken in the graph's order. The calibration batches run through the graph as it is then: whatever stands in
front of a layer is quantized already, weights and activations, so a layer is fitted to the inputs it will really see
(passes.walk). A layer's new weight goes on the graph as passes.weight_nodes says.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, get_args

from torch import Tensor, fx

from passes.affine_grid import ScaleSearch, fit_grid
from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.cache import first_key, next_key
from passes.device import to_cpu
from passes.graph import Layer, aten, outputs_of, weight_of
from passes.memory import release
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.siblings import shared_out, siblings_of
from passes.walk import Walk
from passes.weight_nodes import write_weight
from passes.weights import QuantWeight

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
    """A pass that quantizes weights.

    embeddings    bits of embedding tables, one scale a row; 0: float
    """

    embeddings: int

    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)
    needs_data: ClassVar[bool] = False
    shares_outputs: ClassVar[bool] = False
    """The ranks work on one layer together; where they do not, they take layers that read one value in turns."""

    def __post_init__(self) -> None:
        if self.embeddings not in (0, 4, 8):
            raise PassError(f"{self.name}: embeddings={self.embeddings} is no width", fix="use embeddings=8, 4 or 0")

    @abc.abstractmethod
    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> QuantWeight:
        """Quantize a layer's matrix [out, in]; the walk has statistics of its inputs."""

    def quantize_table(self, table: Tensor) -> QuantWeight:
        """Round an embedding table [rows, dim] with one scale a row."""
        return fit_grid(table, self.embeddings, -1, True, "minmax").round(table)

    def requires(self, program: Program) -> None:
        """The target must be able to store the tables, and there must be data if the pass looks at any."""
        if any(layer.kind == "embedding" for layer in self._wanted(program)) and self.embeddings:
            self.require_width(program, "embeddings", self.embeddings, "embedding")
        if self.needs_data and not program.calibration.batches:
            raise PassError(f"{self.name} needs calibration data", fix="give --calib")

    def require_width(self, program: Program, option: str, bits: int, *kinds: str) -> None:
        """Raise PassError when the target stores no weights of `bits` for any of these kinds of layer."""
        possible = frozenset.union(*(widths(program, kind) for kind in kinds))
        if bits not in possible:
            nearest = min(possible, key=lambda width: (abs(width - bits), width), default=0)
            fix = f"the nearest it can is {self.name}:{option}={nearest}" if nearest else "leave these layers in float"
            raise PassError(f"target {program.rules.name} cannot run {self.name} with {option}={bits}", fix=fix)

    def run(self, program: Program) -> PassResult:
        """Quantize every layer that can be, in the graph's order."""
        changed, skipped = [], []
        walk = Walk(program)
        stored_bits = weights = 0.0
        layers = program.layers()
        left, done = sum(map(_cost, layers)), 0  # what comes from the cache takes no time, and counts for nothing
        key = self._first_key(program)
        for siblings in siblings_of(layers):
            walk.enter(siblings)
            turns = []
            for layer in siblings:
                with _named(layer):
                    work = self.for_layer(program, layer)
                    reason = work.reason_to_skip(program, layer)
                if reason:
                    skipped.append(Skip(layer.name, reason))
                    left -= _cost(layer)
                    continue
                key = next_key(key, layer.name, work)
                turns.append(_Turn(layer, work, key, self._kept(program, key, layer)))
            divided: dict[str, QuantWeight] = {}
            for turn in turns:
                layer, quantized = turn.layer, turn.kept
                program.on_step(layer.name, done, done + left)
                if turn is turns[0]:
                    divided = _divided(program, [turn for turn in turns if turn.kept is None], walk)
                left -= _cost(layer)
                if quantized is None:
                    quantized = divided.get(layer.name) or turn.quantized(program, walk)
                    if program.cache is not None and program.ranks.is_first:
                        program.cache.put(turn.key, quantized)
                    walk.finished(turn.key)
                    done += _cost(layer)
                else:
                    walk.passed(turn.key)
                weight = weight_of(program.graph, layer)
                release([weight])
                write_weight(program.graph, layer, quantized, program.memory)
                changed.append(layer.name)
                stored_bits += quantized.bits_per_weight * weight.numel()
                weights += weight.numel()
        measured = {"bits_per_weight": stored_bits / weights} if weights else {}
        return PassResult(tuple(changed), tuple(skipped), measured)

    def _first_key(self, program: Program) -> str:
        """The first rank's, which reads all weights for it; empty without a cache."""
        key = ""
        if program.cache is not None and program.ranks.is_first:
            graphs = [program.graph, *([] if program.float_twin is None else [program.float_twin])]
            what = (program.cache.versions, self, program.seed, program.ranks.device.type)
            key = first_key(what, graphs, program.calibration.batches)
        return program.ranks.from_first(key)

    def _kept(self, program: Program, key: str, layer: Layer) -> QuantWeight | None:
        """What the first rank's cache has of the layer."""
        kept = None
        if program.cache is not None and program.ranks.is_first:
            kept = program.cache.get(key, layer.name)
        return program.ranks.from_first(kept)

    def _quantized(self, matrix: Tensor, layer: Layer, walk: Walk) -> QuantWeight:
        return self.quantize_table(matrix) if layer.kind == "embedding" else self.quantize_layer(matrix, layer, walk)

    def for_layer(self, program: Program, layer: Layer) -> "WeightPass":
        """The pass as it holds for one layer: the recipe's options for it taken in.

        Raises PassError when the recipe names the layer and asks for what the target cannot run.
        """
        return dataclasses.replace(self, **self.overrides(program, layer))

    def overrides(self, program: Program, layer: Layer) -> dict[str, Any]:
        """This pass's options that the recipe sets for the layer."""
        fields = {field.name for field in dataclasses.fields(self)}
        return {key: value for key, value in program.options_for(layer.name).items() if key in fields}

    def reason_to_skip(self, program: Program, layer: Layer) -> str:
        """Why this layer's weight stays as it is; empty when it does not."""
        if program.is_skipped(layer.name):
            return "left in float by the recipe"
        if layer.weight.op != "get_attr":
            return "its weight is quantized already"
        if not weight_of(program.graph, layer).is_floating_point():
            return "its weight is not floating point"
        if layer.kind == "embedding" and not self.embeddings:
            return "embeddings=0 leaves tables in float"
        return ""

    def _wanted(self, program: Program) -> list[Layer]:
        return [layer for layer in program.layers() if not program.is_skipped(layer.name)]


@dataclasses.dataclass(frozen=True)
class CodePass(WeightPass):
    """A weight pass whose codes are of some width and share scales in groups.

    bits          width of the codes
    group_size    k: groups of k inputs (a layer with no more than k gets one group); -1: per output channel; 0: per
                  tensor

    The output head keeps at least 8 bits, and is then per output channel, unless the recipe sets its bits by name.
    """

    bits: int
    group_size: int

    def requires(self, program: Program) -> None:
        """The target must have the width."""
        super().requires(program)
        kinds = {layer.kind for layer in self._wanted(program)} - {"embedding"}
        if kinds:
            self.require_width(program, "bits", self.bits, *kinds)

    def for_layer(self, program: Program, layer: Layer) -> Self:
        """Besides the recipe's options: the head's width, and no groups where the target has none."""
        overrides = self.overrides(program, layer)
        options = dataclasses.replace(self, **overrides)
        if layer.kind == "embedding":
            return dataclasses.replace(options, embeddings=overrides["bits"]) if "bits" in overrides else options
        if "bits" not in overrides and options.bits < HEAD_BITS and is_head(program.graph, layer):
            options = dataclasses.replace(options, bits=HEAD_BITS, **self.per_channel)
        if layer.kind != "linear" and not program.rules.conv_groups and options.group_size > 0:
            options = dataclasses.replace(options, **self.per_channel)
        if "bits" in overrides:
            self.require_width(program, "bits", options.bits, layer.kind)
        return options

    @property
    def per_channel(self) -> dict[str, Any]:
        """The options of one scale for each output channel."""
        return {"group_size": -1}

    def reason_to_skip(self, program: Program, layer: Layer) -> str:
        """Besides what holds for every weight pass: the target must have the width."""
        reason = super().reason_to_skip(program, layer)
        bits = self.embeddings if layer.kind == "embedding" else self.bits
        if reason or bits in widths(program, layer.kind):
            return reason
        return f"{program.rules.name} has no {bits}-bit weights for {layer.kind}"


@dataclasses.dataclass(frozen=True)
class GridPass(CodePass):
    """A weight pass whose codes count steps of a grid; the options all of these have, besides those of CodePass.

    bits          2, 3, 4 or 8
    symmetric     no zero points
    scale_search  minmax; mse: the range shrunk to the least squared error; hessian: the same, errors counted by what
                  they cost in the layer's output, where the pass looks at inputs
    """

    symmetric: bool
    scale_search: ScaleSearch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in WIDTHS:
            raise PassError(f"{self.name}: bits={self.bits} is no width", fix="use bits=2, 3, 4 or 8")
        if self.group_size < -1:
            raise PassError(f"{self.name}: group_size={self.group_size} is negative", fix="use -1 for per channel")
        if self.scale_search not in get_args(ScaleSearch):
            raise PassError(f"{self.name}: scale_search={self.scale_search} is no search", fix="use minmax or mse")

    def requires(self, program: Program) -> None:
        """The target must have zero points, if these are wanted."""
        super().requires(program)
        if not self.symmetric and not program.rules.weight_zero_point:
            raise PassError(
                f"target {program.rules.name} has no weights with zero points", fix=f"{self.name}:symmetric=true"
            )

    def quantize_table(self, table: Tensor) -> QuantWeight:
        """On the pass's own grid."""
        return fit_grid(table, self.embeddings, -1, self.symmetric, self.scale_search).round(table)


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A layer whose weight is wanted, the pass as it holds for it, and what the cache has under its key."""

    layer: Layer
    work: WeightPass
    key: str
    kept: QuantWeight | None

    def quantized(self, program: Program, walk: Walk) -> QuantWeight:
        """The layer's weight, quantized on the rank's device."""
        matrix = self.layer.to_matrix(weight_of(program.graph, self.layer))
        with _named(self.layer):
            return to_cpu(self.work._quantized(matrix.to(program.ranks.device), self.layer, walk))


def _divided(program: Program, turns: Sequence[_Turn], walk: Walk) -> dict[str, QuantWeight]:
    """{layer: weight} of siblings, where each rank quantizes whole ones; empty where they are not to be divided.

    Every rank must have one, under the same options: so all ask the walk for the same sums, which they make together.
    """
    ranks = program.ranks
    alike = all(turn.work == turns[0].work for turn in turns)
    if ranks.world == 1 or len(turns) < ranks.world or not alike or turns[0].work.shares_outputs:
        return {}
    mine = shared_out([_cost(turn.layer) for turn in turns], ranks.world)
    own = {
        turn.layer.name: turn.quantized(program, walk)
        for turn, rank in zip(turns, mine, strict=True)
        if rank == ranks.rank
    }
    return {name: weight for theirs in ranks.gather(own) for name, weight in theirs.items()}


@contextlib.contextmanager
def _named(layer: Layer) -> Iterator[None]:
    """Faults of a layer say its name."""
    try:
        yield
    except PassError as error:
        raise PassError(error.what, node=layer.name, fix=error.fix) from error


def _cost(layer: Layer) -> int:
    """What the time that a layer takes goes by: its weights; a table takes next to none."""
    return 0 if layer.kind == "embedding" else int(layer.weight.meta["val"].numel())


def is_head(graph: fx.GraphModule, layer: Layer) -> bool:
    """True when the graph returns the layer's output, but for reshapes and the quantization of it."""
    ends = set(outputs_of(graph))
    reached = [layer.node]
    for node in reached:
        if node in ends:
            return True
        reached += [user for user in node.users if user.target in RESHAPES]
    return False


def widths(program: Program, kind: str) -> frozenset[int]:
    """Widths of the weights the target can store for a kind of layer."""
    rules = program.rules
    return {"linear": rules.linear_bits, "embedding": rules.embedding_bits}.get(kind, rules.conv_bits)
