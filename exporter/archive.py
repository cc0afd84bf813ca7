"""The inspection of a torch.export archive (.pt2) before `torch.export.load`: loading runs no code of the file's.

`torch.export.load` turns a file into code in more ways than unpickling. Read off torch 2.13 (`torch/_export/serde`,
`torch/export/pt2_archive`, `torch/fx/graph.py`), these are the roads, and what stands on each:

1. pickle: payloads with `use_pickle`, `custom_obj_*` and `opaque_obj_*` constants, legacy `data/weights/model.pt` and
   `data/constants/model.pt`, and sample inputs, which fall back to an unsafe load when the safe one fails. All but the
   last are refused; sample inputs must pass the safe load, on the bytes torch will read, so that it never falls back.
2. sympify: each `expr_str` is evaluated by sympy with Python's builtins in reach. It must parse to calls of the
   expressions torch itself prints, over symbols and numbers.
3. code generation: names of values, arguments, parameters and submodules are pasted into the source text of the graph's
   `forward`, which is compiled and executed during the load; keys and string inputs into that of the guards which
   `ExportedProgram.module()` makes. Each must be one identifier, a dotted name, or text without quotes.
4. pytree specs: the context of a dict, and of a defaultdict, may name a module to import. Only tuple, list, dict,
   OrderedDict and the outputs of transformers are let through, with contexts of plain keys.
5. operators: `target` is an attribute path from `torch`, `operator` or `math`, called when the graph runs. It must be
   an aten operator, or one of a short list of functions of symbolic numbers.
6. native code: AOTInductor libraries and other members are refused by name, as is every member not named below.

The JSON is checked against torch's own schema classes, and each string field of the schema has a rule here: a field
without a rule, as a later torch may add, is refused. So are compressed members, which bounds memory by the file's size.
"""

import ast
import dataclasses
import enum
import functools
import importlib
import io
import json
import keyword
import math
import re
import types
import typing
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union as SchemaUnion
from torch.utils import _pytree

from exporter.errors import InputError

Rule = Callable[[str], bool]

MODEL_JSON = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
PAYLOAD_CONFIGS = {
    "data/weights/model_weights_config.json": "weight_",
    "data/constants/model_constants_config.json": "tensor_",
}
_REQUIRED = {"archive_format", "archive_version", MODEL_JSON, SAMPLE_INPUTS, *PAYLOAD_CONFIGS}
_MARKS = {".data/version", ".data/serialization_id", ".format_version", ".storage_alignment", "byteorder"}
_NUMBERED_OR_EXTRA = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/.+")

MAX_JSON_BYTES = 1 << 28  # 50,000 nodes take about 50 MB
MAX_TEXT_BYTES = 1 << 24
MAX_EXPANDED = 1 << 28  # elements a stored tensor may claim beyond its bytes: an expanded mask has stride 0
MAX_EXPRESSION_CHARS = 1 << 14
MAX_EXPONENT = 64


class _Refused(Exception):
    """A member, or a place in one, that the inspection does not let through."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.place = place

    def within(self, place: str) -> "_Refused":
        return _Refused(self.what, f"{place}{self.place}")


def inspect_archive(path: Path) -> None:
    """Raise `InputError`, naming the member, unless loading the archive at `path` runs no code of the file's."""
    member = "archive"
    try:
        reader, names = _open(path)
        member = SAMPLE_INPUTS
        _check_sample_inputs(reader.get_record(SAMPLE_INPUTS))
        member = MODEL_JSON
        model = _read_json(reader, MODEL_JSON)
        _check_value(schema.ExportedProgram, model, "")
        _check_string_inputs(model["graph_module"]["graph"]["inputs"])
        for member, prefix in PAYLOAD_CONFIGS.items():
            config = _read_json(reader, member)
            _check_value(schema.PayloadConfig, config, "")
            _check_payloads(config["config"], member.rpartition("/")[0], prefix, reader, names)
        for member in (name for name in names if name.startswith("extra/")):
            _decode(reader, member)
    except _Refused as refusal:
        place = f"{member}, {refusal.place.removeprefix('.')}" if refusal.place else member
        raise InputError(
            f"{place}: {refusal.what}",
            where=str(path),
            fix="refused, as loading it could run code: if you trust whoever made the file, pass --trust-model",
        ) from None
    except Exception as error:  # readers of zips, JSON and pickles meet damage with whatever comes first
        raise InputError(
            f"{member} is damaged ({_short(error)})", where=str(path), fix="write it again with torch.export.save"
        ) from error


