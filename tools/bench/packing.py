"""How fast codes are packed and unpacked, beside a plain copy of them: python -m tools.bench.packing [--size N]

Codes uint8 [N, N] in memory; CPU seconds are the best of --repeat, on one thread; ratios are to copying the codes.
"""

import argparse
import time
from collections.abc import Callable

import torch

from exporter.formats import bit_stream, int3_hqq


def seconds(work: Callable[[], object], repeat: int) -> float:
    """CPU seconds of the shortest of `repeat` runs."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="packing of codes beside a plain copy")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, repeat = arguments.size, arguments.repeat
    codes = torch.randint(256, (size, size), dtype=torch.uint8)
    target = torch.empty_like(codes)
    copy = seconds(lambda: target.copy_(codes), repeat)
    print(f"copy of {size} x {size} codes: {1e3 * copy:.2f} ms\n")
    print("| bits | layout | pack ms | of a copy | unpack ms | of a copy |")
    print("|---|---|---|---|---|---|")

    def row(bits: int, layout: str, pack: Callable[[], object], unpack: Callable[[], object]) -> None:
        cells: list[object] = [bits, layout]
        for work in (pack, unpack):
            taken = seconds(work, repeat)
            cells += [f"{1e3 * taken:.2f}", f"{taken / copy:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    for bits in (1, 2, 4, 6, 12):
        values = codes.to(torch.int32) if bits > 8 else codes
        packed = bit_stream.pack_bits(values, bits)
        row(
            bits,
            "stream of bits",
            lambda values=values, bits=bits: bit_stream.pack_bits(values, bits),  # type: ignore[misc]
            lambda packed=packed, bits=bits: bit_stream.unpack_bits(packed, size, bits),  # type: ignore[misc]
        )
    threes = (codes & 7).view(-1, 64)
    words = int3_hqq.pack_codes(threes)
    row(3, "HQQ", lambda: int3_hqq.pack_codes(threes), lambda: int3_hqq.unpack_codes(words, len(threes)))


if __name__ == "__main__":
    main()
