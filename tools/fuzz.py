"""Mutated inputs: each ends in success or in one clear line, soon, and leaves no file behind.

Good files of every kind that qexport reads (models, calibration data, recipes) are damaged in a seeded way: as bytes,
in the members of zip archives, in JSON headers and in lines of TOML, and read by the function that reads them:
`load_model`, `load_samples`, `read_recipe`, and for one input in a hundred the whole command. What counts as a fault:
an exception that is no `QExportError`, a message of several lines, exit code 1 of the command, a file left behind, more
than LIMIT_S seconds, more than MEMORY bytes beyond what the process has, or the end of the process.

    python -m tools.fuzz --count 10000 --seed 0

prints how inputs of each kind ended, and the number of each fault; `--only NUMBER` repeats it with its traceback.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from exporter.cli import run
from exporter.errors import QExportError
from exporter.load import load_model
from exporter.recipe import read_recipe
from exporter.sample_inputs import Wanted
from exporter.samples import load_samples

LIMIT_S = 30.0
MEMORY = 4 << 30
EVERY = 100
"""One input in so many goes through the whole command."""

FOLDER = "folder/"
FACTORY = "tools.fuzz:network"
WANTED = (Wanted("x", (None, 4), torch.float32),)
SAMPLES = 16

RECIPE = """\
passes = ["cle", {name = "gptaq", bits = 4, group_size = 64}]
target = ["onnx", "trt"]
weights-as = "auto"
trt-flavor = "auto"
trt-arch = "sm80,sm89"
trt-profile = ["x=1x3x32x32/8x3x32x32/32x3x32x32"]
calib = "calib.npz"
calib-samples = 8
input = ["x=8x3x32x32", "mask=8x3:int64"]
dynamic = ["x:0=batch"]
eval = "pkg.mod:function"
gate = ["sqnr_db>=20", "layer.cosine>=0.9", "metric.accuracy.drop<=0.01"]
budget = "size<=0.3,metric.accuracy.drop<=0.005"
skip = ["*.fc1"]
out = "out"
provider = "cpu"
seed = 3
threads = 1
memory = "4GB"
sensitivity = true
[[layers]]
match = "*.fc2"
bits = 8
group_size = 32
"""

BYTES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\0" * 64,
    b"PK\x03\x04",
    b"../",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\n",
    b"9" * 400,
)
VALUES: tuple[object, ...] = (
    -1,
    0,
    1,
    1 << 31,
    1 << 62,
    1 << 64,
    10**30,
    1e308,
    "NaN",
    "",
    "../x",
    "x" * 999,
    None,
    True,
    [],
    {},
    [[]],
)
TOML = (
    '""', "-1", "0", "1e999", "nan", "true", "[]", "[[]]", "{}", "1979-05-27T07:32:00Z", '"../x"', '"cle,cle"', "[1]",
    "99999999999999999999", '"gptq:bits=nan"', '"x=0x0"', '"gptq:bits=1000000000000"', '["x:99999999999=a"]',
    '"sqnr_db>=1e999"',
    "{a = {a = 1}}", '"\\u0000"', '"size<=-1"', "[" * 5000, '"1e400GB"', '"x=1/2/3"', '[{name = "gptq", bits = []}]',
)  # fmt: skip


class Network(nn.Module):
    """4 -> 8 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 3] of x [n, 4]."""
        logits: Tensor = self.fc2(self.fc1(x).relu())
        return logits


def network() -> nn.Module:
    """The factory of the state dicts, with weights of its own whatever the random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an input ended: `ended` is "read", "refused" or the kind of fault, `said` the line or the traceback."""

    kind: str
    ended: str
    said: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether this should not have happened."""
        return self.ended not in ("read", "refused")


# ------------------------------------------------------------------------------------------------------ good files


def good_files() -> dict[str, bytes]:
    """{kind: content}; kinds are model.*, calib.*, recipe, and folder/NAME for the files of a Hugging Face folder."""
    model, x = network().eval(), torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    state, arrays = model.state_dict(), {"x": x}
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x[:2],), dynamic_shapes={"x": {0: batch}})
    tokens = "\n".join(json.dumps({"text": f"line {number}"}) for number in range(9))
    return {
        "model.exported": _written(lambda file: torch.export.save(program, file)),
        "model.state_dict": _written(lambda file: torch.save(state, file)),
        "model.legacy": _written(lambda file: torch.save(state, file, _use_new_zipfile_serialization=False)),
        "model.module": _written(lambda file: torch.save(model, file)),
        "model.safetensors": save(state),
        "calib.npz": _written(lambda file: np.savez(file, x=x.numpy())),
        "calib.npz_deflated": _written(lambda file: np.savez_compressed(file, x=x.numpy())),
        "calib.npy": _written(lambda file: np.save(file, x.numpy())),
        "calib.safetensors": save(arrays),
        "calib.pt": _written(lambda file: torch.save(arrays, file)),
        "calib.pt_legacy": _written(lambda file: torch.save(arrays, file, _use_new_zipfile_serialization=False)),
        "calib.jsonl": tokens.encode(),
        "recipe": RECIPE.encode(),
        **{f"folder/{name}": content for name, content in _hugging_face_folder().items()},
    }