# ---------------------------------------------------------------------------------------------------------- members


def _open(path: Path) -> tuple[Any, set[str]]:
    """The reader torch itself will use and the names of the members, after checking names, sizes and compression."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    _check_members(members, path.stat().st_size)
    if any(member.filename.endswith("serialized_exported_program.json") for member in members):
        raise _Refused("written by torch before 2.8, which pickled the weights")
    root = members[0].filename.partition("/")[0] + "/"
    names = [member.filename.removeprefix(root) for member in members]
    reader = torch._C.PyTorchFileReader(str(path))
    # Two readers of one zip can be made to disagree, and torch's finds members regardless of case.
    if sorted(names) != sorted(reader.get_all_records()) or len({name.lower() for name in names}) != len(names):
        raise _Refused("members with the same name, or a zip directory that reads in two ways")
    for name in names:
        if name not in _REQUIRED and name not in _MARKS and not _NUMBERED_OR_EXTRA.fullmatch(name):
            raise _Refused(f"unknown member {_short(name)}")
    if missing := sorted(_REQUIRED.difference(names)):
        raise _Refused(f"member {missing[0]} is missing")
    return reader, set(names)


def _check_members(members: list[zipfile.ZipInfo], stored_bytes: int) -> None:
    """torch writes members uncompressed; then no set of members can claim more bytes than the file has."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _Refused("compressed members, which torch.export.save does not write")
    if sum(member.file_size for member in members) > stored_bytes:
        raise _Refused("members that overlap, or are larger than the file")


def _decode(reader: Any, name: str) -> str:
    if reader.get_record_size(name) > (MAX_JSON_BYTES if name.endswith(".json") else MAX_TEXT_BYTES):
        raise _Refused("is too large")
    return typing.cast(bytes, reader.get_record(name)).decode()


def _read_json(reader: Any, name: str) -> Any:
    return json.loads(_decode(reader, name))


def _check_sample_inputs(record: bytes) -> None:
    if not record:
        return
    if zipfile.is_zipfile(io.BytesIO(record)):
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            _check_members(archive.infolist(), len(record))
    try:
        inputs = torch.load(io.BytesIO(record), weights_only=True)
    except Exception as error:  # whatever fails here would make torch try again with the unsafe unpickler
        raise _Refused("sample inputs hold more than tensors and plain values (weights-only loading failed)") from error
    if not isinstance(inputs, (tuple, dict)):
        raise _Refused(f"sample inputs are a {type(inputs).__name__}, not a tuple")
    for path, _ in _pytree.tree_leaves_with_path(inputs):
        for step in path:
            if isinstance(step, _pytree.MappingKey) and not is_plain(str(step.key)):
                raise _Refused(f"sample inputs have the key {_short(step.key)}")


def _check_string_inputs(inputs: list[dict[str, Any]]) -> None:
    """A string that is an input of the graph ends up in the source of the guards, unlike an operator's."""
    for value in inputs:
        if not is_plain(value.get("as_string", "")):
            raise _Refused(f"{_short(value)} is not allowed as an input")


def _check_payloads(payloads: dict[str, Any], folder: str, prefix: str, reader: Any, names: set[str]) -> None:
    for fqn, payload in payloads.items():
        place, name = f"config[{_short(fqn)}]", payload["path_name"]
        if payload["use_pickle"]:
            raise _Refused("use_pickle is set: the payload is a pickle", place)
        if not re.fullmatch(rf"{prefix}\d+", name) or f"{folder}/{name}" not in names:
            raise _Refused(f"payload {_short(name)} is not a stored tensor", place)
        meta = payload["tensor_meta"]
        if meta is None:
            raise _Refused("no tensor_meta: not a tensor", place)
        sizes = [size.get("as_int", -1) for size in meta["sizes"]]
        stored = reader.get_record_size(f"{folder}/{name}")
        # An empty record makes torch allocate what the sizes ask for.
        if min(sizes, default=0) < 0 or math.prod(sizes) > (max(stored, MAX_EXPANDED) if stored else 0):
            raise _Refused("sizes do not fit the stored bytes", place)


# ----------------------------------------------------------------------------------------------- JSON against schema


