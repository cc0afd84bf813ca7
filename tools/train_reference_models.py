"""Train the reference networks and write their checkpoints and data files to `tests/models`.

    python -m tools.train_reference_models                        # everything, about 15 minutes on 2 idle cores
    python -m tools.train_reference_models --models mobilenet     # some of them, and the data files

The seed is fixed, and so is the number of threads, on which the order of floating-point sums depends: the same machine
and torch give the same weights; another processor may round otherwise and end some thousandths away.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tools.data import Predict, committed_data, digits, digits_accuracy, documentation_bytes, lm_perplexity
from tools.models import CHECKPOINT_DIR, CONTEXT, FACTORIES, raise_biases, spread

SEED = 0
THREADS = 2
DIGITS_EPOCHS = 60
FINE_TUNE_EPOCHS = 15
DIGITS_BATCH = 64
LM_STEPS = 1500
LM_BATCH = 16
BACKGROUND = -1.0  # grey level of the digits' paper


def predictor(model: nn.Module) -> Predict:
    """`model`, in eval mode, as the `predict` of `tools.data`'s metrics."""
    model.eval()

    @torch.no_grad()
    def predict(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": model(**inputs)}

    return predict


def jitter_images(images: Tensor) -> Tensor:
    """Each image [N, 1, 8, 8] under its own small rotation, scaling, shear and shift of up to a pixel."""
    count = len(images)
    angle, scale, shear = 0.12 * torch.randn(count), 1 + 0.08 * torch.randn(count), 0.1 * torch.randn(count)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = scale * angle.cos()
    transform[:, 0, 1] = shear - angle.sin()
    transform[:, 1, 0] = angle.sin()
    transform[:, 1, 1] = scale * angle.cos()
    transform[:, :, 2] = 0.5 * torch.rand(count, 2) - 0.25  # the image is 2 wide in these coordinates
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    # sampling fills with 0, which must mean background
    return F.grid_sample(images - BACKGROUND, grid, align_corners=False) + BACKGROUND


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warm_up = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))),
    )


def train_classifier(model: nn.Module, epochs: int, learning_rate: float) -> nn.Module:
    """Train on the digits in place: AdamW, jittered images, label smoothing."""
    data = digits()
    count = len(data.train_x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, epochs * (count // DIGITS_BATCH))
    model.train()
    for _ in range(epochs):
        # the incomplete last batch is left out
        for batch in torch.randperm(count)[: count - count % DIGITS_BATCH].split(DIGITS_BATCH):
            logits = model(jitter_images(data.train_x[batch]))
            loss = F.cross_entropy(logits, data.train_labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def lm_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW for a language model: matrices decay, vectors do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )


def train_lm(model: nn.Module, steps: int) -> nn.Module:
    """Train on the documentation's bytes in place: AdamW on random windows; weights end rounded to float16."""
    text, _ = documentation_bytes()
    optimizer = lm_optimizer(model, 2e-3)
    schedule = cosine_schedule(optimizer, steps)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (LM_BATCH, 1))
        window = text[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}/{steps}: perplexity of the batch {math.exp(loss.item()):.2f}", flush=True)
    return model.half().float().eval()


def _mobilenet_high_bias(relu_net: nn.Module) -> nn.Module:
    return spread(train_classifier(raise_biases(relu_net, SEED), FINE_TUNE_EPOCHS, 5e-4), SEED, log2_std=1.0)


def _train(name: str, trained: dict[str, nn.Module]) -> nn.Module:
    """The network `name`, trained; the variants start from `trained["mobilenet_relu"]`, made when missing."""
    if name in ("mobilenet_spread", "mobilenet_high_bias") and "mobilenet_relu" not in trained:
        trained["mobilenet_relu"] = _train("mobilenet_relu", trained)
    torch.manual_seed(SEED)
    if name == "mobilenet_spread":
        return spread(trained["mobilenet_relu"], SEED)
    if name == "mobilenet_high_bias":
        return _mobilenet_high_bias(trained["mobilenet_relu"])
    if name == "opt_lm":
        return train_lm(FACTORIES[name](), LM_STEPS)
    return train_classifier(FACTORIES[name](), DIGITS_EPOCHS, 3e-3)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write, and print the table of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FACTORIES), default=list(FACTORIES))
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
    for file_name, tensors in committed_data().items():
        save_file(tensors, CHECKPOINT_DIR / file_name)

    trained: dict[str, nn.Module] = {}
    print(f"{'network':<22}{'parameters':>11}{'figure':>24}{'seconds':>9}{'bytes':>10}")
    for name in options.models:
        begin = time.perf_counter()
        model = trained[name] = _train(name, trained)
        seconds = time.perf_counter() - begin
        metric: Callable[[Predict], dict[str, float]] = lm_perplexity if name == "opt_lm" else digits_accuracy
        ((label, value),) = metric(predictor(model)).items()
        stored = model.half() if name == "opt_lm" else model
        path = CHECKPOINT_DIR / f"{name}.safetensors"
        save_file(stored.state_dict(), path)
        parameters = sum(p.numel() for p in model.parameters())
        figure = f"{label} {value:.4f}"
        print(f"{name:<22}{parameters:>11,}{figure:>24}{seconds:>9.0f}{path.stat().st_size:>10,}", flush=True)


if __name__ == "__main__":
    main()
