"""Transformations of a captured program, and the table of them all."""

from collections.abc import Mapping

from passes.absorb_bias import AbsorbBias
from passes.act_quant import ActQuant
from passes.aq import AQ
from passes.base import Pass
from passes.bias_correct import BiasCorrection
from passes.centre import Centre
from passes.cle import CrossLayerEqualization
from passes.fold_bn import FoldBatchNorm
from passes.gptaq import GPTAQ
from passes.gptq import GPTQ
from passes.hqq import HQQ
from passes.qdora import QDoRA
from passes.rtn import RTN
from passes.smooth import Smooth

PASSES: Mapping[str, type[Pass]] = {
    work.name: work
    for work in (
        FoldBatchNorm,
        CrossLayerEqualization,
        Smooth,
        AbsorbBias,
        Centre,
        ActQuant,
        RTN,
        GPTQ,
        GPTAQ,
        AQ,
        HQQ,
        QDoRA,
        BiasCorrection,
    )
}
"""Every pass by the name that a recipe calls it, in the order they are usually run."""
