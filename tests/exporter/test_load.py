"""Each kind of MODEL is told by its bytes and loads to the same outputs; each bad input is one line with the way in."""

import json
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from exporter.errors import InputError, InternalError, QExportError, TargetError
from exporter.load import load_model, resolve_callable

FACTORY_SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

def tied():
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    model.head.weight = model.embedding.weight
    return model

def fails():
    raise RuntimeError("no such dataset\\nsecond line")

def exits():
    raise SystemExit(3)

def returns_none():
    return None

number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the current directory, which is not on sys.path; its name."""
    name = "factories_of_a_user"
    (tmp_path / f"{name}.py").write_text(FACTORY_SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def error_of(path: Path, **options: Any) -> str:
    """The line of the InputError that loading `path` raises."""
    with pytest.raises(InputError) as refused:
        load_model(path, **options)
    assert refused.value.exit_code == 2
    line = str(refused.value)
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------ what is accepted

SAVERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "torch zip": lambda model, path: torch.save(model.state_dict(), path),
    "legacy torch": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "nested": lambda model, path: torch.save({"state_dict": model.state_dict(), "epoch": 3}, path),
    "nested under another name": lambda model, path: torch.save({"model_state_dict": model.state_dict()}, path),
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model"])
def test_a_state_dict_loads_into_the_module_of_the_factory(
    saver: str, name: str, factories: str, tmp_path: Path
) -> None:
    model = network().eval()
    SAVERS[saver](model, tmp_path / name)
    loaded = load_model(tmp_path / name, factory=f"{factories}:make")
    assert loaded.kind == "state_dict"
    assert loaded.module is not None
    assert not loaded.module.training
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    assert torch.equal(loaded.module(x), model(x))


def test_half_precision_weights_are_cast_to_the_factory_dtype(factories: str, tmp_path: Path) -> None:
    model = network().half()
    torch.save(model.state_dict(), tmp_path / "half.pt")
    loaded = load_model(tmp_path / "half.pt", factory=f"{factories}:make").module
    assert loaded is not None
    assert torch.equal(loaded.get_parameter("0.weight"), model.get_parameter("0.weight").float())


def test_tied_weights_may_be_stored_under_one_name(factories: str, tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    save_file({"embedding.weight": weight}, tmp_path / "tied.safetensors")
    module = load_model(tmp_path / "tied.safetensors", factory=f"{factories}:tied").module
    assert module is not None
    assert torch.equal(module.get_parameter("embedding.weight"), weight)
    assert module.get_submodule("head").weight is module.get_submodule("embedding").weight


def test_an_exported_program_loads_under_any_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network().eval()
    x = torch.ones(2, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    (tmp_path / "model.pt2").rename(tmp_path / "model.safetensors")
    caplog.clear()
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.kind == "exported"
    assert loaded.program is not None
    assert torch.equal(loaded.program.module(check_guards=False)(x), model(x))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_loads_with_trust(zipped: bool, tmp_path: Path) -> None:
    model = network()
    torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_model(tmp_path / "model.pt", trust=True)
    assert loaded.kind == "module"
    assert loaded.module is not None
    assert not loaded.module.training
    assert torch.equal(loaded.module.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_infinite_masks_are_let_through(tmp_path: Path) -> None:
    model = network()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf))
    torch.save(model, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt", trust=True).kind == "module"


# ------------------------------------------------------------------------------------------------------- bad files


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "absent.pt")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    assert "empty" in error_of(tmp_path / "model.pt")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "config.json" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (np.random.default_rng(0).bytes(1000), "not a model"),
        (b"x", "not a model"),
        (b"\x80\x04K\x01.", "torch.save did not write"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x93NUMPY" + bytes(100), "NumPy"),
        (b"\x10\0\0\0\0\0\0\0{" + b" " * 40, "damaged"),
        (b"\xff\xff\xff\xff\0\0\0\0{" + b" " * 40, "not a model"),
    ],
)
def test_bytes_of_something_else(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    line = error_of(tmp_path / "model.pt", trust=True)
    assert what in line


def save_state(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_exported(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model.eval(), (torch.ones(2, 4),)), path)


@pytest.mark.parametrize("save", [save_state, save_exported, SAVERS["legacy torch"], SAVERS["safetensors"]])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_truncated_files(save: Callable[[nn.Module, Path], None], kept: float, factories: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    save(network(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    error_of(path, factory=f"{factories}:make")


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.trace(network().eval(), torch.ones(2, 4)).save(tmp_path / "model.pt")
    line = error_of(tmp_path / "model.pt")
    assert "TorchScript" in line
    assert "torch.export.save" in line


@pytest.mark.parametrize("producer", ["", "someone"])
def test_onnx(producer: str, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    onnx.save(helper.make_model(graph, producer_name=producer), tmp_path / "model.pt")
    line = error_of(tmp_path / "model.pt")
    assert "ONNX" in line
    assert "torch.export.save" in line


def test_zip_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones(3))
    assert "holds no model" in error_of(tmp_path / "data.npz")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "holds no model" in error_of(tmp_path / "empty.zip")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_without_trust(zipped: bool, tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    line = error_of(tmp_path / "model.pt")
    assert "--trust-model" in line
    assert "torch.nn.modules" in line


class Executes:
    """Unpickles to an open marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_only_with_trust(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"weight": Executes(marker)}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert "--trust-model" in error_of(tmp_path / "model.pt")
    assert not marker.exists()
    error_of(tmp_path / "model.pt", trust=True)
    assert marker.exists()


