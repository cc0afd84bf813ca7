"""Archives of ordinary networks, which the inspection must let through: they load to the same outputs."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from exporter.load import load_model


class Args(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor, *, z: torch.Tensor) -> torch.Tensor:
        return x * y + z


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], pair: tuple[torch.Tensor, list[torch.Tensor]]) -> dict[str, Any]:
        total = batch["ids"].float() + pair[0] + pair[1][0]
        return {"total": total, "parts": (batch["mask"], [pair[1][1], total.sum()]), "odd key!": total}


class Ordered(nn.Module):
    def forward(
        self, named: "collections.OrderedDict[str, torch.Tensor]"
    ) -> "collections.OrderedDict[str, torch.Tensor]":
        return collections.OrderedDict(b=named["a"] + 1)


class Variadic(nn.Module):
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return args[0] + args[1] + kwargs["extra"]


class Scalars(nn.Module):
    def forward(self, x: torch.Tensor, n: int, flag: bool, mode: str, none: None) -> torch.Tensor:
        return x * n if flag and mode == "fast, {exact}" else x


class Shapes(nn.Module):
    """Sizes computed from sizes: halves, ends cut off, concatenation, windows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x[: x.shape[0] // 2]
        cut = y[1:-1:2]
        pooled = nn.functional.avg_pool1d(y.T.unsqueeze(0), 3, 2)
        return half.reshape(-1), torch.cat([x, y]), cut, pooled, x.new_full((x.shape[0] + 1,), x.shape[0] * 2 % 3)


class Unbacked(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        count = n.item()
        torch._check(count >= 1)
        torch._check(count <= x.shape[0])
        return x.narrow(0, 0, count) * 2  # type: ignore[arg-type]  # item() of an integer tensor


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.full((4,), 2.0))
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1), persistent=False)
        self.plain = torch.arange(4.0)
        self.blocks = nn.ModuleDict({"a b": nn.Linear(4, 4), "c-d": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(x @ x.T + self.mask, dim=-1)
        return (
            self.blocks["c-d"](self.blocks["a b"](scores @ x)) + self.kept + self.plain + torch.tensor([1.0, 2, 3, 4])
        )


class Mutating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)  # type: ignore[operator]  # a buffer
        return x + self.steps


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


class Contexts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().amax()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() * scale


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


batch = Dim("batch", min=2, max=64)
x34 = torch.linspace(-1, 1, 12).reshape(3, 4)
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]
NORMAL: dict[str, Case] = {
    "args and kwargs": (Args(), (x34, x34), {"z": x34}, None),
    "nested containers": (
        Nested(),
        ({"ids": torch.arange(4), "mask": torch.ones(4, dtype=torch.bool)}, (torch.ones(4), [torch.ones(4), x34])),
        {},
        None,
    ),
    "ordered dict": (Ordered(), (collections.OrderedDict(a=x34),), {}, None),
    "variadic": (Variadic(), (x34, x34), {"extra": x34}, None),
    "scalars": (Scalars(), (x34, 3, True, "fast, {exact}", None), {}, None),
    "dynamic batch": (nn.Linear(4, 2), (x34,), {}, ({0: batch},)),
    "derived dimensions": (Args(), (x34, x34), {"z": x34[:1]}, {"x": {0: batch}, "y": {0: batch}, "z": None}),
    "computed shapes": (Shapes(), (torch.ones(6, 4), torch.ones(13, 4)), {}, {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}),
    "unbacked size": (Unbacked(), (x34, torch.tensor(2)), {}, None),
    "buffers and constants": (Buffers(), (torch.ones(4, 4),), {}, None),
    "buffer mutation": (Mutating(), (x34,), {}, None),
    "tied weights": (Tied(), (torch.tensor([[1, 2, 3]]),), {}, None),
    "half": (nn.Linear(4, 2).half(), (x34.half(),), {}, None),
    "bfloat16": (nn.Linear(4, 2).bfloat16(), (x34.bfloat16(),), {}, None),
    "grad mode and autocast": (Contexts(), (x34,), {}, None),
    "branch": (Branch(), (x34,), {}, None),
    "convolution": (conv(), (torch.ones(2, 3, 8, 8),), {}, ({0: batch},)),
}


def leaves(tree: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("name", NORMAL)
def test_normal_archives_pass(name: str, tmp_path: Path) -> None:
    module, args, kwargs, shapes = NORMAL[name]
    program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes)
    assert_loads_equal(program, args, kwargs, tmp_path)


def test_an_archive_without_sample_inputs_passes(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 2), (x34,))
    program.example_inputs = None
    assert_loads_equal(program, (x34,), {}, tmp_path)


def assert_loads_equal(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], folder: Path
) -> None:
    path = folder / "model.bin"
    torch.export.save(program, path, extra_files={"about.txt": "a note"})
    loaded = load_model(path)
    assert loaded.kind == "exported"
    assert loaded.program is not None
    expected = leaves(program.module(check_guards=False)(*args, **kwargs))
    actual = leaves(loaded.program.module(check_guards=False)(*args, **kwargs))
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


tokens = torch.arange(12).reshape(2, 6)
pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], torch.Tensor]] = {
    "opt": (
        "OPTForCausalLM",
        small | {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        tokens,
    ),
    "llama": ("LlamaForCausalLM", small | {"intermediate_size": 32, "num_key_value_heads": 1}, tokens),
    "bert": ("BertForSequenceClassification", small | {"intermediate_size": 32}, tokens),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, tokens),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        pixels,
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 32}, pixels),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 32, "patch_size": 8},
        pixels,
    ),
}


@pytest.mark.hf
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_archives_pass(name: str, tmp_path: Path) -> None:
    import transformers

    architecture, options, inputs = HUGGING_FACE[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    module = model_class(model_class.config_class(**options, use_cache=False)).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if inputs is tokens else {0: Dim.DYNAMIC},)
    program = torch.export.export(module, (inputs,), dynamic_shapes=shapes)
    assert_loads_equal(program, (inputs,), {}, tmp_path)
