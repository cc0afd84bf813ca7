"""Tune what is continuous in quantized layers (passes.tunable) all together, towards the float network's outputs.

Adam on the loss of passes.distill over the calibration data. The values stay as they were when that did not bring the
outputs closer.
"""

import torch
from torch import Tensor

from passes.base import Program
from passes.calibration import Batch, run_graph
from passes.distill import BATCH, descend, mean_loss, output_loss
from passes.graph import get_tensor, inputs_of, outputs_of
from passes.output_moments import Loss
from passes.tunable import Tunable, Values


def tune_network(program: Program, steps: int, rate: float, loss: Loss, seed: int) -> dict[str, float]:
    """Tune the network; its loss on the calibration data before and after."""
    inputs, ends = {str(node.target): node for node in inputs_of(program.graph)}, outputs_of(program.graph)
    network = Tunable(program.graph, [node for node in program.graph.graph.nodes if node.op == "call_function"])
    fixed = {end: get_tensor(program.graph, end) for end in ends if end.op == "get_attr"}
    batches = program.in_parts(program.calibration.batches, BATCH)
    if not network.offsets:
        return {}

    def distance(batch: Batch, values: Values) -> Tensor:
        wanted = run_graph(program.reference, [batch])[0]
        fed = {node: batch[name] for name, node in inputs.items()}
        return output_loss(network.run(ends, {**fixed, **values, **fed}), wanted, loss)

    before = mean_loss(lambda batch: distance(batch, {}), batches)
    descend(
        list(network.offsets.values()),
        lambda batch: distance(batch, network.moved()),
        batches,
        steps,
        rate,
        torch.Generator().manual_seed(seed),
        lambda step: program.on_step("tuning the network", step, steps),
    )
    values = network.stored()
    after = mean_loss(lambda batch: distance(batch, values), batches)
    if not after < before:
        return {"loss_before": before, "loss_after": before}
    network.put(values)
    return {"loss_before": before, "loss_after": after}
