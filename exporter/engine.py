"""The TensorRT engine of a compilation: built where there is a TensorRT, run where there is a GPU, else said so."""

from pathlib import Path

from exporter.backends.tensorrt.build import BuildError, available_flavor
from exporter.backends.tensorrt.bundle import EngineResult, finish
from exporter.lowering.lowered import Lowered
from exporter.recipe import Recipe
from exporter.report import Json
from runtimes.base import Artifact, RuntimeFault, Session
from runtimes.trt import TensorRT


def build_engine(recipe: Recipe, folder: Path) -> tuple[EngineResult | None, list[str]]:
    """Finish the bundle here if there is a TensorRT that can, and say what is missing if not."""
    flavor = available_flavor(recipe.trt_flavor)
    later = "the bundle is written: finish it with `qexport build OUT/trt` on a machine that has it"
    if flavor is None:
        asked = "TensorRT" if recipe.trt_flavor == "auto" else f"TensorRT of flavor {recipe.trt_flavor}"
        return None, [f"no {asked} here; {later}"]
    try:
        result = finish(
            folder / "trt",
            folder / "model.engine",
            flavor,
            arch=recipe.trt_arch or None,
            profiles=recipe.trt_profiles or None,
        )
    except BuildError as error:
        return None, [f"{error}; the bundle is written"]
    if result.folded:
        names = ", ".join(result.folded[:3]) + (" ..." if len(result.folded) > 3 else "")
        return result, [f"TensorRT folded {len(result.folded)} quantized weights back to float: {names}"]
    return result, []


def engine_facts(engine: EngineResult | None) -> dict[str, Json]:
    """What the report says of a finished engine: its bytes, and those of each layer's packed weight."""
    if engine is None:
        return {}
    build = engine.build
    return {
        "flavor": build.flavor,
        "version": build.version,
        "engine_bytes": build.engine_bytes,
        "weights_bytes": build.weights_bytes,
        "scratch_bytes": build.scratch_bytes,
        "layer_bytes": dict(engine.bytes),
        "folded": list(engine.folded),
    }


def engine_session(trt: Lowered, engine: EngineResult | None, folder: Path, warnings: list[str]) -> Session | None:
    """The engine ready to run, where there is a GPU for it."""
    if engine is None:
        return None
    artifact = Artifact("tensorrt", folder / "model.engine", trt.artifact.inputs, trt.artifact.outputs)
    try:
        return TensorRT(flavor=engine.build.flavor).load(artifact)
    except RuntimeFault as fault:
        warnings.append(f"tensorrt: built, not run ({fault.what}); its ONNX file was validated in onnxruntime instead")
        return None