def _hugging_face_folder() -> dict[str, bytes]:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8
    )
    with tempfile.TemporaryDirectory() as name:
        transformers.OPTForCausalLM(config).save_pretrained(name)
        tensors = (Path(name) / "model.safetensors").read_bytes()
        settings = (Path(name) / "config.json").read_bytes()
    named = transformers.OPTForCausalLM(config).state_dict()
    index = json.dumps({"weight_map": dict.fromkeys(named, "model.safetensors")}).encode()
    return {"config.json": settings, "model.safetensors": tensors, "model.safetensors.index.json": index}


def _written(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------- mutations


def mutated(content: bytes, choose: random.Random) -> bytes:
    """One to three mutations of the kinds that the content allows."""
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        ways = [_flip, _truncate, _splice, _insert, _digits]
        if content.startswith(b"PK"):
            ways += [_in_member] * 6
        if content[8:9] == b"{":
            ways += [_in_header] * 6
        if re.match(rb"\w[\w-]* = ", content):
            ways += [_in_toml] * 6
        if content.startswith(b"{") and not content.startswith(b'{"text"'):
            ways += [_in_json] * 8
        content = choose.choice(ways)(content, choose)
    return content


def _flip(content: bytes, choose: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 4, 16)) if content else 0):
        changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content) + 1)]


def _splice(content: bytes, choose: random.Random) -> bytes:
    begin, end, place = sorted(choose.randrange(len(content) + 1) for _ in range(3))
    part = content[begin:end] if choose.random() < 0.5 else b""
    return content[:begin] + part + content[place:]


def _insert(content: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(content) + 1)
    over = choose.choice((0, 0, 8))
    return content[:place] + choose.choice(BYTES) + content[place + over :]


def _digits(content: bytes, choose: random.Random) -> bytes:
    """Another number where one is written out."""
    found = list(re.finditer(rb"\d+", content[:200_000]))
    if not found:
        return content
    match = choose.choice(found)
    number = choose.choice((b"0", b"-1", b"1" + b"0" * 12, b"9" * 25, b"3", b"1e400", b"4294967296"))
    return content[: match.start()] + number + content[match.end() :]


def _in_member(content: bytes, choose: random.Random) -> bytes:
    """The archive written again with a member damaged, renamed, repeated, compressed, swollen or left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error):
        return _flip(content, choose)
    if not members:
        return content
    index = choose.randrange(len(members))
    name, member = members[index]
    compression = zipfile.ZIP_STORED
    match choose.randrange(10):
        case 0:
            members[index] = (
                choose.choice(("../../escaped", "/escaped", ".", "a" * 300, name.upper(), "x\0y")),
                member,
            )
        case 1:
            members.append((name, member))
        case 2:
            compression = zipfile.ZIP_DEFLATED
        case 3:
            del members[index]
        case 4:
            members[index] = (name, b"\0" * (1 << 24))
            compression = choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        case _:
            members[index] = (name, mutated(member, choose))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of repeated names
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, member in members:
                archive.writestr(name, member)
    return buffer.getvalue()


def _in_header(content: bytes, choose: random.Random) -> bytes:
    """A safetensors header with other JSON in it, and its length put right."""
    length = struct.unpack("<Q", content[:8])[0]
    if length > len(content) - 8:
        return _flip(content, choose)
    header = _in_json(content[8 : 8 + length], choose)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _in_json(content: bytes, choose: random.Random) -> bytes:
    """Another value somewhere in a JSON text."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _digits(content, choose)
    places = list(_places(tree))
    if places:
        owner, key = choose.choice(places)
        if choose.random() < 0.1:
            del owner[key]
        else:
            owner[key] = choose.choice(VALUES)
    return json.dumps(tree).encode()


def _places(tree: object) -> Iterator[tuple[Any, Any]]:
    """(dict, key) and (list, index) of every value in the tree."""
    entries: Iterable[tuple[Any, Any]] = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    )
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def _in_toml(content: bytes, choose: random.Random) -> bytes:
    lines = content.decode(errors="replace").splitlines()
    index = choose.randrange(len(lines))
    key, equals, _ = lines[index].partition("=")
    match choose.randrange(6):
        case 0:
            lines.insert(choose.randrange(len(lines)), lines[index])
        case 1:
            lines[index] = choose.choice(("[tool]", "[[layers]]", "[layers]", "[[gate]]", "x" * 9, "= 1", "a.b = 1"))
        case _:
            lines[index] = f"{key}= {choose.choice(TOML)}" if equals else lines[index]
    return "\n".join(lines).encode()


# --------------------------------------------------------------------------------------------------------- one input