def test_pickle_of_a_class_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(nn.Module):
        pass

    monkeypatch.setattr(sys.modules[__name__], "Gone", Gone, raising=False)
    Gone.__qualname__ = "Gone"
    torch.save(Gone(), tmp_path / "model.pt")
    monkeypatch.delattr(sys.modules[__name__], "Gone")
    assert "can be imported" in error_of(tmp_path / "model.pt", trust=True)


# ------------------------------------------------------------------------------------------ state_dict and factory


def test_state_dict_without_factory(tmp_path: Path) -> None:
    save_state(network(), tmp_path / "model.pt")
    assert "--factory" in error_of(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds a dict"),
        ({"lr": 0.1}, "'lr' is a float"),
        (torch.ones(3), "holds a Tensor"),
    ],
)
def test_torch_file_without_state_dict(content: Any, what: str, factories: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert what in error_of(tmp_path / "model.pt", factory=f"{factories}:make")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("fails", "RuntimeError: no such dataset"),
        ("exits", "SystemExit"),
        ("returns_none", "returned a NoneType"),
        ("absent", "has no absent"),
        ("number", "is a int, not a function"),
        ("", "pkg.mod:function"),
    ],
)
def test_factory_that_fails(function: str, what: str, factories: str, tmp_path: Path) -> None:
    save_state(network(), tmp_path / "model.pt")
    line = error_of(tmp_path / "model.pt", factory=f"{factories}:{function}")
    assert what in line
    assert line.startswith("--factory: ")


def test_factory_module_that_does_not_import(factories: str, tmp_path: Path) -> None:
    (tmp_path / "broken_of_a_user.py").write_text("import nowhere_to_be_found")
    with pytest.raises(InputError, match=r"--calib: importing broken_of_a_user failed: .*nowhere_to_be_found"):
        resolve_callable("broken_of_a_user:make", "--calib")
    with pytest.raises(InputError, match=r"--eval: .* is not of the form pkg\.mod:function"):
        resolve_callable("just_a_name", "--eval")


def test_missing_and_extra_keys_are_named(factories: str, tmp_path: Path) -> None:
    state = network().state_dict()
    del state["3.bias"]
    state |= {f"extra{index}": torch.ones(1) for index in range(5)}
    torch.save(state, tmp_path / "model.pt")
    line = error_of(tmp_path / "model.pt", factory=f"{factories}:make")
    assert "missing: 3.bias;" in line
    assert "not in the module: extra0, extra1, extra2 and 2 more" in line


def test_shapes_that_differ_are_named(factories: str, tmp_path: Path) -> None:
    state = network().state_dict() | {"0.weight": torch.ones(8, 5)}
    torch.save(state, tmp_path / "model.pt")
    assert "0.weight [8, 5] for [8, 4]" in error_of(tmp_path / "model.pt", factory=f"{factories}:make")


# --------------------------------------------------------------------------------------------- NaN and Inf weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("save", [save_state, save_exported])
def test_weights_that_are_not_finite_are_named(
    value: float, save: Callable[[nn.Module, Path], None], factories: str, tmp_path: Path
) -> None:
    model = network()
    model.get_parameter("0.weight").data[1, 2] = value
    save(model, tmp_path / "model.pt")
    line = error_of(tmp_path / "model.pt", factory=f"{factories}:make")
    assert "0.weight holds 1 NaN or infinite values of 32" in line


