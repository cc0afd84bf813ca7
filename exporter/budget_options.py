"""What each layer may be stored as, how many bytes that takes and how much noise it puts on the output.

For every width the recipe's own passes quantize the network once, with that width in all layers; the lowered file says
the bytes of each, and each layer's quantized weight then runs alone in the float twin on calibration samples:

    noise = noise energy / signal energy of the worst output
"""

import dataclasses
import glob
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from exporter.backends.base import LoweringError
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.budget_terms import FLAG
from exporter.errors import InputError
from exporter.output import file_sizes
from exporter.recipe import Recipe
from exporter.sensitivity import Compute, WorstOutput, noise_alone, quantized_layers, run_all, run_from
from exporter.validate import LAYER_BATCH
from passes.adapter_nodes import adapted_layers
from passes.base import LayerRule, PassError, Program
from passes.calibration import Batch
from passes.graph import Layer, find_layers, get_tensor
from passes.weight_pass import WeightPass, widths

FLOAT = "float"
WIDTHS = (8, 4, 3)
GROUP_SIZE = 128
"""Of linear weights below 8 bits where the recipe has one scale a channel: in groups they are stored packed."""

SAMPLES = 32
"""Calibration samples that noise is measured on."""

Quantize = Callable[[Recipe], Program]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to store a layer. `compute` gives its output in the float twin, None: in float.

    stored  bytes of the weight
    nodes   bytes of what decodes it, beyond what 8 bits take
    """

    name: str
    stored: float
    noise: float
    rule: LayerRule
    compute: Compute | None = None
    nodes: float = 0.0

    @property
    def size(self) -> float:
        """Bytes in the file."""
        return self.stored + self.nodes


@dataclasses.dataclass(frozen=True)
class Options:
    """{layer: {option: Option}}, float first, of the layers that may be chosen for.

    program   quantized as the recipe says without a budget; its float twin is what `compute` is for
    overhead  bytes of the file besides these layers' weights
    """

    program: Program
    layers: Mapping[str, Mapping[str, Option]]
    overhead: float

    def ratio(self, assignment: Mapping[str, str]) -> float:
        """The predicted size of the file, over the bytes of the float parameters."""
        stored = sum(options[assignment[name]].size for name, options in self.layers.items())
        return (self.overhead + stored) / float_bytes(self.program)

    def rules(self, assignment: Mapping[str, str]) -> tuple[LayerRule, ...]:
        """The rules that make an assignment, in the graph's order."""
        return tuple(options[assignment[name]].rule for name, options in self.layers.items())


def with_rules(recipe: Recipe, rules: Iterable[LayerRule]) -> Recipe:
    """The recipe with rules in front of its own, which win."""
    return dataclasses.replace(recipe, layers=(*rules, *recipe.layers))


def float_bytes(program: Program) -> int:
    """Bytes of the model's floating-point parameters."""
    return sum(value.nbytes for value in program.reference.buffers() if value.dtype.is_floating_point)