@functools.cache
def _fields(cls: type) -> Mapping[str, Any]:
    return typing.get_type_hints(cls, globalns=vars(schema))


def _check_value(hint: Any, data: Any, key: str) -> None:
    """`data` is of type `hint`, all the way down; `key`, "Class.field", is where the rule for a string is found."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is not None:
            _check_value(next(part for part in arguments if part is not type(None)), data, key)
    elif origin is list:
        _expect(isinstance(data, list), data, "a list")
        for index, item in enumerate(data):
            _check_at(f"[{index}]", arguments[0], item, key)
    elif origin is dict:
        _expect(isinstance(data, dict), data, "an object")
        _check_dict(arguments[1], data, key)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _check_record(hint, data)
    elif hint is str:
        _expect(isinstance(data, str), data, "a string")
        _check_string(STRING_RULES, key, data)
    elif hint is float:
        _expect(type(data) in (int, float) or data in ("Infinity", "-Infinity", "NaN"), data, "a number")
    elif hint is bool:
        _expect(type(data) is bool, data, "true or false")
    elif hint is int or (isinstance(hint, type) and issubclass(hint, enum.IntEnum)):
        _expect(type(data) is int, data, "an integer")
    else:
        raise _Refused(f"{key} has a type this version of qexport does not know")


def _check_at(place: str, hint: Any, data: Any, key: str) -> None:
    try:
        _check_value(hint, data, key)
    except _Refused as refusal:
        raise refusal.within(place) from None


def _check_record(cls: type, data: Any) -> None:
    _expect(isinstance(data, dict), data, "an object")
    hints = _fields(cls)
    if unknown := sorted(set(data).difference(hints)):
        raise _Refused(f"unknown field {_short(unknown[0])} of {cls.__name__}")
    if issubclass(cls, SchemaUnion):
        _expect(len(data) == 1, data, "an object with one key")
    else:
        required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]  # type: ignore[arg-type]  # a dataclass
        if missing := sorted(set(required).difference(data)):
            raise _Refused(f"field {missing[0]} of {cls.__name__} is missing")
    for name, value in data.items():
        _check_at(f".{name}", hints[name], value, f"{cls.__name__}.{name}")


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_dict(hint: Any, data: dict[str, Any], key: str) -> None:
    for name, value in data.items():
        _check_string(KEY_RULES, key, name)
        if key == "Node.metadata":
            _expect(isinstance(value, str), value, "a string")
            _check_string(METADATA_RULES, name, value)
        else:
            _check_at(f"[{_short(name)}]", hint, value, key)


def _check_string(rules: Mapping[str, Rule], key: str, text: str) -> None:
    if key not in rules:
        raise _Refused(f"{key} is not something this version of qexport understands")
    if not rules[key](text):
        raise _Refused(f"{_short(text)} is not allowed as {key}")


def _expect(fits: bool, data: Any, kind: str) -> None:
    if not fits:
        raise _Refused(f"{_short(data)} should be {kind}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------ rules for strings


def is_name(text: str) -> bool:
    """One Python identifier: all it can do in generated source is name something."""
    return text.isidentifier() and not keyword.iskeyword(text)


def is_name_or_empty(text: str) -> bool:
    return text == "" or is_name(text)


def is_dotted(text: str) -> bool:
    """A path such as `layers.0.weight`: no quote or backslash to end a string with, no dunder to climb out by."""
    return all(re.fullmatch(r"[\w :/+>@-]+", part) and not _is_dunder(part) for part in text.split("."))


def is_dotted_or_empty(text: str) -> bool:
    return text == "" or is_dotted(text)


def is_text(text: str) -> bool:
    """Anything: torch keeps it as a value, or quotes it with repr."""
    return True


def is_plain(text: str) -> bool:
    """Text that cannot end a string literal it is pasted into."""
    return (text == "" or text.isprintable()) and not set(text) & {"'", '"', "\\"}


def _is_dunder(part: str) -> bool:
    return part.startswith("__") and part.endswith("__")


def is_range_name(text: str) -> bool:
    """A dimension as printed: compared, never parsed; but torch counts up to the number of an unbacked symbol."""
    return bool(re.fullmatch(r"(u|zuf)\d{1,6}|(?!u|zuf)[\w +*/%(),.-]{1,1000}", text))


# fmt: off
CALLABLES = frozenset((
    "Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "floor", "ceiling", "And", "Or", "Not", "Xor",
    "Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "StrictGreaterThan", "LessThan",
    "GreaterThan", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt",
    "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat",
    "Identity",
))
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
CONSTANTS = frozenset({"true", "false", "oo", "nan", "zoo"})
ASSUMPTIONS = frozenset((
    "integer", "positive", "negative", "nonnegative", "nonpositive", "zero", "nonzero", "real", "extended_real",
    "finite", "infinite", "rational", "even", "odd", "commutative", "complex",
))
# fmt: on


def is_expression(text: str) -> bool:
    """A sympy expression as torch prints it: Mul(Integer(2), Symbol('s77', positive=True, integer=True))."""
    # sympify drops newlines and rewrites some operators before it parses; without them both parsers see the same text.
    if len(text) > MAX_EXPRESSION_CHARS or not re.fullmatch(r"[\w ('),.=-]*", text, re.ASCII):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return _is_expression_node(tree.body)


def _is_expression_node(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=bool() | int() | float() as number):
            return abs(number) <= 1 << 64
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return _is_expression_node(node.operand)
        case ast.Name(id=name):
            return name in CONSTANTS
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            return bool(re.fullmatch(r"[a-z]{1,4}\d{1,9}", name)) and all(map(_is_assumption, keywords))
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=keywords):
            return bool(re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d{1,3})?", digits)) and all(
                option.arg == "precision" and _is_expression_node(option.value) for option in keywords
            )
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name in POWERS and len(arguments) == 2 and not _is_small_exponent(arguments[1]):
                return False
            return name in CALLABLES and all(_is_expression_node(argument) for argument in arguments)
    return False


def _is_assumption(option: ast.keyword) -> bool:
    return option.arg in ASSUMPTIONS and isinstance(option.value, ast.Constant) and type(option.value.value) is bool


def _is_small_exponent(node: ast.expr) -> bool:
    """A symbol or a small number: sympy would spend hours on Pow(Integer(9), Integer(10000000000))."""
    literals = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and type(part.value) is int]
    nested = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    return len(nested) <= 1 and all(literal <= MAX_EXPONENT for literal in literals)


# fmt: off
PLAIN_FUNCTIONS = frozenset((
    "_operator.eq", "_operator.ne", "_operator.le", "_operator.ge", "_operator.lt", "_operator.gt", "_operator.neg",
    "_operator.pos", "_operator.mul", "_operator.add", "_operator.sub", "_operator.floordiv", "_operator.mod",
    "_operator.pow", "_operator.truediv", "_operator.and_", "_operator.or_", "_operator.lshift", "_operator.rshift",
    "_operator.getitem", "torch.sym_not", "torch.sym_int", "torch.sym_float", "torch.sym_ite", "torch.sym_max",
    "torch.sym_min", "torch.sym_sqrt", "math.trunc",
))
# fmt: on
HIGHER_ORDER = frozenset(
    {
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "torch.ops.higher_order.wrap_with_autocast",
        "torch.ops.higher_order.cond",
    }
)
FILE_OPERATORS = frozenset({"aten::from_file"})  # maps, and may create, a file of the caller's choice


@functools.cache
def is_operator(target: str) -> bool:
    """An aten operator, a function of symbolic numbers, or one of the higher-order operators that exports contain."""
    if target in PLAIN_FUNCTIONS or target in HIGHER_ORDER:
        return True
    parts = target.split(".")
    if len(parts) != 5 or parts[:3] != ["torch", "ops", "aten"] or not all(is_name(part) for part in parts):
        return False
    overload = getattr(getattr(torch.ops.aten, parts[3], None), parts[4], None)
    return isinstance(overload, torch._ops.OpOverload) and overload._schema.name not in FILE_OPERATORS


def is_source_fns(text: str) -> bool:
    """`name,function;...`: torch looks a function up by attributes when it starts with a module of its own."""
    return not any(_is_dunder(part) for item in text.split(";") for part in item.partition(",")[2].split(".")[1:])


TREE_TYPES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
MODEL_OUTPUTS = re.compile(
    r"(transformers\.(?:modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+))\.[A-Za-z0-9_]+"
)
"""The outputs that transformers' models share, and those of one architecture, which lie beside it."""