@pytest.mark.parametrize("save", [save_state, save_exported])
def test_buffers_that_are_nan_are_named(
    save: Callable[[nn.Module, Path], None], factories: str, tmp_path: Path
) -> None:
    model = network()
    model.get_buffer("1.running_var")[3] = torch.nan
    save(model, tmp_path / "model.pt")
    assert "1.running_var holds 1 NaN values of 8" in error_of(tmp_path / "model.pt", factory=f"{factories}:make")


def test_float8_weights_are_checked(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("codes", torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))
    torch.save(model, tmp_path / "model.pt")
    assert "codes holds 1 NaN" in error_of(tmp_path / "model.pt", trust=True)


# ---------------------------------------------------------------------------------------------------- Hugging Face


def tiny_opt() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.hf
@pytest.mark.parametrize("shard", ["1GB", "2KB"])
def test_a_hugging_face_folder_loads_and_exports(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_opt()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "2KB")
    capfd.readouterr()
    loaded = load_model(tmp_path)
    assert capfd.readouterr().err == ""
    assert loaded.kind == "huggingface"
    assert loaded.module is not None
    assert not loaded.module.training
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = torch.export.export(loaded.module, (ids,))
    assert torch.equal(program.module(check_guards=False)(ids).logits, model(ids).logits)
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "but no layer has qweight"),
        ({"architectures": None}, "names no architectures"),
        ({"architectures": ["MyOwnModel"], "auto_map": {"AutoModel": "own.MyOwnModel"}}, "has no MyOwnModel"),
        ({"architectures": ["AutoTokenizer"]}, "has no AutoTokenizer"),
        ({"hidden_size": 16}, "of another shape than in config.json"),
        ({"vocab_size": 1 << 31}, "are stored"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776, but there are"),
        ({"num_hidden_layers": 2}, "weights are missing"),
    ],
)
def test_hugging_face_config_that_does_not_fit(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    tiny_opt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert what in error_of(tmp_path)


def test_hugging_face_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "not a JSON object" in error_of(tmp_path)


def test_hugging_face_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "no *.safetensors" in error_of(tmp_path)


def test_hugging_face_without_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "qexport[hf]" in error_of(tmp_path)


# ---------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line_and_know_their_exit_code() -> None:
    error = QExportError("two\nlines", where="model.pt", fix="write it again")
    assert str(error) == "model.pt: two lines; write it again"
    assert str(QExportError("plain")) == "plain"
    assert "report it" in str(InternalError("a fault"))
    assert [kind("x").exit_code for kind in (QExportError, InternalError, InputError, TargetError)] == [1, 1, 2, 4]


def test_an_archive_that_would_swell_is_refused_before_it_does(factories: str, tmp_path: Path) -> None:
    stored, swollen = tmp_path / "stored", tmp_path / "swollen"
    torch.save({"weight": torch.zeros(64 << 20, dtype=torch.uint8)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(swollen, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert swollen.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "compressed members" in error_of(swollen, factory=f"{factories}:make")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # kB; the tensor has twice as much


@pytest.mark.parametrize("zipped", [True, False])
def test_a_name_that_torch_would_search_for_minutes_is_refused(zipped: bool, factories: str, tmp_path: Path) -> None:
    path, name = tmp_path / "model", b"[" * 200_000
    save_module = torch.save
    save_module(network(), path, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(path) as source:
            members = {member: source.read(member) for member in source.namelist()}
        with zipfile.ZipFile(path, "w") as target:
            for member, content in members.items():
                target.writestr(member, b"\x80\x02c" + name + b"\nx\n." if member.endswith("data.pkl") else content)
    else:
        magic = path.read_bytes().index(b".") + 1
        path.write_bytes(path.read_bytes()[:magic] + b"\x80\x02c" + name + b"\nx\n.")
    assert "a name of" in error_of(path, factory=f"{factories}:make")


def test_sizes_beyond_all_numbers_are_refused(factories: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged" in error_of(path, factory=f"{factories}:make")
    header = b'{"a":' * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged" in error_of(path, factory=f"{factories}:make")


def test_members_of_an_archive_cannot_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.pt2"
    path.parent.mkdir()
    save_exported(network(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/../../escaped", b"here")
    assert error_of(path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "model.pt2"]
