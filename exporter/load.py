"""What kind of model a path holds, read from its bytes, and loading it without running code of the file's.

- exported: a zip with `archive_format`; inspected by `exporter.archive`, then torch.export.load
- state_dict: a zip with `data.pkl`, torch.save's magic number, or safetensors; loaded with weights_only into the
  module that --factory makes
- module: the same, where the safe unpickler meets a class; only with --trust-model
- huggingface: a folder with config.json and *.safetensors; loaded by transformers from local files only, and by
  exporter.foreign where its weights are quantized

A name says nothing: `model.pt` may be any of them.
"""

import contextlib
import importlib
import json
import logging
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from exporter.archive import inspect_archive
from exporter.errors import InputError
from exporter.foreign.base import ForeignWeight, Settings
from exporter.foreign.folder import read_quantized, settings_of
from exporter.mapped import map_safetensors, weights_in_place
from exporter.torch_files import check_torch_file
from passes.memory import release

Kind = Literal["exported", "state_dict", "module", "huggingface"]
Format = Literal["exported", "torch_zip", "torch_legacy", "safetensors", "huggingface"]

TORCH_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f920 6aa85019")  # after the two bytes of the pickle protocol
ONNX_FIELDS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42}  # protobuf tags that can follow ModelProto.ir_version
SIGNATURES = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 (Keras) file",
    b"\x93NUMPY": "a NumPy array",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "a gzip archive",
}
STATE_DICT_KEYS = ("state_dict", "model_state_dict")
MAX_LAYERS, MAX_ABSENT = 1000, 1 << 28  # what a configuration may ask for beyond what the weights' files hold
SHOWN = 3  # names listed before the rest becomes a count

HOW_TO_EXPORT = "export the eager model: torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')"
HOW_TO_LOAD = (
    "MODEL is a torch.export archive, a state_dict or safetensors file with --factory pkg.mod:function, "
    "a pickled module with --trust-model, or a Hugging Face folder"
)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode: `program` when the file is a torch.export archive, else `module`.

    `weights` {path of a layer's module: its codes} of a checkpoint quantized already; `module` holds their values.
    """

    kind: Kind
    path: Path
    program: torch.export.ExportedProgram | None = None
    module: nn.Module | None = None
    weights: Mapping[str, ForeignWeight] = field(default_factory=dict)


def load_model(path: Path, *, factory: str | None = None, trust: bool = False) -> Loaded:
    """Load the model at `path`; `factory` ("pkg.mod:function") makes the module that a state_dict is loaded into.

    `trust` admits what runs code of the file's: pickled modules, and archives that the inspection refuses.
    Raises `InputError` naming the way in when the path holds anything else, or a weight is NaN or infinite.
    """
    found = _format(path)
    if found == "exported":
        loaded = Loaded("exported", path, program=_load_exported(path, trust))
    elif found == "huggingface":
        loaded = _load_huggingface(path)
    else:
        content = _load_safetensors(path) if found == "safetensors" else _load_pickle(path, trust)
        if isinstance(content, nn.Module):
            loaded = Loaded("module", path, module=content)
        else:
            loaded = Loaded("state_dict", path, module=_fill(path, _state_dict(path, content), factory))
    if loaded.module is not None:
        loaded.module.eval()
    _check_finite(loaded)
    return loaded


def resolve_callable(spec: str, flag: str) -> Callable[..., Any]:
    """The function that `pkg.mod:function` names, with the current directory importable as under `python -m`.

    Raises `InputError` naming `flag` when the module does not import or has no such function.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise InputError(f"{spec!r} is not of the form pkg.mod:function", where=flag)
    import_from_here()
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} failed: {_describe(error)}", where=flag) from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise InputError(f"{module_name} has no {attribute}", where=flag)
        target = getattr(target, name)
    if not callable(target):
        raise InputError(f"{spec} is a {type(target).__name__}, not a function", where=flag)
    return cast(Callable[..., Any], target)


def import_from_here() -> None:
    """Let modules of the current directory be imported."""
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)


# ------------------------------------------------------------------------------------------------- telling kinds apart


def _format(path: Path) -> Format:
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        raise InputError("a folder without config.json is not a Hugging Face model", where=str(path), fix=HOW_TO_LOAD)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise InputError("no such file or folder", where=str(path), fix="check the path of MODEL") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if size == 0:
        raise InputError("the file is empty", where=str(path), fix="write the model again")
    if head.startswith(b"PK"):
        return _zip_format(path)
    if re.match(rb"\x80[\x02-\x05]", head):
        if head[2:].startswith(TORCH_LEGACY_MAGIC):
            return "torch_legacy"
        raise InputError("a pickle that torch.save did not write", where=str(path), fix=HOW_TO_LOAD)
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "safetensors"
    if head[0] == 0x08 and len(head) > 2 and head[1] < 0x80 and head[2] in ONNX_FIELDS:
        raise InputError("an ONNX file is what qexport writes, not what it reads", where=str(path), fix=HOW_TO_EXPORT)
    what = next(
        (what for magic, what in SIGNATURES.items() if head.startswith(magic)), "not a model that qexport knows"
    )
    raise InputError(what, where=str(path), fix=HOW_TO_LOAD)


