"""Low-bit kernels beside cuBLAS on a GPU: python -m tools.bench.gpu_kernels [--sizes 4096,8192] [--rows 1,8,128]

For each square layer and number of rows: time of torch.matmul in float16 and of each kernel that is meant for so many
rows, how many times as fast it is, and the bytes that it must move (packed weights, activations, result) over its time
as a share of the memory's bandwidth. Launches are recorded in a CUDA graph that goes round enough copies of the weights
to leave nothing of them in the cache; a time is the median of 20 replays. Needs a GPU and a torch that uses it.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from exporter.gpu_kernels import GpuKernel, codebook_kernels, int3_kernels
from tools.cuda_driver import LoadedKernel, memory_bandwidth

REPLAYS = 20
CACHE_MULTIPLE = 4
GROUP = 64
CODEBOOKS = {"1x8": (1, 8), "2x8": (2, 8), "1x16": (1, 16)}


def seconds_each(launches: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one of the launches, which follow one another in a graph."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(launches))
    return statistics.median(times)


def copies(nbytes: int) -> int:
    """How many weights of this size are CACHE_MULTIPLE times the last-level cache, two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHE_MULTIPLE * cache // nbytes))


def int3_inputs(size: int) -> list[Tensor]:
    """packed, scale, zero of a layer; any bits are codes."""
    packed = torch.randint(0, 2**30, (-(-size // 10), size), dtype=torch.int32, device="cuda")
    scale = torch.full((size, size // GROUP), 0.01, dtype=torch.float16, device="cuda")
    return [packed, scale, torch.full_like(scale, 3.5)]


def codebook_inputs(size: int, num_codebooks: int, bits: int) -> list[Tensor]:
    """codes, codebooks, scales of a layer with groups of 8 inputs."""
    codes = torch.randint(0, 256, (size, size // 8 * num_codebooks * (1 if bits <= 8 else 2)), device="cuda")
    books = torch.randn(num_codebooks, 2**bits, 1, 8, dtype=torch.float16, device="cuda")
    return [codes.to(torch.uint8), books, torch.full((size, 1), 0.01, dtype=torch.float16, device="cuda")]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of weight: its kernels, and what makes one on the GPU."""

    name: str
    kernels: tuple[GpuKernel, ...]
    make: Callable[[], list[Tensor]]


def layers(size: int) -> tuple[Layer, ...]:
    """All kinds of a square layer."""
    int3 = Layer(f"int3 g{GROUP}", int3_kernels("float16", size, GROUP, bias=False), partial(int3_inputs, size))
    made = [int3]
    for name, (num, bits) in CODEBOOKS.items():
        kernels = codebook_kernels("float16", size, num_codebooks=num, codebook_bits=bits, in_group=8)
        made.append(Layer(name, kernels[:-1], partial(codebook_inputs, size, num, bits)))
    return tuple(made)


def suits(kernel: GpuKernel, rows: int) -> bool:
    """Whether a kernel was made for so many rows; a gemv of more rows than asked for is no use."""
    if kernel.most_rows is None:
        return rows > 1
    return rows <= kernel.most_rows < 2 * rows or (kernel.entry == "codebook_gemv" and rows <= kernel.most_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096,8192")
    parser.add_argument("--rows", default="1,8,128")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")
    bandwidth = memory_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s by its clock and bus, torch {torch.__version__}"
    )
    print(f"{'size':>6} {'rows':>5} {'layer':9} {'kernel':26} {'us':>8} {'x fp16':>7} {'% of bandwidth':>15}")
    for size in (int(part) for part in options.sizes.split(",")):
        for rows in (int(part) for part in options.rows.split(",")):
            measure(size, rows, bandwidth)


def measure(size: int, rows: int, bandwidth: float) -> None:
    """Prints the lines of one size and number of rows."""
    x = torch.randn(rows, size, dtype=torch.float16, device="cuda")
    y = torch.empty(rows, size, dtype=torch.float16, device="cuda")
    weights = [torch.randn(size, size, dtype=x.dtype, device="cuda") for _ in range(copies(2 * size * size))]
    base = seconds_each([partial(torch.matmul, x, weight.T, out=y) for weight in weights])
    report(size, rows, "float16", "cuBLAS", base, base, weights[0].nbytes + x.nbytes + y.nbytes, bandwidth)
    del weights
    for layer in layers(size):
        read = sum(tensor.nbytes for tensor in layer.make())
        inputs = [[x, *layer.make()] for _ in range(copies(read))]
        for kernel in layer.kernels:
            if suits(kernel, rows):
                loaded = LoadedKernel(kernel, kernel.ptx())
                seconds = seconds_each([partial(loaded, tensors, rows, size, y) for tensors in inputs])
                variant = "".join(f" {value}" for key, value in kernel.defines if key in ("ROWS", "TILE_ROWS"))
                moved = read + x.nbytes + y.nbytes
                report(size, rows, layer.name, kernel.entry + variant, seconds, base, moved, bandwidth)


def report(
    size: int, rows: int, layer: str, kernel: str, seconds: float, base: float, moved: int, bandwidth: float
) -> None:
    """One line of the table."""
    share = 100 * moved / seconds / bandwidth
    print(
        f"{size:6} {rows:5} {layer:9} {kernel:26} {seconds * 1e6:8.2f} {base / seconds:7.2f} {share:15.1f}", flush=True
    )


if __name__ == "__main__":
    main()
