"""Text -> samples for a Hugging Face folder, by its own tokenizer: one stream of tokens, cut into equal windows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import InputError

FLAG = "--calib"
IDS = "input_ids"
CONSTANTS = {"attention_mask": 1, "token_type_ids": 0}
"""Windows are full, and of one segment."""

LENGTH = 512
"""Tokens of a sample where the model leaves the length free."""


def tokenize(texts: Sequence[str], folder: Path, wanted: Mapping[str, int | None], count: int) -> dict[str, Tensor]:
    """{input: [n, length] int64}, n <= count, for the inputs of `wanted` {name: length, or None for free}.

    Pieces of text follow each other in one stream, with the end-of-text token between them where there is one.
    Raises InputError when the folder has no tokenizer, or the text is shorter than one sample.
    """
    tokenizer = _load(folder)
    length = wanted.get(IDS)
    window = length or min(LENGTH, int(getattr(tokenizer, "model_max_length", LENGTH)))
    tokens = _stream(tokenizer, texts, window * count)
    if length is None and 1 < len(tokens) < window:
        window = len(tokens)
    if len(tokens) < window or window < 2:
        raise InputError(
            f"the text has {len(tokens)} tokens, a sample needs {window}", where=FLAG, fix="give more text"
        )
    usable = min(len(tokens) // window, count)
    ids = torch.tensor(tokens[: usable * window], dtype=torch.int64).view(usable, window)
    names = wanted or {IDS: None}
    return {IDS: ids} | {name: torch.full_like(ids, value) for name, value in CONSTANTS.items() if name in names}


def _stream(tokenizer: Any, texts: Sequence[str], enough: int) -> list[int]:
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=not tokens, verbose=False)[IDS]
        if tokenizer.eos_token_id is not None and len(texts) > 1:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= enough:
            break
    return tokens


def _load(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("text needs transformers", where=FLAG, fix="pip install 'qexport[hf]'") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all mean that there is no tokenizer it can use
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no tokenizer in {folder}: {reason}", where=FLAG, fix="give arrays of tokens") from error
