"""`qexport build BUNDLE`: finish a TensorRT bundle on the machine that has the GPU."""

import dataclasses
from pathlib import Path

from exporter.backends.tensorrt.build import BuildError, EngineBuild, available_flavor
from exporter.backends.tensorrt.bundle import DESCRIPTION, finish
from exporter.engine import engine_facts
from exporter.errors import InputError, TargetError
from exporter.output import MANIFEST, add_to_manifest
from exporter.recipe import Recipe
from exporter.report_files import REPORT, add_engine

ENGINE = "model.engine"
BUNDLE = "trt"


@dataclasses.dataclass(frozen=True)
class BundlePlace:
    """A bundle's folder, the output folder it is part of (None: it was carried here alone), and where its engine is."""

    folder: Path
    out: Path | None
    engine: Path


def locate(given: Path) -> BundlePlace | None:
    """The bundle of an output folder, or the bundle that `given` itself is; None when it is neither."""
    folder = given / BUNDLE if (given / BUNDLE / DESCRIPTION).is_file() else given
    if not (folder / DESCRIPTION).is_file():
        return None
    whole = folder.resolve().parent if folder.resolve().name == BUNDLE else folder
    out = whole if (whole / MANIFEST).is_file() else None
    return BundlePlace(folder, out, (out or folder) / ENGINE)


def build_bundle(bundle: Path, recipe: Recipe, *, force: bool = False) -> EngineBuild:
    """Build `bundle` into model.engine, with the recipe's TensorRT options.

    `bundle` is an output folder or its trt folder, and the engine then lies where compile would have put it, in the
    manifest and report too; or a bundle that was carried here alone, and the engine lies in it.
    Raises InputError for a folder that is no bundle, holds an engine already (without `force`) or cannot be written,
    and TargetError when there is no TensorRT here, its builder fails, or it folded a quantized weight back to float.
    """
    where = str(bundle)
    place = locate(bundle)
    if place is None:
        raise InputError(f"is no TensorRT bundle: it has no {DESCRIPTION}", where=where, fix="give OUT or OUT/trt")
    if place.engine.exists() and not force:
        raise InputError(f"has an engine already ({ENGINE})", where=where, fix="give --force to build it again")
    flavor = available_flavor(recipe.trt_flavor)
    if flavor is None:
        asked = "no TensorRT" if recipe.trt_flavor == "auto" else f"no TensorRT of flavor {recipe.trt_flavor}"
        raise TargetError(f"{asked} on this machine", where=where, fix="see `qexport doctor`")
    try:
        done = finish(
            place.folder, place.engine, flavor, arch=recipe.trt_arch or None, profiles=recipe.trt_profiles or None
        )
        if place.out is not None:
            add_to_manifest(place.out, ENGINE)
            if (place.out / REPORT).is_file():
                add_engine(place.out, engine_facts(done), place.engine)
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
