"""Move the difficulty of outlier channels from activations into weights, or of important weights into activations.

    x W^T = (x S^-1) (W S)^T,   S = diag(s),   s_j = X_j^alpha / W_j^(1 - alpha)

S^-1 goes into what stands in front of the layer (see smooth_groups), so the float function stays. W_j is the largest
magnitude of the weights that channel j meets. X_j is

- the largest magnitude of the channel when activations are quantized (SmoothQuant, arXiv 2211.10438, eq. 4): a static
  range serves all channels at once, so one that is a hundred times the others leaves these with two or three levels;
- its mean magnitude when weights alone are (AWQ, arXiv 2306.00978, section 3.2): columns that meet large inputs get
  more of the weight grid. There s_j = X_j^alpha is tried beside the form with W_j.

alpha is searched group by group. The error of a candidate is that of the layers as they will run, on calibration rows,

    sum over the group's layers of || X W^T - Q_a(X S^-1) Q_w(W S)^T ||^2

with Q_a one asymmetric (where the target wants it, symmetric) range for the tensor and Q_w round to nearest. s = 1 is
always a candidate, so no group is made worse on them. The geometric mean of s is 1; dead channels keep s_j = 1.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from passes.affine_grid import fit_grid
from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import Batch, Stream
from passes.channels import rescale
from passes.equalize_pairs import observe_shapes
from passes.graph import (
    Layer,
    add_tensor,
    aten,
    call_before,
    get_tensor,
    set_argument,
    weight_of,
)
from passes.ops import fake_quantize
from passes.ranges import Method, Observer, choose_range
from passes.smooth_groups import Group, Norm, Reader, find_groups
from passes.threads import single_thread
from passes.weight_pass import HEAD_BITS, WIDTHS, is_head

SEARCH = "search"
COARSE = tuple(step / 10 for step in range(11))
FINE = 0.05
"""alpha is tried in steps of 0.1, then half a step to either side of the best."""

ROWS = 1024
"""How many input rows of a layer the search looks at, evenly spread over the calibration data."""

WORTH = 0.9
"""A group with a residual is scaled when its error falls below this part: a multiplication at run time is its price."""

DEAD = 2.0**-20
"""A channel below this part of the largest is dead: scaling it up would only lift noise."""

LARGEST = 2.0**12
"""s stays within this factor of 1, so that no weight or bias leaves what half precision can hold."""


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """Scale channels between normalizations and linear layers, values and projections, up and down; the function stays.

    alpha       search, or a number from 0 (weights made alike) to 1 (activations made alike)
    act_bits    bits of the activations that the search is for; 0: weights alone are quantized
    act_method  how the activations' range will be chosen: minmax, percentile or mse
    bits        bits of the weights that the search is for
    group_size  of these weights: k: groups of k inputs; -1: per output channel; 0: per tensor
    symmetric   these weights have no zero points
    residual    scale a normalization whose output is also a residual (BERT) and multiply that by the scale again
    """

    alpha: str = SEARCH
    act_bits: int = 8
    act_method: Method = "mse"
    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    residual: bool = True

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "move outliers between activations and weights, strength by output error"
    paper: ClassVar[str] = "arXiv 2211.10438, 2306.00978"
    quantizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.alpha != SEARCH and not _is_share(self.alpha):
            raise PassError(f"smooth: alpha={self.alpha} is no share", fix="use search, or a number from 0 to 1")
        if self.bits not in WIDTHS:
            raise PassError(f"smooth: bits={self.bits} is no width", fix="use bits=2, 3, 4 or 8")
        if self.act_bits not in (0, 4, 8):
            raise PassError(f"smooth: act_bits={self.act_bits} is no width", fix="use act_bits=8, 4 or 0")

    def requires(self, program: Program) -> None:
        """There must be calibration data."""
        if not program.calibration.batches:
            raise PassError("smooth needs calibration data", fix="give --calib")

    def run(self, program: Program) -> PassResult:
        """Find the groups, choose every group's scales on the float network, then write each weight once."""
        graph = program.graph
        groups, skipped = find_groups(graph, observe_shapes(graph, _few_samples(program)), restore=self.residual)
        scales: list[tuple[Group, Tensor]] = []
        gains = []
        for done, (group, inputs) in enumerate(_walk(program, groups), start=1):
            layers = [
                LayerSample(
                    _matrix(program, reader), reader.channel.long(), seen, self._for_layer(program, reader.layer)
                )
                for reader, seen in zip(group.readers, inputs, strict=True)
                if not program.is_skipped(reader.layer.name)
            ]
            found = self.choose(layers, group.free, program.rules.symmetric_activations) if layers else None
            if found is None:
                skipped.append(Skip(group.source.name, "the layers that read it are left in float by the recipe"))
            elif group.restored and found.error > WORTH * found.before:
                skipped.append(Skip(group.source.name, f"{group.why}, and the error would hardly fall"))
            else:
                scales.append((group, found.scale))
                gains.append(found)
            program.on_step(group.name, done, len(groups))
        _write(program, scales)
        return PassResult(tuple(group.name for group, _ in scales), tuple(skipped), _figures(gains))

    def choose(self, layers: Sequence["LayerSample"], free: Tensor, symmetric_activations: bool) -> "Smoothing":
        """The scales [channels] with the least error for the layers that read them; those not `free` stay 1."""
        with single_thread():
            return self._choose(_Search(self, layers, free, symmetric_activations))

    def _choose(self, search: "_Search") -> "Smoothing":
        if self.alpha != SEARCH:
            return search.measure(float(self.alpha))
        found = min((search.measure(alpha) for alpha in COARSE), key=lambda item: item.error)
        near = [alpha for alpha in (found.alpha - FINE, found.alpha + FINE) if 0 <= alpha <= 1]
        found = min([found, *map(search.measure, near)], key=lambda item: item.error)
        return found if found.error < found.before else search.identity

    def _for_layer(self, program: Program, layer: Layer) -> "Smooth":
        """These options with what the recipe says of one layer, and the width of an output head."""
        fields = {field.name for field in dataclasses.fields(self)}
        named = program.options_for(layer.name).items()
        overrides: dict[str, Any] = {key: value for key, value in named if key in fields}
        options = dataclasses.replace(self, **overrides)
        if "bits" not in overrides and options.bits < HEAD_BITS and is_head(program.graph, layer):
            return dataclasses.replace(options, bits=HEAD_BITS, group_size=-1)
        return options


