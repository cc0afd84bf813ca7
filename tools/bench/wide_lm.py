"""Low-bit weights where layers are wide: python -m tools.bench.wide_lm --model PATH [--rows GLOB]

A language model of tools.models' family, one block of width 1024: layers of 1024 x 1024 (4 of them) and 1024 x 2048
(2), wide enough for codebooks to pay. It is trained on the sources of Python's standard library if PATH is not there,
about half an hour of one core that multiplies bfloat16, and is not committed (18 MB). As language models do it sees
hardly any text twice: one that knows its text by heart is too sure of itself on other text, and any noise that makes
it less sure then lowers its perplexity. Training that was stopped goes on where it last was saved, PATH.part.

Columns are those of tools.bench.lowbit_lm, measured on 768 windows of 128 bytes of held-out files; settings are chosen
on 256 others (--choose). The text is the installed Python's, so figures move with it.
"""

import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tools.bench.lowbit_lm import FLOAT, measure, options
from tools.data import library_bytes
from tools.models import CONTEXT, OptLM
from tools.train_reference_models import SEED, cosine_schedule, lm_optimizer

WIDTH, FFN, HEADS, LAYERS = 1024, 2048, 8, 1
STEPS = 4000
BATCH = 8
LEARNING_RATE = 1e-3
INITIAL_STD = 0.02
SAVED_EVERY = 100
CALIBRATION = 256
HELD_OUT = 1024

ROWS = {
    "float": FLOAT,
    "gptq 3b per channel": "gptq:bits=3:group_size=-1",
    "gptq 3b g64": "gptq:bits=3:group_size=64",
    "gptq 3b g128": "gptq:bits=3:group_size=128",
    "aq 2x8 g8": "aq",
    "aq 2x8 g8, kl": "aq:loss=kl:tolerance=0.01",
    "aq 2x8 g8, qdora": "aq,qdora",
    "aq 3x8 g8": "aq:num_codebooks=3",
    "aq 1x8 g8": "aq:num_codebooks=1",
    "gptq 2b g64": "gptq:bits=2:group_size=64",
    "hqq 3b g64": "hqq:bits=3:group_size=64",
}
"""Name: passes."""


def wide_lm() -> nn.Module:
    """The network, untrained. Torch's uniform weights would leave lighter tails than language models have."""
    torch.manual_seed(SEED)
    model = OptLM(WIDTH, FFN, HEADS, LAYERS)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INITIAL_STD)
    return model


def train(path: Path, steps: int = STEPS) -> None:
    """Train the network and write its weights in float16."""
    model = wide_lm()
    text, _ = library_bytes()
    optimizer = lm_optimizer(model, LEARNING_RATE)
    schedule = cosine_schedule(optimizer, steps)
    torch.manual_seed(SEED)
    parts: dict[str, nn.Module | Optimizer | LRScheduler]
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    part, first = path.with_name(f"{path.name}.part"), 0
    if part.exists():
        saved = torch.load(part, weights_only=True)
        for name, each in parts.items():
            each.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    model.train()
    for step in range(first, steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
        window = text[starts + torch.arange(CONTEXT + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % SAVED_EVERY == 0:
            print(f"step {step + 1}/{steps}: perplexity of the batch {math.exp(loss.item()):.2f}", flush=True)
            state = {name: each.state_dict() for name, each in parts.items()}
            fresh = part.with_name(f"{part.name}.new")
            torch.save({**state, "random": torch.get_rng_state(), "step": step + 1}, fresh)
            os.replace(fresh, part)
    save_file(model.half().state_dict(), path)
    part.unlink(missing_ok=True)


def load(path: Path) -> nn.Module:
    """The trained network in float32."""
    model = wide_lm()
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def calibration(shift: float = 0.0) -> dict[str, Tensor]:
    """{"tokens": [256, 128]}, windows spread over the training text, moved on by `shift` of their distance."""
    text, _ = library_bytes()
    starts = ((torch.arange(CALIBRATION) + shift) * (len(text) // CALIBRATION)).long()
    return {"tokens": text[starts[:, None] + torch.arange(CONTEXT)].contiguous()}


def held_out(choose: bool) -> Tensor:
    """Windows [n, 129] spread over the held-out text: every fourth one to choose by, the others to judge by."""
    _, text = library_bytes()
    starts = torch.arange(HELD_OUT) * (len(text) // HELD_OUT)
    chosen = torch.arange(HELD_OUT) % 4 == 0
    return text[starts[chosen == choose, None] + torch.arange(CONTEXT + 1)].contiguous()


def main() -> None:
    """Parse, train if need be, measure, print."""
    parser = options("low-bit weights of a wide language model", rounds=30)
    parser.add_argument("--model", type=Path, required=True, help="its weights; trained if there are none")
    parser.add_argument("--choose", action="store_true", help="measure on the windows that settings are chosen by")
    parser.add_argument("--shift", type=float, default=0.0, help="calibrate on other windows: 0 to 0.9")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.model.exists():
        train(arguments.model)
    measure(arguments, ROWS, load(arguments.model), calibration(arguments.shift), held_out(arguments.choose))


if __name__ == "__main__":
    main()