def examine(number: int, seed: int, files: Mapping[str, bytes], folder: Path) -> Outcome:
    """What becomes of input `number`; `folder` is empty, and is so again afterwards."""
    choose = random.Random(f"{seed}:{number}")
    kind = choose.choice(sorted(files))
    content = mutated(files[kind], choose)
    path = folder / f"input{choose.choice(('', '.pt', '.npz', '.bin'))}"
    if kind.startswith(FOLDER):
        path.mkdir()
        for name in (name for name in files if name.startswith(FOLDER)):
            (path / name.removeprefix(FOLDER)).write_bytes(content if name == kind else files[name])
    else:
        path.write_bytes(content)
    before = set(folder.rglob("*"))
    try:
        ended, said = _by_command(kind, path, files) if number % EVERY == 0 else _by_function(kind, path)
    except QExportError as error:
        said = str(error)
        ended = "several lines" if "\n" in said or not said else "refused"
    except BaseException as error:
        ended, said = type(error).__name__, traceback.format_exc()
    finally:
        left = sorted(str(file.relative_to(folder)) for file in set(folder.rglob("*")) - before)
        _empty(folder)
    return Outcome(kind, "file left behind", f"{left} after: {said}") if left else Outcome(kind, ended, said)


def _by_function(kind: str, path: Path) -> tuple[str, str]:
    if kind == "recipe":
        read_recipe({}, path)
    elif kind.startswith("calib."):
        load_samples(str(path), WANTED, SAMPLES)
    else:
        load_model(path, factory=FACTORY)
    return "read", ""


def _by_command(kind: str, path: Path, files: Mapping[str, bytes]) -> tuple[str, str]:
    """The whole command, with rounding; what it writes when it succeeds is taken away again."""
    out, beside = path.parent / "out", Path(tempfile.mkdtemp())
    model = path if kind.startswith(("model.", FOLDER)) else beside / "model"
    calib = path if kind.startswith("calib.") else beside / "calib"
    if model.parent == beside:
        model.write_bytes(files["model.exported"])
    if calib.parent == beside:
        calib.write_bytes(files["calib.npz"])
    args = [str(model), "--calib", str(calib), "--factory", FACTORY, "--out", str(out), "--quiet"]
    args += ["--input", "input_ids=8x4:int64"] if kind.startswith(FOLDER) else []
    args += ["--recipe", str(path)] if kind == "recipe" else ["--passes", "act-quant,rtn"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run(args)
    for folder in (beside, out) if code in (0, 3, 4) else (beside,):
        _empty(folder)
        if folder.exists():
            folder.rmdir()
    said = printed.getvalue()
    if code in (0, 3, 4):
        return "read", said
    if code == 2 and said.count("\n") == 1 and said.startswith("error: "):
        return "refused", said
    return f"exit code {code}", said


def _empty(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


# --------------------------------------------------------------------------------------------------------- the run


def work(
    connection: "multiprocessing.connection.Connection", numbers: range, seed: int, files: dict[str, bytes]
) -> None:
    """Examine `numbers` in a process of its own, so that a crash or a hang costs one input."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open as long as the process; libraries log to it
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for number in numbers:
            connection.send(examine(number, seed, files, Path(name)))


def outcomes(count: int, seed: int, files: dict[str, bytes]) -> Iterator[tuple[int, Outcome]]:
    """(number, outcome) of `count` inputs, each within LIMIT_S."""
    context, number = multiprocessing.get_context("fork"), 0
    while number < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, range(number, count), seed, files))
        process.start()
        theirs.close()
        ended = ""
        while number < count and not ended:
            try:
                if ours.poll(LIMIT_S):
                    yield number, ours.recv()
                else:
                    ended = "hang"
            except EOFError:
                ended = "crash"
            if ended:
                kind = random.Random(f"{seed}:{number}").choice(sorted(files))
                yield number, Outcome(kind, ended)
            number += 1
        if ended:
            process.kill()
        process.join()


def main(argv: list[str] | None = None) -> int:
    """Run; 1 when there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="show what becomes of this one, in this process")
    args = parser.parse_args(argv)
    files = good_files()
    if args.only is not None:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        with tempfile.TemporaryDirectory() as name:
            outcome = examine(args.only, args.seed, files, Path(name))
        print(f"{outcome.kind}: {outcome.ended}\n{outcome.said}")
        return int(outcome.is_fault)
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults = []
    for number, outcome in outcomes(args.count, args.seed, files):
        table[outcome.kind]["fault" if outcome.is_fault else outcome.ended] += 1
        if outcome.is_fault:
            faults.append((number, outcome))
            print(f"input {number}, {outcome.kind}: {outcome.ended} {outcome.said[-300:]}", flush=True)
    print("| kind | inputs | read | refused | fault |\n|---|---|---|---|---|")
    for kind, ended in [*sorted(table.items()), ("all", sum(table.values(), collections.Counter()))]:
        print(f"| {kind} | {ended.total()} | {ended['read']} | {ended['refused']} | {ended['fault']} |")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
