"""Archives that run code when torch loads them, each proven to, and refused.

Every attack creates a marker file. Most are small edits of one honest archive, made by rewriting its zip.
"""

import dataclasses
import io
import json
import pickle
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._export.serde import schema
from torch._export.serde.union import _Union
from torch.export import Dim

from exporter import archive
from exporter.archive import inspect_archive, is_expression, is_operator, is_tree
from exporter.errors import InputError
from exporter.load import load_model

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"

Members = dict[str, bytes]
Attack = Callable[[Members, Path], None]


class Touch:
    """Unpickles to an open marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


class Victim(nn.Module):
    """A weight, a constant, a dynamic dimension, a keyword, a nested dict and a subgraph: a place for each attack."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.offset = torch.ones(4)

    def forward(self, x: torch.Tensor, named: dict[str, torch.Tensor], *, scale: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) + self.offset + named["a"]
        with torch.no_grad():
            z = y * scale
        return y + z


INPUTS = (torch.ones(3, 4), {"a": torch.ones(4)})
KEYWORDS = {"scale": torch.ones(4)}


def write(members: Members, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(f"victim/{name}", content)
    return path


def read(path: Path) -> Members:
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Members:
    path = tmp_path_factory.mktemp("honest") / "victim.pt2"
    shapes = {"x": {0: Dim("batch")}, "named": {"a": None}, "scale": None}
    program = torch.export.export(Victim(), INPUTS, KEYWORDS, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return read(path)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A path without dots: some attacks paste it between the dots of a name."""
    path = Path(str(tmp_path).replace(".", "_")) / "marker"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def edited(member: str, change: Callable[[Any, str], None]) -> Attack:
    """The attack that changes the JSON of `member`; `change` gets it and Python source that creates the marker."""

    def attack(members: Members, marker: Path) -> None:
        content = json.loads(members[member])
        change(content, f"open('{marker}','w')")
        members[member] = json.dumps(content).encode()

    return attack


def replaced(member: str, old: str, new: str) -> Attack:
    """The attack that replaces the text `old` in JSON `member`; CODE in `new` creates the marker."""

    def attack(members: Members, marker: Path) -> None:
        before = members[member].decode()
        code = f"open('{marker}','w')"
        after = before.replace(json.dumps(old), json.dumps(new.replace("CODE", code)))
        assert after != before
        members[member] = after.encode()

    return attack


def in_both(*attacks: Attack) -> Attack:
    def attack(members: Members, marker: Path) -> None:
        for one in attacks:
            one(members, marker)

    return attack


def torch_pickle(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Touch(marker),), buffer)
    return buffer.getvalue()


def pickled(member: str) -> Attack:
    def attack(members: Members, marker: Path) -> None:
        members[member] = torch_pickle(marker)

    return attack


def pickled_payload(config: str, fqn: str, name: str, *, raw: bool = False) -> Attack:
    def attack(members: Members, marker: Path) -> None:
        payloads = json.loads(members[config])
        payloads["config"][fqn] |= {"use_pickle": True, "path_name": name, "tensor_meta": None}
        members[config] = json.dumps(payloads).encode()
        record = pickle.dumps(Touch(marker)) if raw else torch_pickle(marker)
        members[f"{config.rpartition('/')[0]}/{name}"] = record

    return attack


def graph(content: Any) -> Any:
    return content["graph_module"]["graph"]


def subgraph_node(content: Any) -> Any:
    return next(node for node in graph(content)["nodes"] if "higher_order" in node["target"])


def set_size(content: Any, expression: Any) -> None:
    graph(content)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = expression


def set_subgraph_size(content: Any, expression: str) -> None:
    argument = next(item["arg"]["as_graph"] for item in subgraph_node(content)["inputs"] if "as_graph" in item["arg"])
    for value in argument["graph"]["tensor_values"].values():
        value["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": None}}


def set_argument_names(content: Any, names: list[str] | None) -> None:
    content["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = names


def set_spec(name: str, change: Callable[[Any], None]) -> Callable[[Any, str], None]:
    def edit(content: Any, code: str) -> None:
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature[name])
        change(spec[1])
        signature[name] = json.dumps(spec)

    return edit


def set_keyword(content: Any, code: str) -> None:
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([f"scale={code}"])
    signature["in_spec"] = json.dumps(spec)
    signature["forward_arg_names"] = None


def import_by_enum(spec: Any) -> None:
    key = {"__enum__": True, "fqn": "evil_module:Kind", "name": "A"}
    spec["children_spec"][0]["children_spec"][1]["context"] = json.dumps([key])


def import_by_defaultdict(spec: Any) -> None:
    context = {"default_factory_module": "evil_module", "default_factory_name": "Kind", "dict_context": ["a"]}
    spec["children_spec"][0]["children_spec"][1] |= {"type": "collections.defaultdict", "context": context}


def set_target(target: str) -> Callable[[Any, str], None]:
    def edit(content: Any, code: str) -> None:
        graph(content)["nodes"][0]["target"] = target

    return edit


def call_in_subgraph(content: Any, code: str) -> None:
    """Nodes of subgraphs, unlike those of the main graph, are not looked at by torch's verifier."""
    argument = next(item["arg"]["as_graph"] for item in subgraph_node(content)["inputs"] if "as_graph" in item["arg"])
    node = argument["graph"]["nodes"][0]
    node |= {"target": "torch.os.system", "inputs": [{"name": "", "arg": {"as_string": ":"}, "kind": 1}]}


HARMFUL: dict[str, tuple[str, Attack]] = {
    "expr_str": (MODEL, edited(MODEL, set_size)),
    "expr_str inside a call": (MODEL, edited(MODEL, lambda c, code: set_size(c, f"Add(Integer(1), {code})"))),
    "expr_str of a subgraph": (MODEL, edited(MODEL, set_subgraph_size)),
    "name of an input": (
        MODEL,
        in_both(replaced(MODEL, "scale", "scale=CODE"), edited(MODEL, lambda c, _: set_argument_names(c, None))),
    ),
    "name of a parameter": (
        MODEL,
        in_both(
            replaced(MODEL, "linear.weight", 'linear"), CODE, getattr(self, "linear.weight'),
            replaced(WEIGHTS, "linear.weight", 'linear"), CODE, getattr(self, "linear.weight'),
        ),
    ),
    "name of an argument": (
        MODEL,
        edited(MODEL, lambda c, code: set_argument_names(c, ["x", "named", "scale", f"more={code}"])),
    ),
    "import by an enum key": (MODEL, edited(MODEL, set_spec("in_spec", import_by_enum))),
    "import by a defaultdict": (MODEL, edited(MODEL, set_spec("in_spec", import_by_defaultdict))),
    "pickle in a weight": (WEIGHTS, pickled_payload(WEIGHTS, "linear.weight", "weight_0")),
    "pickle in a constant": (CONSTANTS, pickled_payload(CONSTANTS, "offset", "tensor_0")),
    "pickle in an opaque object": ("archive", pickled_payload(CONSTANTS, "offset", "opaque_obj_0", raw=True)),
    "pickle in the sample inputs": (SAMPLES, pickled(SAMPLES)),
    "pickle in legacy weights": ("archive", pickled("data/weights/model.pt")),
    "pickle in legacy constants": ("archive", pickled("data/constants/model.pt")),
}


def load_unguarded(path: Path) -> None:
    """What any tool does with an archive: load it, take its module, run it."""
    with suppress(Exception):
        torch.export.load(path).module(check_guards=False)(*INPUTS, **KEYWORDS)


@pytest.mark.parametrize("name", HARMFUL)
def test_an_archive_that_runs_code_is_refused(
    name: str, honest: Members, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, attack = HARMFUL[name]
    (tmp_path / "evil_module.py").write_text(f"open('{marker}', 'w')\nKind = {{'A': 'a'}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "evil_module", None)  # so that what the load imports is forgotten after the test
    del sys.modules["evil_module"]
    members = dict(honest)
    attack(members, marker)
    path = write(members, tmp_path / "attack.pt2")

    with pytest.raises(InputError) as refused:
        load_model(path)
    assert not marker.exists()
    assert member in str(refused.value)
    assert "--trust-model" in str(refused.value)
    assert "\n" not in str(refused.value)

    load_unguarded(path)
    assert marker.exists(), "without the inspection this archive should have run its code"


def remove(members: Members, name: str) -> None:
    del members[name]


REFUSED: dict[str, tuple[str, Attack]] = {
    "expr_str that is a list": ("should be a string", edited(MODEL, lambda c, code: set_size(c, [code]))),
    "name of a keyword": ("in_spec", edited(MODEL, set_keyword)),
    "foreign operator": ("Node.target", edited(MODEL, set_target("torch.os.system"))),
    "operator of another library": ("Node.target", edited(MODEL, set_target("torch.ops.mylib.run.default"))),
    "operator that opens a file": ("Node.target", edited(MODEL, set_target("torch.ops.aten.from_file.default"))),
    "extension operator": ("Node.target", edited(MODEL, set_target("#evil:run"))),
    "foreign call in a subgraph": ("Node.target", edited(MODEL, call_in_subgraph)),
    "use_pickle alone": (
        "use_pickle",
        edited(WEIGHTS, lambda c, _: c["config"]["linear.weight"].update(use_pickle=True)),
    ),
    "custom object": ("custom_obj_0", pickled_payload(CONSTANTS, "offset", "custom_obj_0", raw=True)),
    "custom object as input": (
        "CustomObjArgument",
        edited(
            MODEL,
            lambda c, _: graph(c)["inputs"].append({"as_custom_obj": {"name": "o", "class_fqn": "__torch__.C"}}),
        ),
    ),
    "payload of another folder": (
        "PayloadMeta.path_name",
        edited(WEIGHTS, lambda c, _: c["config"]["linear.weight"].update(path_name="../constants/tensor_0")),
    ),
    "payload that is absent": (
        "not a stored tensor",
        edited(WEIGHTS, lambda c, _: c["config"]["linear.weight"].update(path_name="weight_77")),
    ),
    "foreign pytree type": (
        "out_spec",
        edited(MODEL, set_spec("out_spec", lambda spec: spec.update(type="torch.Size", context="null"))),
    ),
    "source function outside torch": (
        "source_fn_stack",
        edited(
            MODEL,
            lambda c, _: graph(c)["nodes"][0]["metadata"].update(source_fn_stack="a,torch.__dict__.__class__"),
        ),
    ),
    "field that no schema has": ("unknown field 'hook'", edited(MODEL, lambda c, _: c.update(hook="x"))),
    "number that is a string": (
        "should be an integer",
        edited(MODEL, lambda c, _: c["range_constraints"].update(s0={"min_val": "2", "max_val": None})),
    ),
    "symbol numbered to count for hours": (
        "range_constraints",
        edited(MODEL, lambda c, _: c["range_constraints"].update(u9999999999={"min_val": 2, "max_val": None})),
    ),
    "subgraph name": (
        "GraphArgument.name",
        edited(
            MODEL,
            lambda c, code: next(
                i["arg"]["as_graph"] for i in subgraph_node(c)["inputs"] if "as_graph" in i["arg"]
            ).update(name=f"a, {code}"),
        ),
    ),
    "verifier": ("verifiers", edited(MODEL, lambda c, _: c.update(verifiers=["EVIL"]))),
    "memory bomb": (
        "sizes do not fit",
        in_both(
            edited(
                WEIGHTS,
                lambda c, _: c["config"]["linear.weight"]["tensor_meta"].update(sizes=[{"as_int": 1 << 40}] * 2),
            ),
            lambda members, _: members.update({"data/weights/weight_0": b""}),
        ),
    ),
    "AOTInductor library": ("data/aotinductor", lambda m, _: m.update({"data/aotinductor/model/a.so": b"\x7fELF"})),
    "second model": ("models/other.json", lambda m, _: m.update({"models/other.json": m[MODEL]})),
    "member unknown": ("unknown member", lambda m, _: m.update({"data/executorch/x.pte": b""})),
    "member twice but for case": ("reads in two ways", lambda m, _: m.update({"models/Model.json": m[MODEL]})),
    "member missing": ("is missing", lambda m, _: remove(m, CONSTANTS)),
    "not JSON": ("is damaged", lambda m, _: m.update({MODEL: b"{"})),
    "JSON nested past the stack": ("is damaged", lambda m, _: m.update({MODEL: b"[" * 100_000})),
    "text that is not text": ("is damaged", lambda m, _: m.update({"extra/note": b"\xff\xfe"})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, honest: Members, marker: Path, tmp_path: Path) -> None:
    reason, attack = REFUSED[name]
    members = dict(honest)
    attack(members, marker)
    with pytest.raises(InputError) as refused:
        inspect_archive(write(members, tmp_path / "attack.pt2"))
    assert reason in str(refused.value)
    assert not marker.exists()


def test_an_archive_of_the_older_format_is_refused(honest: Members, marker: Path, tmp_path: Path) -> None:
    """torch.export.load falls back to a zip of pickles, which it reads with another reader."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("version", ".".join(map(str, schema.SCHEMA_VERSION)))
        file.writestr("serialized_exported_program.json", honest[MODEL])
        for name in ("state_dict", "constants", "example_inputs"):
            file.writestr(f"serialized_{name}.pt", torch_pickle(marker))
    with pytest.raises(InputError, match=r"before 2\.8"):
        load_model(path)
    assert not marker.exists()
    load_unguarded(path)
    assert marker.exists()


def test_compressed_members_are_refused(honest: Members, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in honest.items():
            file.writestr(f"victim/{name}", content)
    with pytest.raises(InputError, match="compressed"):
        inspect_archive(path)


def test_duplicate_members_are_refused(honest: Members, tmp_path: Path) -> None:
    path = write(honest, tmp_path / "twice.pt2")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(f"victim/{MODEL}", honest[MODEL])
    with pytest.raises(InputError, match="same name"):
        inspect_archive(path)


def test_trust_skips_the_inspection(honest: Members, tmp_path: Path) -> None:
    path = write(honest | {"data/notes.txt": b"mine"}, tmp_path / "odd.pt2")
    with pytest.raises(InputError, match="unknown member"):
        load_model(path)
    assert load_model(path, trust=True).program is not None


def test_guards_of_the_file_are_never_run(honest: Members, marker: Path, tmp_path: Path) -> None:
    """The load keeps them as text, and `module()` would compile them: a loaded program has none."""
    members = dict(honest)
    edited(MODEL, lambda c, code: c.update(guards_code=[f"{code} is not None"]))(members, marker)
    path = write(members, tmp_path / "guards.pt2")
    program = load_model(path).program
    assert program is not None
    program.module()(*INPUTS, **KEYWORDS)
    assert not marker.exists()
    torch.export.load(path).module()(*INPUTS, **KEYWORDS)
    assert marker.exists()


class Keyed(nn.Module):
    def forward(self, named: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        return named["a"] * 2 if mode == "m" else named["a"]


def in_string_input(members: Members, marker: Path) -> None:
    code = f"m' or open('{marker}','w') or '"
    content = json.loads(members[MODEL])
    constant = content["graph_module"]["signature"]["input_specs"][1]["constant_input"]["value"]
    for value in (graph(content)["inputs"][1], constant):
        assert value == {"as_string": "m"}
        value["as_string"] = code
    members[MODEL] = json.dumps(content).encode()


def in_sample_key(members: Members, marker: Path) -> None:
    key = f'a", open("{marker}","w"), "'
    buffer = io.BytesIO()
    torch.save((({key: torch.ones(4)}, "m"), {}), buffer)
    members[SAMPLES] = buffer.getvalue()


@pytest.mark.parametrize(("attack", "member"), [(in_string_input, MODEL), (in_sample_key, SAMPLES)])
def test_text_in_the_source_of_guards_is_refused(attack: Attack, member: str, marker: Path, tmp_path: Path) -> None:
    """Guards on inputs are made from their keys and values, also where the file brings none of its own."""
    path = tmp_path / "keyed.pt2"
    torch.export.save(torch.export.export(Keyed(), ({"a": torch.ones(4)}, "m")), path)
    members = read(path)
    attack(members, marker)
    write(members, path)
    with pytest.raises(InputError, match=member):
        load_model(path)
    assert not marker.exists()
    with suppress(Exception):
        torch.export.load(path).module()({"a": torch.ones(4)}, "other")
    assert marker.exists()


def string_fields(cls: type, seen: set[type]) -> Iterator[str]:
    """Every "Class.field" of the schema below `cls` that holds strings."""
    if cls in seen:
        return
    seen.add(cls)
    for name, hint in typing.get_type_hints(cls, globalns=vars(schema)).items():
        for part in flattened(hint):
            if part is str:
                yield f"{cls.__name__}.{name}"
            elif isinstance(part, type) and (dataclasses.is_dataclass(part) or issubclass(part, _Union)):
                yield from string_fields(part, seen)


def flattened(hint: Any) -> Iterator[Any]:
    """The leaves of a type: values only, keys of dicts have rules of their own."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        arguments = arguments[1:]
    if not arguments:
        yield hint
    for argument in arguments:
        yield from flattened(argument)


def test_every_string_of_the_schema_has_a_rule_or_is_refused_on_purpose() -> None:
    fields = {*string_fields(schema.ExportedProgram, set()), *string_fields(schema.PayloadConfig, set())}
    refused = {
        "CustomObjArgument.name",  # custom objects are unpickled
        "CustomObjArgument.class_fqn",
        "InputToCustomObjSpec.custom_obj_name",
        "Argument.as_operator",  # an operator as an argument: no export of a plain network holds one
        "NamedTupleDef.field_names",  # named tuples are classes of the user's
        "Node.metadata",  # by METADATA_RULES
    }
    assert fields - set(archive.STRING_RULES) == refused


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s77', positive=True, integer=True))",
        "Add(FloorDiv(Add(Symbol('s0', integer=True), Integer(-1)), Integer(2)), Integer(1))",
        "Max(Integer(0), Symbol('u0', integer=True))",
        "Pow(Symbol('s0'), Integer(-1))",
        "Float('0.5', precision=53)",
        "Rational(1, 2)",
        "StrictLessThan(Symbol('u0'), Integer(9223372036854775807))",
        "true",
        "oo",
    ],
)
def test_expressions_that_torch_prints_are_let_through(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "exec",
        "__import__('os')",
        "Integer(exec('1'))",
        "Symbol('s0').__class__",
        "Symbol('exec')",
        "Symbol('s0', positive=exec('1'))",
        "Float('__import__')",
        "Function('f')(1)",
        "sympify('1')",
        "Lambda(x, 1)",
        "[x for x in (1,)]",
        "Add(*(1, 2))",
        "Add(1, **{})",
        "Integer(1)\nexec('1')",
        "Integer(1) # exec",
        "\N{DOUBLE-STRUCK ITALIC SMALL E}xec(1)",
        "Pow(Integer(9), Integer(10000000000))",
        "Integer(" * 3000 + "1" + ")" * 3000,
        "",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    assert not is_expression(text)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("torch.ops.aten.linear.default", True),
        ("torch.ops.aten.__and__.Tensor", True),
        ("torch.ops.aten.sym_size.int", True),
        ("_operator.floordiv", True),
        ("torch.sym_max", True),
        ("torch.ops.higher_order.wrap_with_set_grad_enabled", True),
        ("torch.ops.aten.linear", False),
        ("torch.ops.aten.linear.nonsense", False),
        ("torch.ops.aten.__class__.mro", False),
        ("torch.ops.load_library", False),
        ("torch.hub.load", False),
        ("_operator.attrgetter", False),
        ("_operator.methodcaller", False),
        ("builtins.eval", False),
    ],
)
def test_operators(target: str, allowed: bool) -> None:
    assert is_operator(target) is allowed


def test_trees() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    assert is_tree(json.dumps([1, {"type": "builtins.dict", "context": '["a", 1]', "children_spec": [leaf, leaf]}]))
    assert not is_tree(json.dumps([2, leaf]))
    assert not is_tree(
        json.dumps([1, {"type": "builtins.dict", "context": '[{"__enum__": 1}]', "children_spec": [leaf]}])
    )
    assert not is_tree(
        json.dumps([1, {"type": "transformers.modeling_outputs.os", "context": "[]", "children_spec": []}])
    )
    assert not is_tree("[")


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("transformers.modeling_outputs.BaseModelOutput", True),
        ("transformers.models.swin.modeling_swin.SwinImageClassifierOutput", True),
        ("transformers.models.swin.modeling_swin.SwinModel", False),
        ("transformers.models.swin.modeling_swin.torch.Tensor", False),
        ("transformers.models.swin.configuration_swin.SwinConfig", False),
        ("transformers.utils.os", False),
    ],
)
def test_trees_of_model_outputs(kind: str, allowed: bool) -> None:
    pytest.importorskip("transformers")
    assert is_tree(json.dumps([1, {"type": kind, "context": "[]", "children_spec": []}])) is allowed