def is_tree(text: str) -> bool:
    """A serialized pytree whose contexts are plain keys: an object in a context may name a module to import."""
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return protocol == 1 and _is_tree_node(tree)


def is_input_tree(text: str) -> bool:
    """As `is_tree`; where the root is (args, kwargs), the keys of kwargs become parameters in generated source."""
    if not is_tree(text):
        return False
    root = json.loads(text)[1]
    children = root["children_spec"]
    if len(children) != 2 or children[1]["type"] != "builtins.dict":
        return True
    return all(isinstance(name, str) and is_name(name) for name in json.loads(children[1]["context"]))


def _is_tree_node(node: Any) -> bool:
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        return False
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list) or not all(_is_tree_node(child) for child in children):
        return False
    if kind is None:
        return context is None and not children
    if not isinstance(kind, str) or not isinstance(context, str) or not _is_tree_type(kind):
        return False
    keys = json.loads(context)
    return keys is None or (isinstance(keys, list) and all(map(_is_tree_key, keys)))


def _is_tree_key(key: Any) -> bool:
    return is_plain(key) if isinstance(key, str) else type(key) in (int, bool)


def _is_tree_type(kind: str) -> bool:
    if found := MODEL_OUTPUTS.fullmatch(kind):
        # Importing our own dependency registers its outputs as pytrees; the file's word only has to be among them.
        try:
            importlib.import_module(found[1])
        except ImportError as error:
            raise _Refused(
                f"output type {_short(kind)} needs a transformers that has it: pip install 'qexport[hf]'"
            ) from error
        return kind in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    return kind in TREE_TYPES


