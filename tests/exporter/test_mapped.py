"""Safetensors files mapped into memory: the same tensors as the format's own library reads, damage refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.load import load_model
from exporter.mapped import DTYPES, ORDER, map_safetensors, save_safetensors
from passes.memory import is_mapped


def test_every_type_as_saved(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        str(index): torch.randint(0, 2, (3, index % 4, 5)).to(dtype) for index, dtype in enumerate(DTYPES.values())
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = map_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8))


def test_a_file_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    assert sorted(ORDER) == sorted(DTYPES)
    tensors = {
        f"{name} {index}": torch.randint(0, 2, (3, index % 4, 5)).to(dtype)
        for index, dtype in enumerate(DTYPES.values())
        for name in ("a.weight", "Z", '_\u00e4"\\\n')
    }
    tensors["scalar"] = torch.tensor(1.5)
    metadata = {"qexport": json.dumps({"a": [1, "\u00e4\t"]})}
    save_file(tensors, tmp_path / "library", metadata=metadata)
    save_safetensors(tmp_path / "own", tensors, metadata)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(64, 64)}, path)
    assert is_mapped(map_safetensors(path)["a"])


def _write(path: Path, header: object, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_values_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    body = torch.tensor([1.0, 2.0]).numpy().tobytes()
    for padding in range(4):  # one of these headers ends off a multiple of four
        _write(path, {"a" * (padding + 1): {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, body)
        assert next(iter(map_safetensors(path).values())).tolist() == [1.0, 2.0]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (ENTRY | {"dtype": "F33"}, "type 'F33' is not known"),
        (ENTRY | {"shape": [3]}, "are not the bytes 0 to 8 of 8"),
        (ENTRY | {"shape": [-2]}, "not given in whole numbers"),
        (ENTRY | {"shape": [1 << 62, 1 << 62]}, "are not the bytes"),
        (ENTRY | {"data_offsets": [4, 12]}, "are not the bytes 4 to 12 of 8"),
        (ENTRY | {"data_offsets": [0, 8, 8]}, "not given in whole numbers"),
        (ENTRY | {"data_offsets": [True, 8]}, "not given in whole numbers"),
        ("a string", "is no JSON object"),
    ],
)
def test_damage_is_named(tmp_path: Path, entry: object, reason: str) -> None:
    path = tmp_path / "m.safetensors"
    _write(path, {"weight": entry}, bytes(8))
    with pytest.raises(ValueError, match=reason) as found:
        map_safetensors(path)
    assert "weight" in str(found.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        map_safetensors(path)


class Counting(nn.Module):
    """Two layers that share a weight, one of a type of 2 bytes, and a buffer that each run writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.narrow = nn.Parameter(torch.randn(7).bfloat16())
        self.empty = nn.Parameter(torch.empty(0, 16))
        self.register_buffer("runs", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.runs.add_(1)
        return self.tied(self.first(x)) + self.narrow.float().sum() + self.empty.sum()


def _archive(path: Path) -> Counting:
    torch.manual_seed(0)
    model = Counting().eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 16),)), path)
    return model


def test_parameters_of_an_archive_are_mapped_and_as_saved(tmp_path: Path) -> None:
    model = _archive(tmp_path / "m.pt2")
    program = load_model(tmp_path / "m.pt2").program
    assert program is not None
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for name, value in program.named_parameters():
        assert torch.equal(value, wanted[name])
        assert value.dtype == wanted[name].dtype
        assert is_mapped(value.detach()) == (value.numel() > 0), name
    x = torch.randn(2, 16)
    assert torch.equal(program.module()(x), model(x))


def test_a_graph_may_write_to_its_buffers(tmp_path: Path) -> None:
    _archive(tmp_path / "m.pt2")
    program = load_model(tmp_path / "m.pt2").program
    assert program is not None
    assert not any(is_mapped(value) for value in program.buffers())
    module = program.module()
    module(torch.randn(2, 16))
    assert torch.equal(dict(module.named_buffers())["runs"], torch.ones(3))


def test_torch_reads_archives_by_itself_afterwards(tmp_path: Path) -> None:
    _archive(tmp_path / "m.pt2")
    load_model(tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    assert not any(is_mapped(value.detach()) for value in program.parameters())
