"""Additive quantization: blocks of a weight matrix as sums of codebook entries, fitted to the layer's inputs.

Egiazarian et al. (AQLM), arXiv 2401.06118. It minimizes the layer error tr(E H E^T), E = W - Q, H = X^T X / n, over
codes, codebooks and scales in turn:

    codebooks   residual k-means on a sample, under the metric of the next step              passes.aq_kmeans
    codes       group by group, each making up for the errors before it (GPTQ with vectors)   passes.aq_start
    rounds      codebooks by conjugate gradients, scales in closed form, codes by beam        passes.aq_codebooks,
                search, until a round lowers the error by less than `tolerance`               aq_scales, aq_search
    again       with `loss`: codes row by row, and rounds, for the error at the outputs       passes.aq_outer

The paper has no second line: its codes are those of the k-means until the first beam search. It fits codebooks and
scales by Adam.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from passes.aq_codebooks import update_codebooks
from passes.aq_kmeans import first_codebooks, fit_tables
from passes.aq_outer import STEPS, damped_outer, first_codes_by_rows, sweep_coupled
from passes.aq_rows import Kept, Rows, cut_rows, diagonal_blocks, moments_of
from passes.aq_scales import TABLE_ITERATIONS, group_scales, round_to_tables, update_scales
from passes.aq_search import sweep
from passes.aq_start import Feedback, feedback_of, first_codes, prefiltered
from passes.asymmetric import shifted_weight
from passes.base import PassError, PassResult, Program, silent_part
from passes.block_tune import tune_blocks
from passes.graph import Layer, outputs_of
from passes.half import half_codebooks, half_scales
from passes.network_tune import tune_network
from passes.rtn import RTN
from passes.threads import single_thread
from passes.walk import Walk
from passes.weight_pass import HEAD_BITS, WeightPass, is_head
from passes.weights import CodebookWeight, QuantWeight, from_value_lines, value_lines

Where = Literal["layer", "mse", "kl"]

MAX_BITS = 8.0
"""Bits a weight past which codebooks do not pay: 8-bit weights are smaller and better."""


@dataclasses.dataclass(frozen=True)
class AQ(WeightPass):
    """Options of additive quantization, and its pass.

    num_codebooks        entries added up for a block
    codebook_bits        2^codebook_bits entries in a codebook
    in_group_size        inputs of a block; must divide the layer's
    out_group_size       outputs of a block; must divide the layer's
    beam_size            partial sums of entries carried on when a block's codes are searched
    scale_bits           0: one scale an output group; else one for every block, from a table of 2^scale_bits for each
                         output group, or free if that has no more blocks
    scale_in_group_size   inputs whose blocks share a scale, a multiple of in_group_size; 0: in_group_size
    scale_out_group_size  outputs likewise; 0: out_group_size
    codebook_value_bits  0: codebook values in 16 bits; else from a table of 2^codebook_value_bits for each codebook
    codebook_value_groups   0: that is the table; else for each place in a block, and each of so many equal runs of a
                         codebook's entries
    seed                 of the sample, of where codebooks begin, and of the shuffled order
    rounds               most rounds of codebooks, scales, codes; one scale a row is fitted in the first only
    tolerance            a round that lowers the error by a smaller part is the last
    codebook_steps       conjugate-gradient steps in a round
    sample               blocks the first codebooks are fitted to
    kmeans_iterations    steps of that
    shuffle              blocks and codebooks are visited in random order
    damp                 for the first codes: added to the Hessian's diagonal, as a fraction of its mean
    loss                 where errors count. layer: in the layer's output; mse, kl: in the network's outputs, by their
                         squares, or by the divergence of their softmax (classifiers, language models), see
                         passes.aq_outer; a layer then also makes up for those before it
    tune                 steps by which codebooks, scales, biases and norms are tuned when all are quantized; 0: none.
                         With loss=layer each block of layers to the float network's output of it (passes.block_tune);
                         else all together to the network's outputs (passes.network_tune)
    tune_rate            learning rate of that
    embedding_codebooks  embedding tables get codebooks, too, instead of `embeddings` bits

    The output head gets 8-bit weights unless the recipe sets one of these options for it by name.
    """

    num_codebooks: int = 2
    codebook_bits: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    beam_size: int = 8
    scale_bits: int = 0
    scale_in_group_size: int = 0
    scale_out_group_size: int = 0
    codebook_value_bits: int = 0
    codebook_value_groups: int = 0
    seed: int = 0
    rounds: int = 8
    tolerance: float = 0.03
    codebook_steps: int = 1
    sample: int = 1 << 17
    kmeans_iterations: int = 10
    shuffle: bool = False
    damp: float = 0.01
    loss: Where = "layer"
    embeddings: int = 8
    embedding_codebooks: bool = False
    tune: int = 0
    tune_rate: float = 0.003

    name: ClassVar[str] = "aq"
    summary: ClassVar[str] = "blocks of weights as sums of codebook entries: about 2 bits a weight"
    paper: ClassVar[str] = "arXiv 2401.06118"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        limits: dict[str, tuple[float, float]] = {
            "num_codebooks": (1, 64),
            "codebook_bits": (1, 16),
            "in_group_size": (1, 64),
            "out_group_size": (1, 64),
            "beam_size": (1, 256),
            "scale_bits": (0, 16),
            "scale_in_group_size": (0, 1 << 20),
            "scale_out_group_size": (0, 1 << 20),
            "codebook_value_bits": (0, 16),
            "codebook_value_groups": (0, 1 << 16),
            "rounds": (0, 1000),
            "tolerance": (0, 1),
            "codebook_steps": (1, 1000),
            "sample": (1, 1 << 30),
            "kmeans_iterations": (0, 10000),
            "damp": (0, 10),
            "tune": (0, 1_000_000),
            "tune_rate": (0, 1),
        }
        for option, (low, high) in limits.items():
            value = getattr(self, option)
            if not low <= value <= high:
                raise PassError(
                    f"{self.name}: {option}={value} is not in {low}..{high}", fix=f"see qexport passes {self.name}"
                )
        if self.loss not in get_args(Where):
            raise PassError(f"{self.name}: loss={self.loss} is none", fix="use layer, mse or kl")
        if self.loss != "layer" and self.out_group_size > 1:
            raise PassError(
                f"{self.name}: loss={self.loss} searches row by row, out_group_size={self.out_group_size} ties rows",
                fix="use out_group_size=1, or loss=layer",
            )
        for side in ("in", "out"):
            size, block = getattr(self, f"scale_{side}_group_size"), getattr(self, f"{side}_group_size")
            if size % block:
                raise PassError(
                    f"{self.name}: scale_{side}_group_size={size} is no multiple of {side}_group_size={block}",
                    fix=f"use scale_{side}_group_size={-(-size // block) * block}",
                )
        if self.scale_in_group_size and not self.scale_bits:
            raise PassError(
                f"{self.name}: scale_in_group_size needs scale_bits, without which rows have one scale",
                fix="use scale_bits=16, or leave scale_in_group_size out",
            )
        if self.codebook_value_groups and not self.codebook_value_bits:
            raise PassError(
                f"{self.name}: codebook_value_groups needs codebook_value_bits, without which there are no tables",
                fix="use codebook_value_bits=8, or leave codebook_value_groups out",
            )
        if 2**self.codebook_bits % (self.codebook_value_groups or 1):
            raise PassError(
                f"{self.name}: a codebook's {2**self.codebook_bits} entries do not divide into "
                f"codebook_value_groups={self.codebook_value_groups}",
                fix="use a power of 2",
            )

    @property
    def sharing(self) -> tuple[int, int]:
        """Output groups, and groups of inputs, that share a scale where rows have more than one."""
        high = (self.scale_out_group_size or self.out_group_size) // self.out_group_size
        return high, (self.scale_in_group_size or self.in_group_size) // self.in_group_size

    def requires(self, program: Program) -> None:
        """Besides what holds for every weight pass: outputs that a loss can be of."""
        super().requires(program)
        if self.loss != "layer" and not any(node.meta["val"].is_floating_point() for node in outputs_of(program.graph)):
            what = f"{self.name}: loss={self.loss} is of floating-point outputs, and the model has none"
            raise PassError(what, fix="compile the model without its argmax, or use loss=layer")

    def run(self, program: Program) -> PassResult:
        """Quantize every layer that can be, in the graph's order, then tune the blocks they are in, or all together."""
        result = super().run(program)
        if not self.tune:
            return result
        with single_thread():
            if self.loss == "layer":
                tuned = {"tuned_blocks": float(len(tune_blocks(program, self.tune, self.tune_rate)))}
            else:
                tuned = tune_network(program, self.tune, self.tune_rate, self.loss, program.seed + self.seed)
        return dataclasses.replace(result, measured={**result.measured, **tuned})

    def for_layer(self, program: Program, layer: Layer) -> WeightPass:
        """Besides the recipe's options: the head's width."""
        if is_head(program.graph, layer) and not self.overrides(program, layer) and layer.kind != "embedding":
            return RTN(bits=HEAD_BITS)
        return super().for_layer(program, layer)

    def reason_to_skip(self, program: Program, layer: Layer) -> str:
        """Besides what holds for every weight pass: blocks must divide the matrix, and codebooks must pay."""
        if layer.kind == "embedding" and self.embedding_codebooks:
            reason = dataclasses.replace(self, embeddings=8, embedding_codebooks=False).reason_to_skip(program, layer)
        else:
            reason = super().reason_to_skip(program, layer)
            if layer.kind == "embedding":
                return reason
        shape = layer.to_matrix(layer.weight.meta["val"]).shape
        return reason or self.misfit(shape[0] // layer.groups, shape[1], layer.groups)

    def misfit(self, outputs: int, inputs: int, problems: int = 1) -> str:
        """Why problems * outputs x inputs weights cannot be quantized with these options; empty when they can."""
        if inputs % self.in_group_size:
            return f"its {inputs} inputs do not divide into in_group_size={self.in_group_size}"
        if outputs % self.out_group_size:
            return f"its {outputs} outputs do not divide into out_group_size={self.out_group_size}"
        if self.scale_in_group_size and inputs % self.scale_in_group_size:
            return f"its {inputs} inputs do not divide into scale_in_group_size={self.scale_in_group_size}"
        if self.scale_out_group_size and outputs % self.scale_out_group_size:
            return f"its {outputs} outputs do not divide into scale_out_group_size={self.scale_out_group_size}"
        blocks = problems * outputs * inputs // (self.in_group_size * self.out_group_size)
        if 2**self.codebook_bits > blocks:
            return f"its {blocks} blocks are fewer than the {2**self.codebook_bits} entries of a codebook"
        bits = self.bits_per_parameter(problems * outputs, inputs)
        return f"its codebooks would take {bits:.1f} bits a weight, more than 8-bit weights" if bits > MAX_BITS else ""

    @property
    def code_bits(self) -> float:
        """Bits a weight that codes alone take."""
        return self.num_codebooks * self.codebook_bits / (self.in_group_size * self.out_group_size)

    def bits_per_parameter(self, outputs: int, inputs: int) -> float:
        """Bits a weight of [outputs, inputs] takes: codes, and codebooks and scales in 16 bits or from their tables."""
        groups, rows = inputs // self.in_group_size, outputs // self.out_group_size
        entries, kept, table = int(2**self.codebook_bits), self.codebook_value_bits, int(2**self.scale_bits)
        block = self.in_group_size * self.out_group_size
        values, tables = entries * block, self.codebook_value_groups * block or 1
        bits = rows * groups * self.num_codebooks * self.codebook_bits
        bits += self.num_codebooks * (values * kept + tables * int(2**kept) * 16 if kept else values * 16)
        rows, groups = rows // self.sharing[0], groups // self.sharing[1]
        if self.scale_bits == 0:
            bits += rows * 16
        elif table >= groups:
            bits += rows * groups * 16
        else:
            bits += rows * (groups * self.scale_bits + table * 16)
        return bits / (outputs * inputs)

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> QuantWeight:
        """quantize_weight with these options, on the layer's second moments."""
        hessian = walk.hessian(layer)
        if self.loss == "layer":
            return quantize_weight(matrix, hessian, self, on_part=walk.on_part)
        target = shifted_weight(matrix, hessian, walk.cross(layer), ridge=self.damp)
        return quantize_weight(target, hessian, self, outer=walk.outer(layer, self.loss), on_part=walk.on_part)

    def quantize_table(self, table: Tensor) -> QuantWeight:
        """With codebooks when asked for: a row is looked up alone, so that all errors count alike."""
        if not self.embedding_codebooks:
            return super().quantize_table(table)
        return quantize_weight(table, torch.eye(table.shape[1], device=table.device), self)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    options: AQ,
    *,
    outer: Tensor | None = None,
    code_penalties: Tensor | None = None,
    devices: Sequence[torch.device] = (),
    on_part: Callable[[str], None] = silent_part,
) -> CodebookWeight:
    """Quantize `weight` [out, in] for inputs whose second moments are `hessian` = X^T X / n, [in, in].

    A grouped convolution has one Hessian for each group: [groups, in, in]; the rows of `weight` fall into as many equal
    runs, which share the codebooks. `outer` [out, out] is what errors of two outputs cost together: the error is then
    tr(outer E H E^T), of groups each by itself. code_penalties [num_codebooks, entries] are added to the layer error
    tr(E H E^T) for every use of an entry, and do not go with `outer`. The outputs are worked on in runs on the devices
    in turn; without any, on the weight's. on_part is told each part of the work as it begins, with the relative error
    so far. Raises PassError when the blocks do not fit, or numbers are not finite.
    """
    hessians = hessian.view(-1, *hessian.shape[-2:])
    reason = options.misfit(len(weight) // len(hessians), weight.shape[1], len(hessians))
    if reason:
        raise PassError(reason, fix="choose other group sizes or codebook_bits, or leave the layer out (--skip)")
    if not torch.isfinite(hessian).all():
        raise PassError("the layer's inputs are not finite on the calibration data", fix="check the calibration data")
    if outer is not None and (code_penalties is not None or options.out_group_size > 1):
        raise PassError("outer goes with neither code_penalties nor out_group_size", fix="leave one of them out")
    if not torch.isfinite(weight).all():
        raise PassError("its weight is not finite", fix="check the model")
    with single_thread(), torch.no_grad():
        fit = _Fit(weight, hessians, options, outer, code_penalties, tuple(devices) or (weight.device,), on_part)
        return fit.run()


def search_codes(
    weight: Tensor,
    hessian: Tensor,
    quantized: CodebookWeight,
    options: AQ,
    *,
    outputs: slice | Tensor = slice(None),
    code_penalties: Tensor | None = None,
) -> Tensor:
    """Search the codes of some output groups anew; codebooks and scales stay. [selected, in / ig, num_codebooks].

    weight [out, in] and hessian [in, in] are those `quantized` was made for, and `outputs` selects output groups, so
    that parts of a matrix can be worked on apart. The layer error, plus penalties, does not rise.
    """
    shape = quantized.codebooks.shape
    with single_thread(), torch.no_grad():
        codes, scales = quantized.codes[outputs].to(torch.int64), quantized.block_scales[outputs]
        chosen = weight.unflatten(0, (-1, shape[2]))[outputs].flatten(0, 1)
        moments = moments_of(hessian.float(), shape[3], shape[2])
        codebooks = quantized.codebooks.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        generator = torch.Generator().manual_seed(options.seed) if options.shuffle else None
        found: list[Tensor] = []
        for rows in cut_rows(chosen, [moments], shape[2], shape[0], (weight.device,)):
            first = sum(part.shape[2] for part in found)
            run = slice(first, first + rows.codes.shape[2])
            rows.codes, rows.scales = codes[run].permute(2, 1, 0).contiguous(), scales[run].T
            rows.refresh(codebooks)
            sweep(rows, codebooks, options.beam_size, code_penalties, generator)
            found.append(rows.codes)
        return torch.cat(found, dim=2).permute(2, 1, 0).to(quantized.codes.dtype).contiguous()


def _counted(hessian: Tensor) -> Tensor:
    """The Hessian in float32; the identity when all inputs are dead, so that the weights decide by themselves."""
    hessian = hessian.float()
    return hessian if bool((hessian.diagonal() > 0).any()) else torch.eye(len(hessian), device=hessian.device)


class _Fit:
    """One matrix on its way: runs of its output groups, and codebooks [num_codebooks, d, entries]."""

    def __init__(
        self,
        weight: Tensor,
        hessians: Tensor,
        options: AQ,
        outer: Tensor | None,
        penalties: Tensor | None,
        devices: tuple[torch.device, ...],
        on_part: Callable[[str], None],
    ) -> None:
        self.options, self.dtype, self.penalties, self.on_part = options, weight.dtype, penalties, on_part
        self.generator = torch.Generator().manual_seed(options.seed)
        self.moments = [moments_of(_counted(part), options.in_group_size, options.out_group_size) for part in hessians]
        sizes = options.out_group_size, options.num_codebooks
        self.outers = None if outer is None else diagonal_blocks(outer, len(weight) // len(hessians))
        self.runs = cut_rows(weight, self.moments, *sizes, devices, options.sharing, whole=outer is not None)
        self.levels: list[Tensor | None] = [None] * len(self.runs)
        self.whole = self.size()
        scales = self.runs[0].groups // options.sharing[1]
        self.tables = options.scale_bits > 0 and 2**options.scale_bits < scales

    def run(self) -> CodebookWeight:
        """All of it."""
        if self.options.scale_bits:
            for rows in self.runs:
                group_scales(rows)
        self.begin()
        self.improve()
        if self.outers is not None:
            self.couple(self.outers)
            self.improve()
        if self.tables:
            self.on_part("scales to tables")
            bits = self.options.scale_bits
            self.levels = [round_to_tables(rows, self.codebooks, bits) for rows in self.runs]
            self.refresh()
            self.improve()
        if self.round_values():
            self.on_part("codes for rounded codebooks")
            self.refresh()
            self.search()
        return self.result()

    def size(self) -> float:
        """tr(W H W^T), or tr(outer W H W^T): what errors are relative to."""
        return sum(float((rows.product(rows.weight) * rows.weight).sum()) for rows in self.runs) or 1.0

    def feedbacks(self) -> list[Feedback]:
        """Of each problem's inputs."""
        sizes = self.options.in_group_size, self.options.out_group_size
        return [feedback_of(moments.hessian, *sizes, self.options.damp) for moments in self.moments]

    def begin(self) -> None:
        """First codebooks and codes."""
        options, feedbacks = self.options, self.feedbacks()
        metrics = [feedbacks[rows.problem].metrics_by_group() for rows in self.runs]
        entries, sample = 2**options.codebook_bits, max(options.sample, 2**options.codebook_bits)
        self.on_part("first codebooks")
        self.codebooks = first_codebooks(self.runs, metrics, entries, sample, options.kmeans_iterations, self.generator)
        self.on_part("first codes")
        for rows in self.runs:
            feedback, books = feedbacks[rows.problem].to(rows.device), self.codebooks.to(rows.device)
            search = partial(first_codes, rows, feedback, books, options.beam_size, self.penalties_on(rows))
            search()
            self.on_what_counts(rows, books, search)

    def couple(self, outers: Tensor) -> None:
        """From here on errors count at the network's outputs; the codes are searched anew for that."""
        options, feedbacks = self.options, self.feedbacks()
        for rows in self.runs:
            rows.outer = damped_outer(outers[rows.problem].to(rows.device))
            rows.gradient = rows.product(rows.errors)
        self.whole = self.size()
        self.on_part(f"codes row by row, error {self.error() / self.whole:.4f}")
        for rows in self.runs:
            feedback, books = feedbacks[rows.problem].to(rows.device), self.codebooks.to(rows.device)
            arguments = rows, feedback, books, options.beam_size, options.tolerance, self.shuffled()
            self.on_what_counts(rows, books, partial(first_codes_by_rows, *arguments))

    def on_what_counts(self, rows: Rows, codebooks: Tensor, search: Callable[[], None]) -> None:
        """Let `search` set the rows' codes for what of the weight is worth its bits, if that lowers the error."""
        kept, weight = Kept(rows), rows.weight
        rows.weight = prefiltered(rows, self.options.code_bits, self.options.damp)
        rows.refresh(codebooks)
        search()
        rows.weight = weight
        rows.refresh(codebooks)
        kept.undo_unless_lower()

    def improve(self) -> None:
        """Rounds of codebooks, scales and codes until the error stops falling."""
        before = self.error()
        for done in range(self.options.rounds):
            self.on_part(f"round {done + 1}, error {before / self.whole:.4f}")
            steps = max(self.options.codebook_steps, STEPS if self.coupled else 1)
            self.codebooks = update_codebooks(self.runs, self.codebooks, steps)
            if done == 0 or self.options.scale_bits or self.coupled:  # scales of whole rows hardly move after that
                for rows, levels in zip(self.runs, self.levels, strict=True):
                    update_scales(rows, self.codebooks.to(rows.device), levels, STEPS if self.coupled else 1)
            self.search()
            after = self.error()
            if after >= (1 - self.options.tolerance) * before:
                break
            before = after

    def search(self) -> None:
        """Codes for the codebooks and scales as they are."""
        for rows in self.runs:
            books, beam_size = self.codebooks.to(rows.device), self.options.beam_size
            if rows.outer is None:
                sweep(rows, books, beam_size, self.penalties_on(rows), self.shuffled())
            else:
                sweep_coupled(rows, books, beam_size, self.shuffled())

    def shuffled(self) -> torch.Generator | None:
        """What draws the order of groups and codebooks, if they are shuffled."""
        return self.generator if self.options.shuffle else None

    def round_values(self) -> bool:
        """Codebook values and scales become numbers that can be stored; True when that changed any."""
        bits, groups = self.options.codebook_value_bits, self.options.codebook_value_groups
        if bits:
            blocks = self.blocks()
            values = value_lines(blocks, groups)
            tables, levels = fit_tables(values, torch.ones_like(values), bits, TABLE_ITERATIONS)
            blocks = from_value_lines(tables.gather(1, levels), blocks.shape, groups)
            self.codebooks = blocks.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        self.codebooks = half_codebooks(self.codebooks.to(self.dtype)).float()
        for rows in self.runs:
            rows.scales = half_scales(rows.scales.to(self.dtype)).float()
        return bits > 0 or self.dtype.itemsize < self.codebooks.dtype.itemsize

    @property
    def coupled(self) -> bool:
        """True when errors count at the network's outputs."""
        return self.runs[0].outer is not None

    def refresh(self) -> None:
        """Bring errors and gradients in step with codebooks and scales that were replaced."""
        for rows in self.runs:
            rows.refresh(self.codebooks.to(rows.device))

    def penalties_on(self, rows: Rows) -> Tensor | None:
        """The code penalties on the rows' device."""
        return None if self.penalties is None else self.penalties.to(rows.device, torch.float32)

    def error(self) -> float:
        """Layer error, and penalties if there are any."""
        total = 0.0
        for rows in self.runs:
            total += rows.error()
            penalties = self.penalties_on(rows)
            if penalties is not None:
                total += float(penalties.gather(1, rows.codes.flatten(1)).sum(dtype=torch.float64))
        return total

    def result(self) -> CodebookWeight:
        """The weight as it stands."""
        options, home = self.options, self.runs[0].device
        high, wide = options.sharing
        codes = torch.cat([rows.codes.to(home) for rows in self.runs], dim=2).permute(2, 1, 0)
        dtype = torch.uint8 if options.codebook_bits <= 8 else torch.int32
        scales = torch.cat([rows.scales.to(home) for rows in self.runs], dim=1)
        return CodebookWeight(
            codes.to(dtype).contiguous(),
            self.blocks().to(home),
            scales[::wide, ::high].T.contiguous(),
            scale_bits=options.scale_bits if self.tables else 0,
            codebook_value_bits=options.codebook_value_bits,
            codebook_value_groups=options.codebook_value_groups,
        )

    def blocks(self) -> Tensor:
        """The codebooks as a weight has them, [num_codebooks, entries, og, ig]."""
        sizes = self.options.in_group_size, self.options.out_group_size
        blocks: Tensor = self.codebooks.unflatten(1, sizes)
        return blocks.permute(0, 3, 2, 1).contiguous()
