"""The core types: a Program, the passes that change it, and the pipeline that runs them."""

import abc
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, fx

from passes.cache import Cache
from passes.calibration import Batch, Calibration, cut
from passes.graph import Layer, find_layers, tidy
from passes.memory import Memory
from passes.ranks import Ranks
from passes.weight_nodes import float_copy


class PassError(Exception):
    """A pass cannot do what it was asked; `what` is one line, `node` names the layer, `fix` the way out."""

    def __init__(self, what: str, *, node: str = "", fix: str = "") -> None:
        super().__init__(f"{node}: {what}" if node else what)
        self.what, self.node, self.fix = what, node, fix


@dataclasses.dataclass(frozen=True)
class TargetRules:
    """What a target can run. A backend provides it, the program carries it, passes read it: no pass names a target.

    symmetric_activations  codes are signed with zero point 0
    conv_outputs           a convolution runs on integers only when its output is quantized too
    integer_elementwise    add, concat and average pooling run on integers when all around them is quantized
    quantized_skip         a residual add rides in a convolution's kernel when its other operand is quantized
    integer_kinds          layers that have an integer kernel
    dynamic_activations    per-token ranges computed at run time are possible
    weight_zero_point      weights may have a zero point
    linear_bits, conv_bits, embedding_bits   widths of weights the target can store
    float8                 weights and activations may be 8-bit floats (E4M3)
    conv_groups            convolutions may have group_size > 0 (and still be stored packed)
    """

    name: str
    symmetric_activations: bool
    conv_outputs: bool
    integer_elementwise: bool
    quantized_skip: bool
    dynamic_activations: bool
    weight_zero_point: bool
    integer_kinds: frozenset[str]
    linear_bits: frozenset[int] = frozenset({2, 3, 4, 8})
    conv_bits: frozenset[int] = frozenset({2, 3, 4, 8})
    embedding_bits: frozenset[int] = frozenset({4, 8})
    conv_groups: bool = True
    float8: bool = False

    def strictest(self, other: "TargetRules") -> "TargetRules":
        """Rules under which one program serves both targets."""
        return TargetRules(
            name=f"{self.name}+{other.name}",
            symmetric_activations=self.symmetric_activations or other.symmetric_activations,
            conv_outputs=self.conv_outputs or other.conv_outputs,
            integer_elementwise=self.integer_elementwise or other.integer_elementwise,
            quantized_skip=self.quantized_skip and other.quantized_skip,
            dynamic_activations=self.dynamic_activations and other.dynamic_activations,
            weight_zero_point=self.weight_zero_point and other.weight_zero_point,
            integer_kinds=self.integer_kinds & other.integer_kinds,
            linear_bits=self.linear_bits & other.linear_bits,
            conv_bits=self.conv_bits & other.conv_bits,
            embedding_bits=self.embedding_bits & other.embedding_bits,
            conv_groups=self.conv_groups and other.conv_groups,
            float8=self.float8 and other.float8,
        )


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of a layer's output channels [out]: beta and |gamma| of its folded batch norm."""

    mean: Tensor
    std: Tensor


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Options that a recipe sets for the layers whose name matches `match` (a glob); `skip` leaves them in float."""

    match: str
    skip: bool = False
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


def silent_step(text: str, done: int, total: int) -> None:
    """The default of Program.on_step."""


def silent_part(text: str) -> None:
    """The default of Program.on_part."""


@dataclasses.dataclass
class Program:
    """The one thing that walks: a graph under change, and what passes need to know about it.

    graph          ATen level, flat inputs and outputs, runnable in eager torch after every pass
    reference      the capture as it came, never changed (shares tensors with graph)
    float_twin     the graph just before the first quantizing pass: same layers, all with float weights
    output_names   names of the graph's outputs, in order
    dynamic        {input: {axis: label}} of the axes that stay free
    channel_stats  {layer: ChannelStatistics}, left by fold-bn and kept in step by the passes that rescale channels
    memory         where results and waiting activations are kept
    cache          finished layers of this run and of one that was stopped, if they are kept
    ranks          the processes that work on this program together
    on_step        told (what is next, work done, work in all), in units of its own, by whatever takes long
    on_part        told what a pass is at inside a step that takes long
    """

    graph: fx.GraphModule
    reference: fx.GraphModule
    calibration: Calibration
    rules: TargetRules
    output_names: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    layer_rules: tuple[LayerRule, ...] = ()
    seed: int = 0
    float_twin: fx.GraphModule | None = None
    channel_stats: dict[str, ChannelStatistics] = dataclasses.field(default_factory=dict)
    memory: Memory = dataclasses.field(default_factory=Memory)
    cache: Cache | None = None
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    on_step: Callable[[str, int, int], None] = silent_step
    on_part: Callable[[str], None] = silent_part

    def layers(self) -> list[Layer]:
        """The graph's layers in order."""
        return find_layers(self.graph)

    def is_skipped(self, name: str) -> bool:
        """True when the user wants this layer left in float."""
        return any(rule.skip and fnmatch.fnmatchcase(name, rule.match) for rule in self.layer_rules)

    def in_parts(self, batches: Sequence[Batch], size: int) -> list[Batch]:
        """The batches in parts of at most `size` samples; as they are where the graph takes a fixed number of them."""
        if not all(0 in self.dynamic.get(name, {}) for name in batches[0]):
            return list(batches)
        return [part for batch in batches for part in cut(batch, size)]

    def options_for(self, name: str) -> dict[str, object]:
        """Options the recipe overrides for this layer; later rules win."""
        merged: dict[str, object] = {}
        for rule in self.layer_rules:
            if fnmatch.fnmatchcase(name, rule.match):
                merged.update(rule.options)
        return merged


