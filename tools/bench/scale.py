"""Time and peak memory of the whole command against the number of parameters, on Llama-like models made on the spot.

    python -m tools.bench.scale FOLDER --sizes 10M,40M,100M,400M,1.2B --memory 100MB --plot docs/scale.svg

The weights are random: this is about memory, time and parity, never accuracy. Peak memory is the kernel's own counter
of the command's process (maximum resident set), mapped pages of the weights included; the command starts no other.
The command has one thread: the processor's seconds are what it would take on a machine with nothing else to do.

Rows are kept in FOLDER/scale.json: sizes can be measured one at a time. Both figures are fitted over all rows by

    y = a + b P,   P the parameters, a and b by least squares,   R^2 = 1 - sum (y - a - b P)^2 / sum (y - mean y)^2
"""

import dataclasses
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

SIZES = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 10},
    "40M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 7},
    "60M": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1},
    "100M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "200M": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 4},
    "400M": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 29},
}
VOCABULARY = 4096
INDEX = "model.safetensors.index.json"
ROWS = "scale.json"
SAMPLES, LENGTH = 20, 32
SHARD_BYTES = 500_000_000
PASSES = "gptq:bits=4:group_size=128:refine=0:scale_search=minmax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of the command."""

    parameters: int
    seconds: float
    processor_seconds: float
    peak_bytes: int
    parity_db: float


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope P, and the share of the spread of y that it explains."""

    intercept: float
    slope: float
    r_squared: float


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--sizes", default="10M,40M,100M,400M,1.2B", show_default=True, help=f"Of {', '.join(SIZES)}.")
@click.option("--passes", default=PASSES, show_default=True)
@click.option("--memory", default="100MB", show_default=True, help="For --memory; 0 leaves it out.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw both figures of all rows, as SVG.")
def main(folder: Path, sizes: str, passes: str, memory: str, plot: Path | None) -> None:
    """Make the models in FOLDER, compile each, and print the table of all that were measured there."""
    file = folder / ROWS
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for size in sizes.split(",") if sizes else []:
        parameters = make(folder / size, size)
        found[size] = dataclasses.asdict(compile_model(folder, size, parameters, passes, memory))
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    rows = sorted((Row(**row) for row in found.values()), key=lambda row: row.parameters)
    print("| parameters | float, MB | peak, MB | peak / float | seconds | of the processor | parity, dB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        size, peak = 4 * row.parameters / 1e6, row.peak_bytes / 1e6
        print(
            f"| {row.parameters:,} | {size:,.0f} | {peak:,.0f} | {peak / size:.2f} | {row.seconds:,.0f} |"
            f" {row.processor_seconds:,.0f} | {row.parity_db:.0f} |"
        )
    if len(rows) > 1:
        for label, line in fits(rows).items():
            print(f"{label}: {line.intercept:.0f} + {line.slope * 1e6:.3f} per million, R^2 {line.r_squared:.4f}")
    if plot is not None:
        plot.write_text(draw(rows), encoding="utf-8")


def make(folder: Path, size: str) -> int:
    """A Hugging Face folder of that size and its calibration tokens, written shard by shard; parameters."""
    import transformers

    heads = SIZES[size]["hidden_size"] // 64
    config = transformers.LlamaConfig(
        **SIZES[size],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
        torch_dtype="float32",
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    parameters = sum(shape.numel() for shape in shapes.values())
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder.parent / f"{size}.tokens.safetensors", {"input_ids": tokens})
    config.save_pretrained(folder)
    if (folder / INDEX).exists():  # from an earlier run: it is written last
        return parameters
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name, shape in shapes.items():
        if shard and sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            write_shard(folder, shard, places)
            shard = {}
        spread = 0.02 if len(shape) > 1 else 0.1
        shard[name] = torch.randn(shape, generator=generator) * spread + (1.0 if len(shape) == 1 else 0.0)
    write_shard(folder, shard, places)
    index = {"metadata": {"total_size": 4 * parameters}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return parameters


def write_shard(folder: Path, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    """One more file of the model."""
    name = f"model-{len(set(places.values())) + 1:05}.safetensors"
    write_safetensors(folder / name, tensors)
    places |= dict.fromkeys(tensors, name)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, without a second copy of its tensors in memory."""
    types = {torch.float32: "F32", torch.int64: "I64"}
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {"dtype": types[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.numpy().data)


def command_of(folder: Path, size: str, passes: str, out: Path) -> list[str]:
    """The command that compiles a model made here, with one thread and nothing kept from run to run."""
    shutil.rmtree(out, ignore_errors=True)
    command = ["-m", "exporter.cli", str(folder / size), "--passes", passes, "--out", str(out)]
    calib = str(folder / f"{size}.tokens.safetensors")
    return [*command, "--calib", calib, "--quiet", "--threads", "1", "--no-resume"]


def compile_model(folder: Path, size: str, parameters: int, passes: str, memory: str) -> Row:
    """One run of the command; parity is onnxruntime's with eager torch."""
    out = folder / f"{size}.out"
    command = [sys.executable, *command_of(folder, size, passes, out)]
    command += ["--memory", memory] if memory != "0" else []
    started = time.monotonic()
    child = os.spawnve(os.P_NOWAIT, sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    if status:
        raise click.ClickException(f"the command failed for {size}")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    parity = report["parity"]["onnxruntime_unoptimized"]
    worst = min(figures["sqnr_db"] for figures in parity.values())
    return Row(parameters, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, worst)


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line of least squares."""
    slope, intercept = np.polyfit(xs, ys, 1)
    rest = np.square(np.asarray(ys) - intercept - slope * np.asarray(xs)).sum()
    return Line(float(intercept), float(slope), float(1 - rest / np.square(np.asarray(ys) - np.mean(ys)).sum()))


def fits(rows: Sequence[Row]) -> dict[str, Line]:
    """{what: its line} over the parameters."""
    parameters = [float(row.parameters) for row in rows]
    return {label: fit(parameters, [row[1] for row in points]) for label, points in series(rows).items()}


def series(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """{what is drawn: (parameters, figure) of every row}."""
    return {
        "seconds of the processor": [(row.parameters, row.processor_seconds) for row in rows],
        "peak memory, MB": [(row.parameters, row.peak_bytes / 1e6) for row in rows],
    }


WIDTH, HEIGHT, LEFT, TOP, SPACE = 300, 200, 70, 40, 110


def draw(rows: Sequence[Row]) -> str:
    """Seconds and peak memory against parameters, with their lines, as the text of an SVG file."""
    panels = [
        _panel(label, points, fits(rows)[label], index) for index, (label, points) in enumerate(series(rows).items())
    ]
    size = f'width="{LEFT + 2 * (WIDTH + SPACE)}" height="{TOP + HEIGHT + 50}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(panels)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect {size} fill="white"/>\n{body}\n</svg>\n'


def _panel(label: str, points: Sequence[tuple[int, float]], line: Line, index: int) -> str:
    left, bottom = LEFT + index * (WIDTH + SPACE), TOP + HEIGHT
    right, top = max(x for x, _ in points) * 1.05, max(y for _, y in points) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + WIDTH * x / right, 1), round(bottom - HEIGHT * y / top, 1)

    (x0, y0), (x1, y1) = at(0, line.intercept), at(right, line.intercept + line.slope * right)
    parts = [
        f'<path d="M{left} {TOP}V{bottom}H{left + WIDTH}" fill="none" stroke="black"/>',
        f'<path d="M{x0} {y0}L{x1} {y1}" stroke="#888" stroke-dasharray="4 3"/>',
        f'<text x="{left}" y="{TOP - 22}" font-weight="bold">{label}</text>',
        f'<text x="{left}" y="{TOP - 7}" fill="#555">{line.intercept:.0f} + {line.slope * 1e6:.2f} per million,'
        f" R\u00b2 {line.r_squared:.4f}</text>",
        f'<text x="{left + WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">parameters, millions</text>',
    ]
    for part in range(5):
        x, y = right * part / 4, top * part / 4
        parts.append(f'<text x="{at(x, 0)[0]}" y="{bottom + 17}" text-anchor="middle">{x / 1e6:.0f}</text>')
        parts.append(f'<text x="{left - 6}" y="{at(0, y)[1] + 4}" text-anchor="end">{y:,.0f}</text>')
    for point in points:
        x, y = at(*point)
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#1668b8"/>')
    return "\n".join(parts)


if __name__ == "__main__":
    main()
