"""Additive quantization: blocks of a weight matrix as sums of codebook entries, fitted to the layer's inputs.

Egiazarian et al. (AQLM), arXiv 2401.06118. The options and the pass; passes.aq_fit has the fit.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from passes.aq_fit import quantize_weight
from passes.asymmetric import shifted_weight
from passes.base import PassError, PassResult, Program
from passes.block_tune import tune_blocks
from passes.graph import Layer, outputs_of
from passes.network_tune import tune_network
from passes.rtn import RTN
from passes.threads import single_thread
from passes.walk import Walk
from passes.weight_pass import HEAD_BITS, WeightPass, is_head
from passes.weights import QuantWeight

Where = Literal["layer", "mse", "kl"]

MAX_BITS = 8.0
"""Bits a weight past which codebooks do not pay: 8-bit weights are smaller and better."""

STRENGTHEN = 1.5
"""How much stronger directions become at most, by default."""


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
    strengthen           a layer is fitted twice, the second time to a weight in which directions that the codes kept
                         too little of are stronger, this many times at most (passes.aq_strengthen); 1: fitted
                         once, for the least error; 0: 1 with loss=mse, else 1.5
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
    strengthen: float = 0.0
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
            "strengthen": (0, 4),
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
        if 0 < self.strengthen < 1:
            raise PassError(
                f"{self.name}: strengthen={self.strengthen} would make weights weaker",
                fix="use 1 to 4, or leave it out",
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
    def strengthened(self) -> float:
        """How much stronger directions become at most; the outputs' squares are least with the least error."""
        return self.strengthen or (1.0 if self.loss == "mse" else STRENGTHEN)

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
        plain = dataclasses.replace(self, strengthen=1.0)  # of a table no direction costs less than others
        return quantize_weight(table, torch.eye(table.shape[1], device=table.device), plain)
