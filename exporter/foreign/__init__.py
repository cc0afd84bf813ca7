"""Hugging Face folders that another tool has quantized: their codes are taken over, not quantized again.

One module for each layout, told by `quant_method` in the folder's configuration.
"""

from collections.abc import Mapping

from exporter.foreign import aqlm, gptq, hqq
from exporter.foreign.base import Layout

LAYOUTS: Mapping[str, Layout] = {layout.method: layout for layout in (gptq.LAYOUT, aqlm.LAYOUT, hqq.LAYOUT)}
"""Every layout by its quant_method."""
