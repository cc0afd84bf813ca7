"""Plugins of full TensorRT for 3-bit and codebook weights: quick-deployable, their kernels compiled ahead of time.

    int3_linear          x, packed, scale, zero, bias                                      -> y
    int3_linear_meta     x, packed, scale and zero as bytes, each with its meta values, bias -> y
    codebook_linear      x, codes, codebooks, scales, bias                                 -> y
    codebook_decode      codes, codebooks, scales                                          -> weight [out, in]

An ONNX node names its set of kernels in the attribute `kernels`; build.json says what each is. A set's kernels compute
the same, and differ in the number of rows that they are fast for: they are the tactics that TensorRT times. Grids and
sizes are symbolic, so that the batch stays free. The engine holds the PTX and needs neither this file nor Python.

TensorRT calls a kernel with the pointers of its inputs, the int32 sizes, the pointer of its output, and checks nothing.

The builder's child process loads this file alone: it imports nothing but TensorRT.
"""

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMESPACE = "qexport"
META = ("meta_scale", "meta_zero")
INPUTS: Mapping[str, tuple[str, ...]] = {
    "int3_linear": ("x", "packed", "scale", "zero", "bias"),
    "int3_linear_meta": (
        "x",
        "packed",
        "scale",
        *(f"scale_{name}" for name in META),
        "zero",
        *(f"zero_{name}" for name in META),
        "bias",
    ),
    "codebook_linear": ("x", "codes", "codebooks", "scales", "bias"),
    "codebook_decode": ("codes", "codebooks", "scales"),
}

Tensors = Sequence[Any]  # TensorRT's descriptions of tensors; their shapes are symbolic


def register(folder: Path, kernel_sets: Mapping[str, Any], *, lazily: bool = False) -> None:
    """Make the plugins known to TensorRT; PTX is read from `folder`, `kernel_sets` is that part of build.json."""
    for name in INPUTS:
        _register(importlib.import_module("tensorrt.plugin"), name, folder, kernel_sets, lazily)


def _register(trtp: Any, name: str, folder: Path, kernel_sets: Mapping[str, Any], lazily: bool) -> None:
    """One plugin. TensorRT reads the functions' signatures, one parameter for each tensor, and passes by position."""
    inputs = INPUTS[name]
    tensors = dict.fromkeys(inputs, trtp.TensorDesc)
    identifier = f"{NAMESPACE}::{name}"

    def describe(*values: Any, kernels: str) -> Any:
        return output_of(inputs, values)

    def autotune(*values: Any) -> list[Any]:
        chosen = kernel_sets[values[len(inputs)]]
        return [trtp.AutoTuneCombination(", ".join(chosen["types"]), "LINEAR", tactics_of(chosen))]

    def launch(*values: Any) -> tuple[Any, ...]:
        described, tactic = dict(zip(inputs, values, strict=False)), values[-1]
        kernel = kernel_sets[values[len(inputs)]]["kernels"][tactic - 1]
        sizes = sizes_of(described)
        started = trtp.KernelLaunchParams()
        started.grid_x, started.grid_y = grid_of(kernel, sizes, trtp.cdiv)
        started.block_x = kernel["threads"]
        started.shared_mem = 0
        extra = trtp.SymIntExprs(len(kernel["sizes"]))
        for index, size in enumerate(kernel["sizes"]):
            extra[index] = trtp.SymInt32(sizes[size])
        return kernel["entry"], (folder / kernel["ptx"]).read_bytes(), started, extra

    attributes = {"kernels": str}
    text = str | bytes
    _sign(describe, {**tensors, **attributes}, trtp.TensorDesc)
    _sign(autotune, {**tensors, **attributes, "outputs": None}, list[trtp.AutoTuneCombination])
    result = tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]
    _sign(launch, {**tensors, **attributes, "outputs": None, "tactic": int}, result)
    trtp.register(identifier, lazy_register=lazily)(describe)
    trtp.autotune(identifier)(autotune)
    trtp.aot_impl(identifier)(launch)


def _sign(function: Callable[..., Any], parameters: Mapping[str, object], result: object) -> None:
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    listed = [inspect.Parameter(name, kind, annotation=hint or none) for name, hint in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=result)  # type: ignore[attr-defined]  # of any


def output_of(inputs: Sequence[str], values: Tensors) -> Any:
    """The description of the output."""
    described = dict(zip(inputs, values, strict=True))
    sizes = sizes_of(described)
    if "x" in described:
        output = described["x"].like()
        output.shape_expr[len(output.shape_expr) - 1] = sizes["out"]
        return output
    weight = described["scales"].like()
    weight.shape_expr[0], weight.shape_expr[1] = sizes["out"], sizes["columns"]
    return weight


def sizes_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Rows (of a product only), outputs and columns of the weight."""
    if "x" in described:
        shape = list(described["x"].shape_expr)
        rows = functools.reduce(operator.mul, shape[:-1])
        return {"rows": rows, "out": described["bias"].shape_expr[0], "columns": shape[-1]}
    codes, codebooks = described["codes"].shape_expr, described["codebooks"].shape_expr
    return {"out": codes[0] * codebooks[2], "columns": codes[1] * codebooks[3]}


def grid_of(kernel: Mapping[str, Any], sizes: Mapping[str, Any], cdiv: Callable[[Any, int], Any]) -> tuple[Any, Any]:
    """The grid: blocks of outputs, by blocks of rows or, without rows, of columns."""
    along = sizes["rows"] if "rows" in sizes else sizes["columns"]
    return cdiv(sizes["out"], kernel["block_outputs"]), cdiv(along, kernel["block_rows"])


def tactics_of(kernel_set: Mapping[str, Any]) -> list[int]:
    """Numbers of the kernels, from 1 on: 0 is TensorRT's word for none."""
    return list(range(1, len(kernel_set["kernels"]) + 1))