def _zip_format(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error) as error:
        raise InputError("a truncated or damaged zip archive", where=str(path), fix="write the model again") from error
    members = {name.partition("/")[2] or name for name in names}
    if "archive_format" in members or "serialized_exported_program.json" in members:
        return "exported"
    if "constants.pkl" in members or any(member.startswith("code/") for member in members):
        raise InputError("a TorchScript archive cannot be quantized", where=str(path), fix=HOW_TO_EXPORT)
    if "data.pkl" in members:
        return "torch_zip"
    raise InputError("a zip archive that holds no model of torch", where=str(path), fix=HOW_TO_LOAD)


# ------------------------------------------------------------------------------------------------------- exported


def _load_exported(path: Path, trust: bool) -> torch.export.ExportedProgram:
    if not trust:
        inspect_archive(path)
    try:
        # Given a name, torch warns of all that do not end in .pt2.
        with path.open("rb") as file, _silenced("torch.export"), weights_in_place(path):
            program = torch.export.load(file)
    except Exception as error:
        raise InputError(
            f"torch {torch.__version__} cannot load this torch.export archive: {_describe(error)}",
            where=str(path),
            fix=f"export the model again with this version of torch ({HOW_TO_EXPORT})",
        ) from error
    # `program.module()` compiles these strings of the file's and runs them unless told not to. The same conditions on
    # shapes are kept as data in `range_constraints` and in the shapes of the placeholders.
    program._guards_code = []
    return program


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """torch.export logs a traceback before it raises; the error carries all of it that helps."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# ------------------------------------------------------------------------------------- state_dict and pickled module


def _load_pickle(path: Path, trust: bool) -> Any:
    try:
        check_torch_file(path)
        return _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise InputError(
                f"a pickle that needs {found[1] if found else 'more than tensors'}: loading it would run its code",
                where=str(path),
                fix="save model.state_dict() and pass --factory, or pass --trust-model if you trust whoever made it",
            ) from error
    except Exception as error:
        raise _damaged(path, error) from error
    import_from_here()
    try:
        return _torch_load(path, weights_only=False)
    except (AttributeError, ImportError) as error:
        fix = "run where the module's class can be imported"
        raise InputError(f"cannot be unpickled: {_describe(error)}", where=str(path), fix=fix) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    with path.open("rb") as file:  # given a name, torch goes by its ending
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return map_safetensors(path)
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: sizes and nesting beyond what torch and json take
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"truncated or damaged: {_describe(error)}", where=str(path), fix="write the model again")


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors by name, also where a training checkpoint nests them."""
    for key in STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"holds a {type(content).__name__}, not a state_dict", where=str(path), fix=HOW_TO_LOAD)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{name!r} is a {type(value).__name__}, not a tensor",
                where=str(path),
                fix="save model.state_dict(), or a dict that holds it as 'state_dict'",
            )
    return dict(content)


def _fill(path: Path, state: dict[str, Tensor], factory: str | None) -> nn.Module:
    """The module that `factory` makes, with exactly the tensors of `state` in it."""
    if factory is None:
        raise InputError(
            "a state_dict holds weights but no network",
            where=str(path),
            fix="pass --factory pkg.mod:function, a function without arguments that returns the module",
        )
    make = resolve_callable(factory, "--factory")
    try:
        module = make()
    except (Exception, SystemExit) as error:
        raise InputError(f"{factory} failed: {_describe(error)}", where="--factory") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{factory} returned a {type(module).__name__}, not a torch.nn.Module", where="--factory")
    wanted = module.state_dict()
    state |= {name: state[tied] for name, tied in _tied_names(wanted, state)}
    faults = [
        ("missing", sorted(wanted.keys() - state.keys())),
        ("not in the module", sorted(state.keys() - wanted.keys())),
        (
            "of another shape",
            [
                f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
                for name in sorted(wanted.keys() & state.keys())
                if state[name].shape != wanted[name].shape
            ],
        ),
    ]
    if any(names for _, names in faults):
        what = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults if names)
        raise InputError(
            f"does not fit the module of {factory}: {what}", where=str(path), fix="give the factory of this checkpoint"
        )
    module.load_state_dict(state)
    return module


