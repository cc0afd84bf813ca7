"""What is looked at in a file of torch.save before torch reads it: things that cost far more than the file has bytes.

- Members of its zip lie in it as they are: one that expands, or overlaps another, was not written by torch.save.
- When the safe unpickler refuses a name, torch searches the message with a pattern that takes the square of the name's
  length: minutes for 100 kB. Pickles are walked opcode by opcode, which makes no object, for words too long for a name.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import IO

ZIP = b"PK\x03\x04"
LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages that follow
MAX_WORD = 20_000


def check_torch_file(path: Path) -> None:
    """Raise ValueError, or what the readers of zips and pickles raise, when the file at `path` is not to be loaded."""
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                _check_pickle(file)
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed members, which torch.save does not write")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("members that overlap, or are larger than the file")
        for member in members:
            if member.filename.rpartition("/")[2] == "data.pkl":
                with archive.open(member) as content:
                    _check_pickle(content)


def _check_pickle(file: IO[bytes]) -> None:
    for _, argument, _ in pickletools.genops(file):
        if isinstance(argument, str) and len(argument) > MAX_WORD and max(map(len, argument.split())) > MAX_WORD:
            raise ValueError(f"a name of {len(argument)} characters")
