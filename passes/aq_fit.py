"""The codes, codebooks and scales of one weight matrix under additive quantization (passes.aq).

Egiazarian et al. (AQLM), arXiv 2401.06118. It minimizes the layer error tr(E H E^T), E = W - Q, H = X^T X / n, over
codes, codebooks and scales in turn:

    codebooks   residual k-means on a sample, under the metric of the next step              passes.aq_kmeans
    codes       group by group, each making up for the errors before it (GPTQ with vectors)   passes.aq_start
                of the weight, and of what in it is worth its bits: the better goes on
    rounds      codebooks by conjugate gradients, scales in closed form, codes by beam        passes.aq_codebooks,
                search, until a round lowers the error by less than `tolerance`               aq_scales, aq_search
    again       with `loss`: codes row by row, and rounds, for the error at the outputs       passes.aq_outer
    once more   with `strengthen`: all of it for a weight in which what was lost is stronger  passes.aq_strengthen

The paper has no second line: its codes are those of the k-means until the first beam search. It fits codebooks and
scales by Adam.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.aq_codebooks import update_codebooks
from passes.aq_kmeans import first_codebooks, fit_tables
from passes.aq_outer import STEPS, damped_outer, first_codes_by_rows, sweep_coupled
from passes.aq_rows import Kept, Rows, cut_rows, diagonal_blocks, moments_of
from passes.aq_scales import TABLE_ITERATIONS, group_scales, round_to_tables, update_scales
from passes.aq_search import sweep
from passes.aq_start import Feedback, feedback_of, first_codes, prefiltered
from passes.aq_strengthen import strengthened
from passes.base import PassError, silent_part
from passes.half import half_codebooks, half_scales
from passes.threads import single_thread
from passes.weights import CodebookWeight, from_value_lines, value_lines

if TYPE_CHECKING:
    from passes.aq import AQ


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    options: "AQ",
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
        given = outer, code_penalties, tuple(devices) or (weight.device,), on_part
        if options.strengthened > 1:
            first = _Fit(weight, hessians, dataclasses.replace(options, rounds=min(options.rounds, 1)), *given)
            weight = first.strengthened()
        return _Fit(weight, hessians, options, *given).run()


def search_codes(
    weight: Tensor,
    hessian: Tensor,
    quantized: CodebookWeight,
    options: "AQ",
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
        options: "AQ",
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
        self.fit()
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

    def strengthened(self) -> Tensor:
        """The weight [out, in] with more of what these codes keep too little of."""
        self.fit()
        self.on_part("what codes keep too little of")
        options, parts = self.options, list[Tensor]()
        for rows in self.runs:
            lines = strengthened(rows, options.strengthened, options.damp).unflatten(1, (options.out_group_size, -1))
            parts.append(lines.permute(2, 1, 0).flatten(0, 1).to(self.runs[0].device))
        return torch.cat(parts).to(self.dtype)

    def fit(self) -> None:
        """Codebooks, codes and scales, these not from tables yet."""
        if self.options.scale_bits:
            for rows in self.runs:
                group_scales(rows)
        self.begin()
        self.improve()
        if self.outers is not None:
            self.couple(self.outers)
            self.improve()

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