@dataclasses.dataclass(frozen=True)
class Skip:
    """Why a candidate was left alone."""

    node: str
    why: str


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: names it changed, candidates it left, and figures it measured (in the report under its name)."""

    changed: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    measured: Mapping[str, float | str] = dataclasses.field(default_factory=dict)


class Pass(abc.ABC):
    """One transformation. Subclasses are frozen dataclasses: their fields are their options.

    `prerequisites` names passes that must have run before; the pipeline inserts them. `quantizes` is False for passes
    that leave the float function as it is.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    prerequisites: ClassVar[tuple[str, ...]] = ()
    quantizes: ClassVar[bool] = True

    def requires(self, program: Program) -> None:  # noqa: B027  # a hook: most passes have no precondition
        """Raise PassError when the program cannot take this pass."""

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """Change the program's graph."""

    def ensures(self, program: Program) -> None:  # noqa: B027  # a hook, as above
        """Raise PassError when the result is not what the pass promises."""


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """A pass as it ran."""

    name: str
    options: Mapping[str, object]
    result: PassResult
    inserted: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """A pass in line; `inserted` when it is there as another's prerequisite."""

    work: Pass
    inserted: bool = False


class Pipeline:
    """Passes in order, prerequisites first, one callback after each."""

    def __init__(self, passes: Sequence[Pass], known: Mapping[str, type[Pass]]) -> None:
        self.steps = order(passes, known)

    def run(self, program: Program, before: Callable[[Step], None] | None = None) -> list[PassRecord]:
        """Run every pass; the graph is tidied, checked and recompiled after each."""
        records = []
        for step in self.steps:
            if before is not None:
                before(step)
            work = step.work
            if work.quantizes and program.float_twin is None:
                program.float_twin = float_copy(program.graph)
            work.requires(program)
            result = work.run(program)
            tidy(program.graph)
            work.ensures(program)
            options = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}  # type: ignore[arg-type]  # passes are dataclasses
            records.append(PassRecord(work.name, options, result, step.inserted))
        if program.float_twin is None:
            program.float_twin = float_copy(program.graph)
        return records


def order(passes: Sequence[Pass], known: Mapping[str, type[Pass]]) -> tuple[Step, ...]:
    """Passes with their prerequisites put in front; a float-preserving pass after a quantizing one is an error."""
    steps: list[Step] = []
    for work in passes:
        for name in work.prerequisites:
            if all(step.work.name != name for step in steps):
                steps.append(Step(known[name](), inserted=True))
        steps.append(Step(work))
    quantized = ""
    for step in steps:
        if step.work.quantizes:
            quantized = step.work.name
        elif quantized:
            raise PassError(
                f"pass {step.work.name} works on a float model and cannot follow {quantized}",
                fix=f"put {step.work.name} in front of {quantized}",
            )
    return tuple(steps)
