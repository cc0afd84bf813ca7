"""One process beside several ranks of torchrun, one thread each: seconds and bytes, and who computed how much.

    python -m tools.bench.ranks FOLDER --size 60M

Wall-clock seconds say how much faster the ranks are, on a machine with a core for each that does nothing else. CPU
seconds of the passes say how well the work is divided on any machine: user and system time of the thread that computes,
and apart from it that of the others, which carry what the ranks exchange (a rank that waits sleeps).
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from tools.bench.scale import LENGTH, SIZES, VOCABULARY, command_of, make, write_safetensors

SAMPLES = 160
"""128 to calibrate with, as one in five is held out: four batches."""

PASSES = "gptq:bits=4:group_size=128"
USAGE = "QEXPORT_BENCH_USAGE"
"""Names the folder that a rank leaves its figures in."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--size", default="60M", show_default=True, type=click.Choice(list(SIZES)))
@click.option("--passes", default=PASSES, show_default=True)
@click.option("--ranks", default=2, show_default=True)
def main(folder: Path, size: str, passes: str, ranks: int) -> None:
    """Make the model in FOLDER, compile it both ways, and compare."""
    make(folder / size, size)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    write_safetensors(folder / f"{size}.tokens.safetensors", {"input_ids": tokens})
    (one, alone), (many, divided) = (compile_model(folder, size, passes, world) for world in (1, ranks))
    same = "the same" if one["files"] == many["files"] else "DIFFERENT"
    print(
        f"passes {alone[0]['wall'] / divided[0]['wall']:.2f} times faster, "
        f"the command {one['seconds'] / many['seconds']:.2f} times; {same} bytes"
    )
    most = max(rank["computing"] for rank in divided)
    print(f"CPU seconds of one process over those of the busiest rank: {alone[0]['computing'] / most:.2f}")


def compile_model(folder: Path, size: str, passes: str, world: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """{seconds and files of the command}, and for each rank {wall, computing, exchanging} seconds of the passes."""
    out = folder / f"{size}.ranks{world}"
    command = ["-m", "tools.bench.ranks", *command_of(folder, size, passes, out)[2:]]
    if world > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *command]
    figures = folder / f"usage{world}"
    figures.mkdir(exist_ok=True)
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", USAGE: str(figures.resolve())}
    subprocess.run([sys.executable, *command], check=True, env=environment)
    seconds = time.monotonic() - started
    ranks = [json.loads((figures / str(rank)).read_text(encoding="utf-8")) for rank in range(world)]
    print(f"{world} rank(s): passes {ranks[0]['wall']:.1f} s, whole command {seconds:.1f} s")
    for rank, used in enumerate(ranks):
        print(f"  rank {rank}: CPU seconds computing {used['computing']:.1f}, exchanging {used['exchanging']:.1f}")
    sys.stdout.flush()
    files = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {"seconds": seconds, "files": files}, ranks


def rank(folder: Path) -> int:
    """The command itself in this process, which leaves what its passes used in `folder`."""
    import exporter.compile
    from exporter.cli import run
    from passes.base import Pipeline

    class Timed(Pipeline):
        """Passes that are timed."""

        def run(self, *arguments: Any, **options: Any) -> Any:
            """Run them, and write what they used."""
            started, thread, process = time.monotonic(), cpu(resource.RUSAGE_THREAD), cpu(resource.RUSAGE_SELF)
            records = super().run(*arguments, **options)
            computing = cpu(resource.RUSAGE_THREAD) - thread
            used = {
                "wall": time.monotonic() - started,
                "computing": computing,
                "exchanging": cpu(resource.RUSAGE_SELF) - process - computing,
            }
            (folder / os.environ.get("RANK", "0")).write_text(json.dumps(used), encoding="utf-8")
            return records

    exporter.compile.Pipeline = Timed  # type: ignore[misc]  # where the command looks it up
    return run(sys.argv[1:])


def cpu(who: int) -> float:
    """User and system seconds so far."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    if USAGE in os.environ:
        sys.exit(rank(Path(os.environ[USAGE])))
    main()