@dataclasses.dataclass(frozen=True)
class InputSample:
    """What was seen of a layer's input: `rows` [n, in] of it, and of all rows low, high and mean magnitude [in]."""

    rows: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor


@dataclasses.dataclass(frozen=True)
class LayerSample:
    """A layer of a group: its weight [out, in], the channel [in] each input carries, its input, how it is quantized."""

    weight: Tensor
    channel: Tensor
    input: InputSample
    options: Smooth


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """A choice of scales [channels]: relative errors of the group's layers with it and with s = 1."""

    alpha: float
    scale: Tensor
    error: float
    before: float


class _Search:
    """The error of any alpha for one group."""

    def __init__(
        self, options: Smooth, layers: Sequence[LayerSample], free: Tensor, symmetric_activations: bool
    ) -> None:
        self.options, self.layers, self.symmetric = options, layers, symmetric_activations
        channels = len(free)
        self.inputs, self.weights = torch.zeros(channels), torch.zeros(channels)
        for layer in layers:
            seen = layer.input
            magnitude = torch.maximum(-seen.low, seen.high) if options.act_bits else seen.mean
            self.inputs.scatter_reduce_(0, layer.channel, magnitude, "amax")
            self.weights.scatter_reduce_(0, layer.channel, layer.weight.abs().amax(0), "amax")
        self.live = free & _alive(self.inputs) & _alive(self.weights)
        self.targets = [layer.input.rows @ layer.weight.T for layer in layers]
        self.energy = max(sum(float(target.double().square().sum()) for target in self.targets), 1e-30)
        ones = torch.ones(channels)
        before = self._error(ones)
        self.identity = Smoothing(0.0, ones, before, before)

    def measure(self, alpha: float) -> Smoothing:
        """The scales of `alpha` and their error; for weights alone the better of the two forms."""
        forms = [self._scales(alpha, 1 - alpha)]
        if not self.options.act_bits:
            forms.append(self._scales(alpha, 0))
        tried = [Smoothing(alpha, scale, self._error(scale), self.identity.before) for scale in forms]
        return min(tried, key=lambda item: item.error)

    def _scales(self, inputs: float, weights: float) -> Tensor:
        """s [channels] = X^inputs / W^weights with geometric mean 1 over the live channels."""
        if not bool(self.live.any()):
            return torch.ones(len(self.live))
        log = inputs * self.inputs.log2() - weights * self.weights.log2()
        log = log - log[self.live].mean()
        return torch.where(self.live, torch.exp2(log).clamp(1 / LARGEST, LARGEST), 1.0)

    def _error(self, scale: Tensor) -> float:
        """Squared error of the layers' outputs, relative to the outputs."""
        total = 0.0
        for layer, target in zip(self.layers, self.targets, strict=True):
            own = scale[layer.channel]
            weight, how = layer.weight * own, layer.options
            rounded = fit_grid(weight, how.bits, how.group_size, how.symmetric).round(weight).dequantize()
            rows = self._rounded_rows(layer.input, own)
            total += float((rows @ rounded.T).sub_(target).square_().sum(dtype=torch.float64))
        return total / self.energy

    def _rounded_rows(self, seen: InputSample, scale: Tensor) -> Tensor:
        rows = seen.rows / scale
        bits = self.options.act_bits
        if not bits:
            return rows
        observer = Observer(float((seen.low / scale).min()), float((seen.high / scale).max()))
        if self.options.act_method != "minmax":
            observer.count(rows)
        chosen = choose_range(observer, bits, self.symmetric, self.options.act_method, 99.99)
        step, zero_point = torch.tensor(chosen.scale), torch.tensor(chosen.zero_point, dtype=torch.int32)
        rounded: Tensor = fake_quantize(rows, step, zero_point, chosen.quant_min, chosen.quant_max)
        return rounded


