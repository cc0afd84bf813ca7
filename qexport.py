"""Post-training quantization for PyTorch: a trained model in, a validated ONNX or TensorRT artifact out.

import qexport
report = qexport.compile_model(model, {"x": x}, qexport.Recipe(passes="cle,gptaq"), calibration=loader, out="out")
session = qexport.load("out")
session.run({"x": x})
"""

from exporter.compile import compile_model
from exporter.errors import InputError, InternalError, QExportError, TargetError
from exporter.gates import Gate, parse_gate
from exporter.open_out import LoadedModel, load
from exporter.recipe import Recipe
from exporter.report import Report
from exporter.versions import VERSION as __version__

__all__ = [
    "Gate",
    "InputError",
    "InternalError",
    "LoadedModel",
    "QExportError",
    "Recipe",
    "Report",
    "TargetError",
    "__version__",
    "compile_model",
    "load",
    "parse_gate",
]
