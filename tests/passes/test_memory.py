"""Mapped tensors: their values, what releasing them gives back, and spilling past a limit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from passes.calibration import Stream
from passes.memory import ACTIVATIONS_SHARE, Memory, is_mapped, map_file, own_storage, release, settle

MEGABYTE = 1 << 20
LINUX = Path("/proc/self/status")


def _resident() -> int:
    """Bytes of files that are in this process's memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", LINUX.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not LINUX.exists(), reason="reads the kernel's figures from /proc")
def test_released_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "values"
    expected = torch.arange(4 * MEGABYTE, dtype=torch.float32)
    path.write_bytes(expected.numpy().tobytes())
    before = _resident()
    with path.open("rb") as file:
        values = map_file(file, path.stat().st_size).view(torch.float32)
    assert torch.equal(values, expected)
    assert _resident() - before > 15 * MEGABYTE
    release([values[: 3 * MEGABYTE]])
    # 4 of 16 MB stay; the rest of the margin is for pages of libraries that came in meanwhile.
    assert _resident() - before < 8 * MEGABYTE
    assert torch.equal(values, expected)


def test_release_leaves_ordinary_tensors_alone() -> None:
    values = torch.randn(100)
    expected = values.clone()
    release([values, torch.empty(0)])
    assert torch.equal(values, expected)
    assert not is_mapped(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_spilled_values_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randint(0, 2, (3, 5, 7)).to(dtype)[:, :, ::2]
    spilled = Memory(folder=tmp_path).spill(values)
    assert is_mapped(spilled)
    assert spilled.dtype == dtype
    assert torch.equal(spilled, values)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert Memory().spill(spilled) is spilled


def test_only_a_limit_sends_results_to_disk() -> None:
    values = torch.randn(3)
    assert Memory().keep(values) is values
    assert is_mapped(Memory(limit=1).keep(values))


def _chain() -> tuple[fx.GraphModule, list[dict[str, Tensor]]]:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return fx.symbolic_trace(net), [{"input": torch.randn(256, 64)} for _ in range(3)]


def test_a_stream_past_the_limit_waits_on_disk_with_the_same_values() -> None:
    graph, batches = _chain()
    nodes = list(graph.graph.nodes)
    one = sum(batch["input"].nbytes for batch in batches)
    whole, bounded = Stream(graph, batches), Stream(graph, batches, Memory(ACTIVATIONS_SHARE * one // 2))
    for stream in (whole, bounded):
        stream.advance(nodes[3])
    assert not any(is_mapped(value) for value in whole.values(nodes[2]))
    for expected, value in zip(whole.values(nodes[2]), bounded.values(nodes[2]), strict=True):
        assert is_mapped(value)
        assert torch.equal(expected, value)


@pytest.mark.skipif(not LINUX.exists(), reason="reads the kernel's figures from /proc")
def test_settling_gives_back_every_mapped_page(tmp_path: Path) -> None:
    memory = Memory(limit=1, folder=tmp_path)
    kept = [memory.keep(torch.full((MEGABYTE,), float(index))) for index in range(8)]
    assert [float(values.sum()) for values in kept] == [float(index * MEGABYTE) for index in range(8)]
    before = _resident()
    settle()
    # All 32 MB; pages of libraries may go or come meanwhile.
    assert before - _resident() > 30 * MEGABYTE
    assert [float(values.sum()) for values in kept] == [float(index * MEGABYTE) for index in range(8)]


def test_a_storage_of_its_own_begins_where_the_bytes_do(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(bytes(range(200)))
    with path.open("rb") as file:
        content = map_file(file, 200)
    part = own_storage(content[50:60])
    assert part.tolist() == list(range(50, 60))
    assert part.untyped_storage().data_ptr() == part.data_ptr() == content.data_ptr() + 50
    assert is_mapped(part)
    with pytest.raises(ValueError, match="not mapped"):
        own_storage(torch.zeros(3))


MANY = """
import resource, torch
from passes.memory import Memory
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
memory = Memory(limit=1)
kept = [memory.keep(torch.full((10,), index)) for index in range(100)]
print(sum(int(values.sum()) for values in kept))
"""


@pytest.mark.skipif(not LINUX.exists(), reason="limits of open files as Linux has them")
def test_more_layers_than_files_that_may_be_open_at_first() -> None:
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=False)
    assert done.stdout == "49500\n", done.stderr