def _walk(program: Program, groups: Sequence[Group]) -> Iterator[tuple[Group, list[InputSample]]]:
    """Each group with its readers' inputs, once the last of them has been reached; only open groups' are held."""
    stream = Stream(program.graph, program.calibration.batches)
    owner = {reader.layer.node: group for group in groups for reader in group.readers}
    held: dict[int, dict[object, InputSample]] = {}
    for layer in program.layers():
        group = owner.get(layer.node)
        if group is None:
            continue
        stream.advance(layer.node)
        inputs = held.setdefault(id(group), {})
        if layer.input not in inputs:
            inputs[layer.input] = _sample(layer, stream.values(layer.input))
        if layer.node is max(reader.layer.node for reader in group.readers):
            yield group, [inputs[reader.layer.input] for reader in group.readers]
            del held[id(group)]


def _sample(layer: Layer, batches: Sequence[Tensor]) -> InputSample:
    """What the batches of a layer's input look like. Raises PassError when they are not finite."""
    every = [value.float().flatten(0, -2) if value.dim() > 1 else value.float()[None] for value in batches]
    low = torch.stack([rows.amin(0) for rows in every]).amin(0)
    high = torch.stack([rows.amax(0) for rows in every]).amax(0)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise PassError("its inputs are not finite on the calibration data", node=layer.name)
    count = sum(len(rows) for rows in every)
    mean = torch.stack([rows.abs().sum(0, dtype=torch.float64) for rows in every]).sum(0) / count
    picked = []
    for rows in every:
        share = min(len(rows), -(-ROWS * len(rows) // count))
        picked.append(rows[torch.linspace(0, len(rows) - 1, share).round().long()])
    return InputSample(torch.cat(picked), low, high, mean.float())


def _few_samples(program: Program) -> Batch:
    """The first batch, cut to two samples where all its inputs may be."""
    batch = program.calibration.batches[0]
    if all(0 in program.dynamic.get(name, {}) for name in batch):
        return {name: value[:2] for name, value in batch.items()}
    return batch


def _matrix(program: Program, reader: Reader) -> Tensor:
    return reader.layer.to_matrix(weight_of(program.graph, reader.layer)).float()


def _write(program: Program, scales: Sequence[tuple[Group, Tensor]]) -> None:
    """Divide every source and multiply the columns of every reader: once for a layer that is both."""
    rows: dict[Layer, Tensor] = {}
    columns: dict[Layer, Tensor] = {}
    for group, scale in scales:
        columns |= {reader.layer: scale[reader.channel.long()].double() for reader in group.readers}
        if isinstance(group.source, Norm):
            _scale_norm(program, group.source, scale.double())
            if group.restored:
                _restore(program, group, group.source.node, scale)
        else:
            rows[group.source] = scale.double()
    for layer in {**rows, **columns}:
        rescale(program, layer, rows.get(layer), columns.get(layer))


def _scale_norm(program: Program, norm: Norm, scale: Tensor) -> None:
    graph, dtype = program.graph, norm.node.meta["val"].dtype
    weight = torch.ones(len(scale), dtype=dtype) if norm.weight is None else get_tensor(graph, norm.weight)
    node = add_tensor(graph, f"{norm.name}.weight", (weight.double() / scale).to(weight.dtype), norm.node)
    set_argument(norm.node, norm.weight_arg, node)
    if norm.bias is not None and norm.bias_arg is not None:
        bias = get_tensor(graph, norm.bias)
        node = add_tensor(graph, f"{norm.name}.bias", (bias.double() / scale).to(bias.dtype), norm.node)
        set_argument(norm.node, norm.bias_arg, node)


def _restore(program: Program, group: Group, value: fx.Node, scale: Tensor) -> None:
    """Give the readers that are no layers the value times the scale."""
    graph, following = program.graph, value.next
    constant = add_tensor(graph, f"{group.source.name}.scale", scale.to(value.meta["val"].dtype), following)
    product = call_before(graph, following, aten.mul.Tensor, (value, constant))
    product.meta["val"] = value.meta["val"]
    for reader in group.restored:
        reader.replace_input_with(value, product)


def _figures(found: Sequence[Smoothing]) -> dict[str, float | str]:
    """How many groups, their mean alpha, and the geometric mean of error after / before."""
    if not found:
        return {"groups": 0}
    ratios = torch.tensor([(item.error + 1e-30) / (item.before + 1e-30) for item in found], dtype=torch.float64)
    alpha = sum(item.alpha for item in found) / len(found)
    return {"groups": len(found), "alpha": alpha, "error_ratio": float(ratios.log().mean().exp())}


def _alive(magnitude: Tensor) -> Tensor:
    return magnitude > DEAD * magnitude.max()


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
