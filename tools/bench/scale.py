"""Time and peak memory of the whole command against the number of parameters, on Llama-like models made on the spot.

    python -m tools.bench.scale FOLDER --sizes 10M,100M,1.2B --memory 600MB

The weights are random: this is about memory, time and parity, never accuracy. Peak memory is the kernel's own counter
of the command's process (maximum resident set), mapped pages of the weights included.
"""

import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

SIZES = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 10},
    "100M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "200M": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 4},
    "400M": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 29},
}
VOCABULARY = 4096
INDEX = "model.safetensors.index.json"
SAMPLES, LENGTH = 20, 32
SHARD_BYTES = 500_000_000
PASSES = "gptq:bits=4:group_size=128:refine=0:scale_search=minmax"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--sizes", default="10M,100M,1.2B", show_default=True, help=f"Of {', '.join(SIZES)}.")
@click.option("--passes", default=PASSES, show_default=True)
@click.option("--memory", default="600MB", show_default=True, help="For --memory; 0 leaves it out.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw both against parameters (needs matplotlib).")
def main(folder: Path, sizes: str, passes: str, memory: str, plot: Path | None) -> None:
    """Make the models in FOLDER, compile each, and print the table."""
    print(f"{'size':>6} {'parameters':>12} {'float MB':>9} {'peak MB':>8} {'peak/float':>10} {'seconds':>8}  parity dB")
    rows = []
    for size in sizes.split(","):
        model = folder / size
        parameters = make(model, size)
        seconds, peak, parity = compile_model(folder, size, passes, memory)
        float_bytes = 4 * parameters
        print(
            f"{size:>6} {parameters:>12,} {float_bytes / 1e6:>9.0f} {peak / 1e6:>8.0f} {peak / float_bytes:>10.2f}"
            f" {seconds:>8.0f}  {parity:.0f}",
            flush=True,
        )
        rows.append((parameters, seconds, peak))
    if plot is not None:
        draw(rows, plot)


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


def compile_model(folder: Path, size: str, passes: str, memory: str) -> tuple[float, int, float]:
    """Seconds, peak resident bytes, and onnxruntime's parity with eager torch in dB, of one run of the command."""
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
    return seconds, usage.ru_maxrss * 1024, min(figures["sqnr_db"] for figures in parity.values())


def draw(rows: list[tuple[int, float, int]], path: Path) -> None:
    """Seconds and peak memory against parameters."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, index, label, unit in ((axes[0], 1, "seconds", 1.0), (axes[1], 2, "peak memory, MB", 1e6)):
        axis.loglog([row[0] for row in rows], [row[index] / unit for row in rows], marker="o")
        axis.set(xlabel="parameters", ylabel=label)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
