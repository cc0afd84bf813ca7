"""Small quantized folders, packed here bit by bit from the layouts' documentation, and the float models they mean."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Parts = dict[str, Tensor]
WORDS = 60


@dataclasses.dataclass(frozen=True)
class Packed:
    """A layer as a tool stores it, and the matrix [out, in] it stands for."""

    parts: Parts
    matrix: Tensor


@dataclasses.dataclass(frozen=True)
class Folder:
    """A written checkpoint: what each layer holds, and the float model of the same values."""

    path: Path
    layers: Mapping[str, Packed]
    model: nn.Module

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What dequantizing and running gives."""
        with torch.no_grad():
            value: Tensor = self.model(**batch).logits
        return value


Pack = Callable[[tuple[int, int], np.random.Generator], Packed]


def folder(path: Path, model: nn.Module, settings: Mapping[str, Any], pack: Pack, *, half: bool = False) -> Folder:
    """`model` with every linear layer of its blocks quantized by `pack`, written to `path`."""
    generator = np.random.default_rng(0)
    layers = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in ("Linear", "Conv1D") or name == "lm_head":
            continue
        shape = tuple(module.weight.shape if kind == "Linear" else module.weight.T.shape)
        layers[name] = pack((shape[0], shape[1]), generator)
    (model.half() if half else model).save_pretrained(path)
    model.float()
    for name, packed in layers.items():
        module = model.get_submodule(name)
        with torch.no_grad():  # half would have rounded them
            module.weight.copy_(packed.matrix if type(module).__name__ == "Linear" else packed.matrix.T)
    state = load_file(path / "model.safetensors")
    for name, packed in layers.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": value.clone() for part, value in packed.parts.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    configure(path, quantization_config=dict(settings))
    return Folder(path, layers, model)


