"""Adapters beside quantized layers that win back what few bits lost: QDoRA, trained to say what the float model says.

Only A, B and m of passes.dora are learned, the codes stay. The start is not the usual one (B = 0) but, layer after
layer, the adapter of least error against what the float network computes there (passes.dora.fitted): the target is W*
of passes.asymmetric, so that a layer also makes up for errors of those before it, and errors count as much as the
network's outputs feel them (passes.output_moments). Then, with `steps`, all of them are trained together on the
calibration data, by Adam, against the float model's outputs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx

from passes.adapter_files import load_adapters
from passes.adapter_nodes import attach
from passes.asymmetric import shifted_weight
from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import Batch, run_graph
from passes.distill import BATCH, descend, mean_loss, output_loss
from passes.dora import Adapter, DoRALinear, fitted, untrained
from passes.graph import Layer, bias_of, copy_graph, find_layers, inputs_of, weight_of
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.output_moments import Loss, output_moments
from passes.threads import single_thread
from passes.walk import Walk
from passes.weight_nodes import float_copy, read_weight
from passes.weights import AffineWeight, QuantWeight

ENOUGH_BITS = 8
"""A layer of so many bits has lost nothing that an adapter would be worth."""


@dataclasses.dataclass(frozen=True)
class QDoRA(Pass):
    """Options of the adapters.

    rank      rows of A; at most what the layer has
    bits      of the numbers in A and B, rounded to nearest with one scale a row: 8; 0: float
    alpha     adapters are scaled by alpha / rank; 0: by 1
    steps     of Adam, 8 samples each; 0: the closed form alone, which generalizes better from little data
    lr        of the first step; falls to zero along half a cosine
    loss      by which outputs are compared, in the closed form as in training. kl: between the softmax of the outputs'
              last axis, for classifiers and language models; mse
    damp      added to the Hessian's diagonal for the closed form, as a fraction of its mean
    outer     the closed form counts a layer's errors by what they do to the outputs, for which the float network is run
              backwards once; false: by their squares
    notebook  alpha, start and norm as in the code this follows (see passes.dora)
    adapters  a safetensors file, or a folder of PEFT's, with adapters to take instead of fitting any
    seed      of what is drawn for `outer`, of the order of the samples, of a random start; added to the recipe's
    """

    rank: int = 32
    bits: int = 8
    alpha: float = 0.0
    steps: int = 0
    lr: float = 3e-4
    loss: Loss = "mse"
    damp: float = 0.01
    outer: bool = True
    notebook: bool = False
    adapters: str = ""
    seed: int = 0

    name: ClassVar[str] = "qdora"
    summary: ClassVar[str] = "low-rank adapters beside low-bit layers, trained against the float model"
    paper: ClassVar[str] = "arXiv 2402.09353"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PassError(f"qdora: rank={self.rank} is less than 1", fix="use rank=32")
        if self.bits not in (0, 8):
            raise PassError(f"qdora: bits={self.bits} is neither 8 nor 0", fix="use bits=8, or 0 for float")
        if self.alpha < 0 or self.steps < 0 or self.lr <= 0 or self.damp < 0:
            raise PassError(
                "qdora: alpha, steps and damp are at least 0 and lr is positive", fix="use steps=100:lr=0.0003"
            )
        if self.loss not in get_args(Loss):
            raise PassError(f"qdora: loss={self.loss} is none", fix=f"use {' or '.join(get_args(Loss))}")

    def requires(self, program: Program) -> None:
        """Something must be there to win back, and data to do it with."""
        if self.adapters:
            return
        if not program.calibration.batches:
            raise PassError("qdora needs calibration data", fix="give --calib")
        if not any(self._reason_to_skip(program, layer) == "" for layer in program.layers()):
            fix = "put it behind a pass such as hqq:bits=3, which leaves 8 bits to the output head"
            raise PassError("qdora finds no linear layer below 8 bits", fix=fix)
        outputs = program.graph.graph.output_node().all_input_nodes
        if not any(node.meta["val"].is_floating_point() for node in outputs):
            what = "qdora is fitted to floating-point outputs, and the model has none"
            raise PassError(what, fix="compile the model without its argmax, or leave qdora out")

    def run(self, program: Program) -> PassResult:
        """Fit, train, and put the adapters in the graph. Losses are over all calibration data."""
        if self.adapters:
            return self._take(program)
        layers, skipped = [], []
        for layer in program.layers():
            reason = self._reason_to_skip(program, layer)
            if reason:
                skipped.append(Skip(layer.name, reason))
            else:
                layers.append(layer)
        weights = sum(layer.weight.meta["val"].numel() for layer in layers)
        with single_thread():
            adapters, measured = self._learn(program, layers)
        for layer in layers:
            attach(program.graph, layer, adapters[layer.name], self.bits)
        added = sum(adapter.lora_a.numel() + adapter.lora_b.numel() for adapter in adapters.values())
        return PassResult(tuple(adapters), tuple(skipped), {**measured, "parameters_added": added / weights})

    def _reason_to_skip(self, program: Program, layer: Layer) -> str:
        if program.is_skipped(layer.name):
            return "left in float by the recipe"
        if layer.kind != "linear":
            return "adapters are for linear layers"
        weight = read_weight(program.graph, layer)
        if weight is None:
            return "its weight is float"
        if isinstance(weight, AffineWeight) and weight.bits >= ENOUGH_BITS:
            return f"its weight has {weight.bits} bits"
        return ""

    def _take(self, program: Program) -> PassResult:
        """Adapters from a file."""
        layers = {layer.name: layer for layer in program.layers() if layer.kind == "linear"}
        bases = {name: _matrix(program.graph, layer) for name, layer in layers.items()}
        found = load_adapters(Path(self.adapters), self.alpha, bases)
        for name, adapter in found.items():
            attach(program.graph, layers[name], adapter)
        return PassResult(tuple(found), (), {})

    def _learn(self, program: Program, layers: Sequence[Layer]) -> tuple[dict[str, Adapter], dict[str, float]]:
        """{layer: adapter}, and what the outputs' loss was before, from the start, and in the end."""
        bases: dict[str, QuantWeight] = {}
        for layer in layers:
            weight = read_weight(program.graph, layer)
            assert weight is not None  # or it would have been skipped
            bases[layer.name] = weight
        generator = torch.Generator().manual_seed(program.seed + self.seed)
        if self.notebook:
            adapters = {
                name: untrained(base.dequantize(), self._rank(base), self.alpha or 1.0, generator, notebook=True)
                for name, base in bases.items()
            }
        else:
            adapters = self._fit(program, bases, generator)
        student = Student(program, bases, adapters, self.loss)
        batches = program.in_parts(program.calibration.batches, BATCH)
        before = mean_loss(Student(program, {}, {}, self.loss).loss, batches)
        start = mean_loss(student.loss, batches)
        after = self._train(program, student, generator) if self.steps else start
        if not after <= start:  # the steps led away, or to nan
            return adapters, {"loss_before": before, "loss_fitted": start, "loss_after": start}
        return student.adapters(), {"loss_before": before, "loss_fitted": start, "loss_after": after}

    def _rank(self, base: QuantWeight) -> int:
        return min(self.rank, *base.shape)

    def _fit(
        self, program: Program, bases: Mapping[str, QuantWeight], generator: torch.Generator
    ) -> dict[str, Adapter]:
        """The closed form, layer after layer: each sees inputs that come through the adapters before it."""
        scratch = dataclasses.replace(program, graph=copy_graph(program.graph))
        assert program.float_twin is not None  # the pipeline made it in front of the first pass that quantizes
        twins = {layer.name: layer for layer in find_layers(program.float_twin)}
        outers: dict[str, Tensor] = {}
        if self.outer:
            batches = program.in_parts(program.calibration.batches, BATCH)
            outers = output_moments(program.float_twin, bases, batches, self.loss, generator)
        walk, device = Walk(scratch), program.ranks.device
        adapters = {}
        for done, layer in enumerate(layer for layer in scratch.layers() if layer.name in bases):
            program.on_step(layer.name, done, len(bases))
            base, rank = bases[layer.name].dequantize().to(device), self._rank(bases[layer.name])
            twin = twins[layer.name]
            wanted = twin.to_matrix(weight_of(program.float_twin, twin)).float().to(device)
            try:
                hessian, cross = walk.hessian(layer), walk.cross(layer)
                target = shifted_weight(wanted, hessian, cross, ridge=self.damp)
                outer, alpha = outers.get(layer.name), self.alpha or rank
                outer = None if outer is None else outer.to(device)
                adapters[layer.name] = fitted(base, target, hessian[0], rank, alpha, self.damp, outer).cpu()
            except PassError as error:
                raise PassError(error.what, node=layer.name, fix=error.fix) from error
            attach(scratch.graph, layer, adapters[layer.name], self.bits)
        return adapters

    def _train(self, program: Program, student: "Student", generator: torch.Generator) -> float:
        """Adam on small batches in random order; the loss in the end."""
        small = program.in_parts(program.calibration.batches, BATCH)

        def on_step(step: int) -> None:
            program.on_step("training", step, self.steps)

        descend(student.parameters(), student.loss, small, self.steps, self.lr, generator, on_step)
        return mean_loss(student.loss, small)


