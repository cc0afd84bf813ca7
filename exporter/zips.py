"""Zip archives of torch: members lie in them as they are, so that none takes more memory than the file has bytes."""

import zipfile
from pathlib import Path


def refuse_compressed(path: Path) -> None:
    """Raise ValueError when the archive at `path` has members that expand, which torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("compressed members, which torch.save does not write")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("members that overlap, or are larger than the file")
