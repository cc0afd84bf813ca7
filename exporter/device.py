"""--device: where weight passes compute.

--device cuda                 the first GPU
--device cuda:0,cuda:1        under torchrun: one for each process of this machine, in their order
"""

import os
import re

import torch

from exporter.errors import InputError

FLAG = "--device"
KNOWN = re.compile(r"cpu|cuda(:\d+)?")


def device_names(text: str) -> list[str]:
    """The devices a flag names. Raises InputError for what is none."""
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if not KNOWN.fullmatch(name)), None)
    if wrong is not None:
        raise InputError(f"{wrong!r} is no device", where=FLAG, fix="write cpu, cuda or cuda:0,cuda:1")
    if len(names) > 1 and "cpu" in names:
        raise InputError("cpu among others", where=f"{FLAG} {text}", fix="give cpu alone, or GPUs alone")
    if len({_index(name) for name in names}) < len(names):
        raise InputError("names a device twice", where=f"{FLAG} {text}", fix="give each process a GPU of its own")
    return names


def device_for(text: str) -> torch.device:
    """This process's device. Raises InputError when it is not there, or not every process here gets one."""
    names, where = device_names(text), f"{FLAG} {text}"
    if names == ["cpu"]:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        fix = "install torch for CUDA and its driver (qexport doctor), or leave --device out"
        raise InputError("torch sees no CUDA device", where=where, fix=fix)
    local, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(names) != processes:
        fix = f"name {processes}, or start torchrun --nproc-per-node {len(names)}"
        raise InputError(f"{len(names)} devices for {processes} processes of this machine", where=where, fix=fix)
    index, count = _index(names[local]), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"there is no cuda:{index}", where=where, fix=f"torch sees cuda:0 to cuda:{count - 1}")
    torch.backends.cudnn.allow_tf32 = False  # convolutions would round what they multiply to 10 bits
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _index(name: str) -> int:
    return int(name.partition(":")[2] or 0)