def measure_options(recipe: Recipe, quantize: Quantize, progress: Progress) -> Options:
    """The options of every layer that the recipe neither skips nor gives bits. Raises InputError when there is none."""
    work = next((work for work in recipe.parsed_passes if isinstance(work, WeightPass) and hasattr(work, "bits")), None)
    if work is None:
        raise InputError("no pass of the recipe quantizes weights to chosen bits", where=FLAG, fix="add gptq")
    grouped = getattr(work, "group_size", 0) > 0
    base = quantize(recipe)
    twin = base.float_twin or base.graph
    twins = {layer.name: layer for layer in find_layers(twin)}
    free = [layer for layer in twins.values() if not _is_pinned(layer.name, recipe)]
    found: dict[str, dict[str, Option]] = {}
    overhead = plain = 0.0
    for done, width in enumerate(WIDTHS):
        progress("sensitivity by width", done, len(WIDTHS))
        able = [layer for layer in free if width in widths(base, layer.kind)]
        tried = [None] if grouped or width == max(WIDTHS) else [GROUP_SIZE, None]
        made = _first_that_works([_rules(able, width, group_size) for group_size in tried], recipe, quantize)
        if made is None:
            continue
        program, rules, stored, written = made
        bits = {name: value for name, value in stored.items() if name in twins}  # adapters' own layers are what is left
        quantized = quantized_layers(program)
        ends = {name: layer.node for name, layer in quantized.items()} | adapted_layers(program.graph)
        computes = {
            name: noise_alone(program, quantized[name], twins[name], ends[name])[1] for name in rules if name in bits
        }
        noises = _noises(base, twins, computes)
        weights = {name: bits[name] * get_tensor(twin, twins[name].weight).numel() / 8 for name in bits}
        rest = written - sum(weights.values())
        if not found:
            plain, overhead = rest, written - sum(weights[name] for name in computes)
        nodes = (rest - plain) / max(1, len(computes))
        for name, compute in computes.items():
            weight = get_tensor(twin, twins[name].weight)
            in_float = Option(FLOAT, float(weight.nbytes), 0.0, LayerRule(glob.escape(name), skip=True))
            option = Option(str(width), weights[name], noises[name], rules[name], compute, nodes)
            found.setdefault(name, {FLOAT: in_float})[str(width)] = option
    if not found:
        raise InputError("there is no layer to choose bits for", where=FLAG, fix="see --skip and [[layers]]")
    return Options(base, {layer.name: found[layer.name] for layer in free if layer.name in found}, overhead)


def _is_pinned(name: str, recipe: Recipe) -> bool:
    """True when the user's own rules say how the layer is stored."""
    return any(
        fnmatchcase(name, rule.match)
        for rule in recipe.layer_rules
        if rule.skip or {"bits", "embeddings"} & {*rule.options}
    )


def _rules(layers: Sequence[Layer], width: int, group_size: int | None) -> dict[str, LayerRule]:
    """{layer: the rule that stores it in `width` bits}; groups are for linear layers."""
    rules = {}
    for layer in layers:
        groups = {"group_size": group_size} if group_size is not None and layer.kind == "linear" else {}
        rules[layer.name] = LayerRule(glob.escape(layer.name), options={"bits": width, **groups})
    return rules


def _first_that_works(
    candidates: Sequence[Mapping[str, LayerRule]], recipe: Recipe, quantize: Quantize
) -> tuple[Program, Mapping[str, LayerRule], dict[str, float], int] | None:
    """The program under the first rules that pass and target allow, the rules, {layer: stored bits a weight}, bytes."""
    for rules in candidates:
        try:
            program = quantize(with_rules(recipe, rules.values()))
            with tempfile.TemporaryDirectory() as folder:
                lowered = OnnxBackend(recipe.weights_as).lower(program, Path(folder))
                written = sum(file_sizes(Path(folder)).values())
        except (PassError, LoweringError):  # not a width of this pass or target, or not in groups
            continue
        return program, rules, {layer.name: layer.bits_per_weight for layer in lowered.layers}, written
    return None


def _noises(base: Program, twins: Mapping[str, Layer], computes: Mapping[str, Compute]) -> dict[str, float]:
    """{layer: noise energy over signal energy at the output} of each layer alone."""
    twin = base.float_twin or base.graph
    outputs = {name: WorstOutput() for name in computes}
    for batch in calibration_batches(base):
        values, reference = run_all(twin, batch)
        for name, compute in computes.items():
            outputs[name].add(reference, run_from(twin, values, twins[name].node, compute))
    return {name: 10 ** (-output.sqnr_db() / 10) for name, output in outputs.items()}


def calibration_batches(program: Program) -> list[Batch]:
    """The first SAMPLES calibration samples, few at a time."""
    small = program.in_parts(program.calibration.batches, LAYER_BATCH)
    return small[: max(1, SAMPLES // len(next(iter(small[0].values()))))]
