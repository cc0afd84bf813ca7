"""One process beside two ranks of torchrun, one thread each: seconds of the quantization and of the whole command.

python -m tools.bench.ranks FOLDER --size 200M
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click

from tools.bench.scale import PASSES, SIZES, command_of, make


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--size", default="200M", show_default=True, type=click.Choice(list(SIZES)))
@click.option("--passes", default=PASSES, show_default=True)
@click.option("--ranks", default=2, show_default=True)
def main(folder: Path, size: str, passes: str, ranks: int) -> None:
    """Make the model in FOLDER, compile it both ways, and compare seconds and bytes."""
    make(folder / size, size)
    stage = passes.partition(":")[0]
    rows = {}
    for world in (1, ranks):
        out = folder / f"{size}.ranks{world}"
        command = command_of(folder, size, passes, out)
        if world > 1:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *command]
        started = time.monotonic()
        subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        whole = time.monotonic() - started
        seconds = json.loads((out / "timings.json").read_text(encoding="utf-8"))["seconds"]
        files = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["files"]
        rows[world] = (seconds[stage], whole, files)
        print(f"{world} rank(s): {stage} {seconds[stage]:.1f} s, whole command {whole:.1f} s", flush=True)
    one, many = rows[1], rows[ranks]
    same = "the same" if one[2] == many[2] else "DIFFERENT"
    print(f"{stage} {one[0] / many[0]:.2f} times faster, the command {one[1] / many[1]:.2f} times; {same} bytes")


if __name__ == "__main__":
    main()
