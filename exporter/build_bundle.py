"""`qexport build BUNDLE`: finish a TensorRT bundle on the machine that has the GPU."""

from pathlib import Path

from exporter.backends.tensorrt.build import BuildError, EngineBuild, available_flavor
from exporter.backends.tensorrt.bundle import DESCRIPTION, finish
from exporter.errors import InputError, TargetError
from exporter.output import MANIFEST, add_to_manifest
from exporter.recipe import Recipe

ENGINE = "model.engine"
BUNDLE = "trt"


def build_bundle(bundle: Path, recipe: Recipe, *, force: bool = False) -> EngineBuild:
    """Build `bundle` into model.engine, with the recipe's TensorRT options.

    `bundle` is an output folder or its trt folder, and the engine then lies where compile would have put it, in the
    manifest too; or a bundle that was carried here alone, and the engine lies in it.
    Raises InputError for a folder that is no bundle, holds an engine already (without `force`) or cannot be written,
    and TargetError when there is no TensorRT here, its builder fails, or it folded a quantized weight back to float.
    """
    where = str(bundle)
    folder = bundle / BUNDLE if (bundle / BUNDLE / DESCRIPTION).is_file() else bundle
    whole = folder.resolve().parent if folder.resolve().name == BUNDLE else folder
    out = whole if (whole / MANIFEST).is_file() else None  # the output folder that the bundle is part of
    engine = (out or folder) / ENGINE
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"is no TensorRT bundle: it has no {DESCRIPTION}", where=where, fix="give OUT or OUT/trt")
    if engine.exists() and not force:
        raise InputError(f"has an engine already ({ENGINE})", where=where, fix="give --force to build it again")
    flavor = available_flavor(recipe.trt_flavor)
    if flavor is None:
        asked = "no TensorRT" if recipe.trt_flavor == "auto" else f"no TensorRT of flavor {recipe.trt_flavor}"
        raise TargetError(f"{asked} on this machine", where=where, fix="see `qexport doctor`")
    try:
        done = finish(folder, engine, flavor, arch=recipe.trt_arch or None, profiles=recipe.trt_profiles or None)
        if out is not None:
            add_to_manifest(out, ENGINE)
    except ValueError as error:  # the bundle's description, or the manifest
        raise InputError(str(error), where=where) from error
    except BuildError as error:
        raise TargetError(str(error), where=where) from error
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=where) from error
    if done.folded:
        named = ", ".join(done.folded[:3])
        raise TargetError(f"the engine holds {len(done.folded)} quantized weights in float: {named}", where=where)
    return done.build
