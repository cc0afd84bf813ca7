"""Hugging Face architectures with random weights: captured, quantized, lowered, and the same in onnxruntime."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passes.act_quant import ActQuant
from passes.base import Program
from passes.graph import copy_graph
from passes.rtn import RTN
from tests.exporter.compiled import INTEGER_KERNELS, compiled, program_of, quantized, sqnr, typical_sqnr

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.hf, pytest.mark.ort]

WORDS = 60
TEXT = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        **TEXT, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32, use_cache=False
    )
    return transformers.OPTForCausalLM(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, intermediate_size=64, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**TEXT, intermediate_size=64, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=8, num_labels=5)
    return transformers.MobileNetV2ForImageClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (opt, llama, bert, gpt2, resnet, mobilenet, vit)
}


def inputs(name: str, size: int, length: int) -> dict[str, Tensor]:
    """A batch for the model; `length` is that of texts."""
    generator = torch.Generator().manual_seed(size)
    if name in ("resnet", "mobilenet", "vit"):
        pixels = 16 if name == "vit" else 32
        return {"pixel_values": torch.randn(size, 3, pixels, pixels, generator=generator)}
    ids = torch.randint(0, WORDS, (size, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def built(name: str) -> nn.Module:
    """The model with weights large enough that its output depends on its input, and trained-looking batch norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
    return model


@functools.cache
def captured(name: str) -> Program:
    batch = inputs(name, 4, 9)
    free = {key: {0: "batch", 1: "seq"} if value.dim() == 2 else {0: "batch"} for key, value in batch.items()}
    return program_of(built(name), batch, dynamic=free)


def program(name: str) -> Program:
    """A program of its own: the capture is shared, and never changed."""
    return dataclasses.replace(captured(name), graph=copy_graph(captured(name).graph))


@pytest.mark.parametrize("name", MODELS)
def test_float_parity_at_another_size(name: str, tmp_path: Path) -> None:
    model, batch = built(name), inputs(name, 3, 14)
    with torch.no_grad():
        expected = model(**batch)[0]
    lowered = compiled(program(name), tmp_path)
    outputs = lowered.outputs(batch)
    assert outputs.graph.equal(outputs.reference)
    for actual in (outputs.graph, outputs.unoptimized, outputs.optimized):
        # Float32 sums in another order: about 1e-6 a layer relative to the largest value, over up to 50 layers.
        assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_w8a8_parity_and_kernels(name: str, tmp_path: Path) -> None:
    result = compiled(quantized(program(name), ActQuant(), RTN()), tmp_path)
    outputs = result.outputs(inputs(name, 5, 6))
    assert typical_sqnr(outputs.plain, outputs.unoptimized) >= 60
    # Far from float, so that the parity above compares two quantized networks.
    assert sqnr(outputs.reference, outputs.plain) < 50
    assert result.repeated == ()
    kinds = {layer.name: layer.kind for layer in result.program.layers()}
    assert {layer.name for layer in result.lowered.layers} == set(kinds)
    kernels = {layer: kernel for layer, kernel in result.kernel_of.items() if kinds[layer] != "embedding"}
    assert set(kernels.values()) <= INTEGER_KERNELS, kernels