class Student(fx.Interpreter):
    """The quantized graph with adapters that can be trained: rounding of activations lets gradients through."""

    def __init__(
        self, program: Program, bases: Mapping[str, QuantWeight], adapters: Mapping[str, Adapter], loss: Loss
    ) -> None:
        graph = float_copy(program.graph)
        super().__init__(graph)
        self._inputs = [str(node.target) for node in inputs_of(graph)]
        self._reference, self._loss = program.reference, loss
        self._layers = {layer.node: layer for layer in find_layers(graph) if layer.name in adapters}
        self._modules = {
            layer.name: DoRALinear(bases[layer.name], adapters[layer.name], bias_of(graph, layer))
            for layer in self._layers.values()
        }

    def run_node(self, n: fx.Node) -> Any:
        """The adapted layer in place of the plain one."""
        layer = self._layers.get(n)
        if layer is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._modules[layer.name](args[layer.input_arg])
        if n.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC):
            args, _ = self.fetch_args_kwargs_from_env(n)
            with torch.no_grad():
                moved = n.target(*args) - args[0]
            return args[0] + moved
        return super().run_node(n)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [parameter for module in self._modules.values() for parameter in module.parameters()]

    def adapters(self) -> dict[str, Adapter]:
        """What was trained."""
        found = {name: module.adapter() for name, module in self._modules.items()}
        return {
            name: dataclasses.replace(
                adapter,
                lora_a=adapter.lora_a.detach(),
                lora_b=adapter.lora_b.detach(),
                magnitude=adapter.magnitude.detach(),
            )
            for name, adapter in found.items()
        }

    def loss(self, batch: Batch) -> Tensor:
        """How far the outputs for a batch are from the float model's."""
        wanted = run_graph(self._reference, [batch])[0]
        return output_loss(self.run(*(batch[name] for name in self._inputs)), wanted, self._loss)


def _matrix(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """What a linear layer multiplies by, float [out, in], quantized or not."""
    quantized = read_weight(graph, layer)
    return layer.to_matrix(weight_of(graph, layer)).float() if quantized is None else quantized.dequantize()