def configure(path: Path, **changes: Any) -> None:
    """Change the folder's config.json."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
    (path / "config.json").write_text(json.dumps(config))


def change(path: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the folder, or take them out; dots of their names are written __."""
    state = load_file(path / "model.safetensors")
    for key, value in tensors.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value.contiguous()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def opt(**changes: Any) -> nn.Module:
    """One block of OPT."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=32, **changes)
    model: nn.Module = transformers.OPTForCausalLM(config).eval()
    return model


def llama() -> nn.Module:
    """One block of Llama: no biases, head not tied."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def gpt2() -> nn.Module:
    """One block of GPT-2, whose linear layers are Conv1D."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    return model


def batch(size: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Random tokens."""
    ids = torch.randint(0, WORDS, (size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---- GPTQ -----------------------------------------------------------------------------------------------------------


def bit_string(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """The values one after another, lowest bits first, as words of 32 bits."""
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    return np.frombuffer(number.to_bytes(len(values) * bits // 8, "little"), np.int32)


def gptq(
    bits: int,
    group_size: int = 16,
    *,
    symmetric: bool = False,
    v2: bool = False,
    order: str = "",
    zero: int | None = None,
) -> Pack:
    """AutoGPTQ's layout. `order`: "" without g_idx, "plain" with the trivial one, "act" with a shuffled one."""

    def pack(shape: tuple[int, int], generator: np.random.Generator) -> Packed:
        outputs, inputs = shape
        size = inputs if group_size < 0 else group_size
        groups = -(-inputs // size)
        index = np.arange(inputs) // size
        if order == "act":
            index = index[generator.permutation(inputs)]
        codes = generator.integers(0, 2**bits, shape)
        zeros = generator.integers(0, 2**bits, (outputs, groups))
        if symmetric:
            zeros[:] = 2 ** (bits - 1)
        if zero is not None:
            zeros[:] = zero
        scales = generator.uniform(0.01, 0.03, (outputs, groups)).astype(np.float16)
        stored = zeros if v2 else (zeros - 1) % 2**bits
        parts = {
            "qweight": torch.tensor(np.stack([bit_string(row, bits) for row in codes], axis=1)),
            "qzeros": torch.tensor(np.stack([bit_string(column, bits) for column in stored.T])),
            "scales": torch.tensor(scales.T.copy()),
        }
        if order:
            parts["g_idx"] = torch.tensor(index.astype(np.int32))
        matrix = (codes - zeros[:, index]) * scales[:, index].astype(np.float32)
        return Packed(parts, torch.tensor(matrix, dtype=torch.float32))

    return pack


def gptq_settings(bits: int, group_size: int = 16, **others: Any) -> dict[str, Any]:
    """Its configuration."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False, **others}


# ---- AQLM -----------------------------------------------------------------------------------------------------------


def aqlm(books: int, bits: int, height: int = 1, width: int = 8) -> Pack:
    """The layout of AQLM's inference package."""

    def pack(shape: tuple[int, int], generator: np.random.Generator) -> Packed:
        blocks = (shape[0] // height, shape[1] // width)
        codes = generator.integers(0, 2**bits, (*blocks, books))
        codebooks = (generator.standard_normal((books, 2**bits, height, width)) / 8).astype(np.float16)
        scales = generator.uniform(0.5, 1.5, (blocks[0], 1, 1, 1)).astype(np.float16)
        signed = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        parts = {
            "codes": torch.tensor(signed.astype(np.int8 if bits <= 8 else np.int16)),
            "codebooks": torch.tensor(codebooks),
            "scales": torch.tensor(scales),
        }
        matrix = np.zeros(shape, np.float32)
        for row in range(blocks[0]):
            for column in range(blocks[1]):
                block = sum(codebooks[m, codes[row, column, m]].astype(np.float32) for m in range(books))
                place = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                matrix[place] = block * scales[row, 0].astype(np.float32)
        return Packed(parts, torch.tensor(matrix))

    return pack


def aqlm_settings(books: int, bits: int, height: int = 1, width: int = 8) -> dict[str, Any]:
    """Its configuration."""
    return {
        "quant_method": "aqlm",
        "num_codebooks": books,
        "nbits_per_codebook": bits,
        "out_group_size": height,
        "in_group_size": width,
        "linear_weights_not_to_quantize": ["lm_head.weight"],
    }


# ---- HQQ ------------------------------------------------------------------------------------------------------------

VALUES_IN_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def hqq(bits: int, group_size: int = 16, axis: int = 1, *, as_float: bool = False) -> Pack:
    """The layout of HQQ's linear layer."""

    def pack(shape: tuple[int, int], generator: np.random.Generator) -> Packed:
        count = shape[0] * shape[1]
        grouped = (count // group_size, group_size) if axis == 1 else (group_size, count // group_size)
        codes = generator.integers(0, 2**bits, grouped)
        meta = (grouped[0], 1) if axis == 1 else (1, grouped[1])
        scale = generator.uniform(0.01, 0.03, meta).astype(np.float16)
        zero = generator.uniform(0, 2**bits - 1, meta).astype(np.float16)
        name = {3: "3bit_32"}.get(bits, f"{bits}bit_u8")
        words = torch.tensor(slabs(codes, bits))
        parts = {
            "W_q": words.view(torch.float16) if as_float else words,
            "scale": torch.tensor(scale),
            "zero": torch.tensor(zero),
            "shape": torch.tensor(shape),
            "packing": torch.tensor([ord(letter) for letter in name], dtype=torch.uint8),
            "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
            **{
                key: torch.tensor(value, dtype=torch.int32)
                for key, value in (("nbits", bits), ("group_size", group_size), ("axis", axis))
            },
        }
        matrix = ((codes - zero.astype(np.float32)) * scale.astype(np.float32)).reshape(shape)
        return Packed(parts, torch.tensor(matrix, dtype=torch.float32))

    return pack


def slabs(codes: NDArray[np.int64], bits: int) -> NDArray[Any]:
    """Row k * step + r of the codes in word r, the first slab in the highest bits."""
    per_word = VALUES_IN_WORD[bits]
    step = -(-len(codes) // per_word)
    words = np.zeros((step, codes.shape[1]), np.int64)
    for row, values in enumerate(codes):
        slab, place = divmod(row, step)
        words[place] |= values << (bits * (per_word - 1 - slab))
    return words.astype(np.int32 if bits == 3 else np.uint8)


def hqq_settings(bits: int, group_size: int = 16, axis: int = 1) -> dict[str, Any]:
    """Its configuration."""
    weight = {"nbits": bits, "group_size": group_size, "axis": axis, "channel_wise": True, "view_as_float": False}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": weight}, "skip_modules": ["lm_head"]}