def is_one_of(*values: str) -> Rule:
    return lambda text: text in values


METADATA_RULES: Mapping[str, Rule] = {
    "stack_trace": is_text,
    "nn_module_stack": is_text,
    "source_fn_stack": is_source_fns,
    "torch_fn": is_text,
    "custom": is_text,
    "from_node": is_text,
}

KEY_RULES: Mapping[str, Rule] = {
    "Graph.tensor_values": is_name,
    "Graph.sym_int_values": is_name,
    "Graph.sym_bool_values": is_name,
    "Graph.sym_float_values": is_name,
    "Node.metadata": METADATA_RULES.__contains__,
    "GraphModule.metadata": is_one_of("custom"),
    "ExportedProgram.opset_version": is_name,
    "ExportedProgram.range_constraints": is_range_name,
    "PayloadConfig.config": is_dotted,
}

STRING_RULES: Mapping[str, Rule] = {
    "Device.type": is_one_of("cpu", "cuda", "mps", "xpu"),
    "SymExpr.expr_str": is_expression,
    "SymIntArgument.as_name": is_name,
    "SymFloatArgument.as_name": is_name,
    "SymBoolArgument.as_name": is_name,
    "TensorArgument.name": is_name,
    "TokenArgument.name": is_name,
    "GraphArgument.name": is_name,
    "NamedArgument.name": is_name_or_empty,
    "Node.name": is_name,
    "Node.target": is_operator,
    "Argument.as_string": is_text,
    "Argument.as_strings": is_text,
    "ConstantValue.as_string": is_plain,
    "InputToConstantInputSpec.name": is_name,
    "InputToParameterSpec.parameter_name": is_dotted,
    "InputToBufferSpec.buffer_name": is_dotted,
    "InputToTensorConstantSpec.tensor_constant_name": is_dotted,
    "BufferMutationSpec.buffer_name": is_dotted,
    "ParameterMutationSpec.parameter_name": is_dotted,
    "GradientToParameterSpec.parameter_name": is_dotted,
    "GradientToUserInputSpec.user_input_name": is_name,
    "UserInputMutationSpec.user_input_name": is_name,
    "ModuleCallSignature.in_spec": is_input_tree,
    "ModuleCallSignature.out_spec": is_tree,
    "ModuleCallSignature.forward_arg_names": is_name,
    "ModuleCallEntry.fqn": is_dotted_or_empty,
    "GraphModule.metadata": is_text,
    "ExportedProgram.verifiers": is_one_of("", "ATEN", "TRAINING"),
    "ExportedProgram.torch_version": is_text,
    # Kept as text by the load; `ExportedProgram.module()` would run them, so load.py drops them.
    "ExportedProgram.guards_code": is_text,
    "PayloadMeta.path_name": is_dotted,
}