def _tied_names(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(absent name, present name) of one parameter: safetensors keeps only one name of tied weights."""
    present = {_identity(tensor): name for name, tensor in wanted.items() if name in state and tensor.numel()}
    for name, tensor in wanted.items():
        if name not in state and _identity(tensor) in present:
            yield name, present[_identity(tensor)]


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


# --------------------------------------------------------------------------------------------------- Hugging Face


def _load_huggingface(path: Path) -> Loaded:
    where = str(path)
    config_file = path / "config.json"
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        architectures = settings.get("architectures")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise InputError("is not a JSON object", where=str(config_file), fix="write it with save_pretrained") from error
    quantization = settings_of(path, settings)
    if not isinstance(architectures, list) or not architectures:
        raise InputError("names no architectures", where=str(config_file), fix="write it with model.save_pretrained")
    if not any(path.glob("*.safetensors")):
        raise InputError(
            "no *.safetensors beside config.json", where=where, fix="write the weights with model.save_pretrained"
        )
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "a Hugging Face folder needs transformers", where=where, fix="pip install 'qexport[hf]'"
        ) from error
    model_class = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise InputError(
            f"transformers {transformers.__version__} has no {architectures[0]}; code beside the weights is not run",
            where=where,
            fix=f"load it yourself and {HOW_TO_EXPORT}",
        )
    return _from_pretrained(path, model_class, quantization)


def _from_pretrained(path: Path, model_class: Any, quantization: Settings | None) -> Loaded:
    """Local files only, no code of the folder's; without a cache, and with attention as one operator, it exports."""
    from transformers.utils import logging as transformers_logging

    tensors, weights = _folder_tensors(path), {}
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs is untyped
    transformers_logging.set_verbosity(logging.CRITICAL)  # it logs tables about what our error says in a line
    try:
        config = model_class.config_class.from_pretrained(path, local_files_only=True)
        config.use_cache = False
        vars(config).pop("quantization_config", None)
        _check_layers(path, config.to_dict(), len(tensors))
        with torch.device("meta"):
            skeleton = model_class(config)
        if quantization is not None:
            quantized = read_quantized(path, quantization, tensors, skeleton)
            tensors, weights = quantized.tensors, quantized.weights
        _check_parameters(path, skeleton, tensors)
        module, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype="auto" if quantization is None else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and refused below
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"transformers cannot load this folder: {_describe(error)}",
            where=str(path),
            fix="write it again with model.save_pretrained",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # theirs is untyped
    if other := sorted(str(name) for name, *_ in info["mismatched_keys"]):
        raise InputError(
            f"weights of another shape than in config.json: {_listed(other)}",
            where=str(path),
            fix="write it again with model.save_pretrained",
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"weights are missing: {_listed(missing)}", where=str(path), fix="write it again with model.save_pretrained"
        )
    return Loaded("huggingface", path, module=module, weights=weights)


def _check_layers(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration of far more layers than there are tensors: building them could take for ever."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_layers(path, value, tensors)
        elif ("layer" in str(name) or "depth" in str(name)) and type(value) is int and value > MAX_LAYERS + tensors:
            what = f"{name} is {value}, but there are {tensors} tensors"
            raise InputError(what, where=str(path / "config.json"), fix="write it again with model.save_pretrained")


def _check_parameters(path: Path, skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of far more parameters than are stored: transformers makes room for the others."""
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    stored = sum(tensor.numel() for tensor in tensors.values())
    if wanted > MAX_ABSENT + 2 * stored:
        what = f"config.json asks for {wanted} parameters, but {stored} are stored"
        raise InputError(what, where=str(path), fix="write it again with model.save_pretrained")


def _folder_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of every safetensors file that belongs to the model, mapped."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        return _load_safetensors(single if single.is_file() else min(path.glob("*.safetensors")))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise _damaged(index, error) from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{name!r} is no file beside it", where=str(index), fix="write the model again")
        tensors |= _load_safetensors(path / name)
    return tensors


# ---------------------------------------------------------------------------------------------------------- weights


def _check_finite(loaded: Loaded) -> None:
    """No parameter is NaN or infinite, and no buffer or constant NaN: attention masks legitimately hold -inf."""
    parameters, buffers = _tensors(loaded)
    for name, tensor in parameters:
        _refuse(loaded.path, name, tensor, infinite=True)
        release([tensor])
    for name, tensor in buffers:
        _refuse(loaded.path, name, tensor, infinite=False)


Named = Iterable[tuple[str, Tensor]]


def _tensors(loaded: Loaded) -> tuple[Named, Named]:
    if loaded.module is not None:
        return loaded.module.named_parameters(), loaded.module.named_buffers()
    assert loaded.program is not None
    program = loaded.program
    constants = ((name, value) for name, value in program.constants.items() if isinstance(value, Tensor))
    return program.named_parameters(), [*program.named_buffers(), *constants]


def _refuse(path: Path, name: str, tensor: Tensor, *, infinite: bool) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return
    values = tensor.detach()
    if values.element_size() == 1:
        values = values.float()  # 8-bit floats have no isnan
    faulty = ~torch.isfinite(values) if infinite else torch.isnan(values)
    if bool(faulty.any()):
        kind = "NaN or infinite values" if infinite else "NaN values"
        raise InputError(
            f"{name} holds {int(faulty.sum())} {kind} of {tensor.numel()}",
            where=str(path),
            fix="a quantized model cannot be better than these weights: give an earlier checkpoint",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _describe(error: BaseException) -> str:
    """Type and first line: torch's messages go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
