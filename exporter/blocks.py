"""An ONNX file in onnxruntime as it stands, node by node; with its weights beside it, one block of nodes after another.

Such a file is cut in front of the node whose weights would make a block larger than BLOCK_BYTES. Each block is a model
of its own that reads its weights from the same place, so that what is in memory are one block's weights and the values
that later blocks read. Nothing is fused: every node computes what it computes in the whole file.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from runtimes.base import Array, Artifact, Session
from runtimes.ort import OnnxRuntime

BLOCK_BYTES = 1 << 26

UNOPTIMIZED = OnnxRuntime(optimize=False)


class NodeByNode(Session):
    """The artifact, unoptimized, loaded when it is run; `taps` are values of its graph that `values` gives as well."""

    def __init__(self, artifact: Artifact, taps: Iterable[str] = (), *, block_bytes: int = BLOCK_BYTES) -> None:
        self._artifact, self._block_bytes = artifact, block_bytes
        self._wanted = tuple(dict.fromkeys((*artifact.outputs, *taps)))
        self._weights = artifact.model.with_name(f"{artifact.model.name}.data")
        self._whole: Session | None = None
        self.inputs, self.outputs = artifact.inputs, artifact.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self.check(feeds)
        found = dict(self.values(feeds))
        return {name: found[name] for name in self.outputs}

    def close(self) -> None:
        """Unload; the next run loads it again."""
        self._whole = None

    def values(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """(name, value) of the outputs and the taps, each as soon as its block has run."""
        if self._weights.exists():
            yield from self._in_blocks(feeds)
            return
        if self._whole is None:
            self._whole = self._load()
        yield from self._whole.run(feeds).items()

    def _load(self) -> Session:
        model = onnx.load(self._artifact.model)
        present = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._wanted if name not in present)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "whole.onnx"
            onnx.save(model, path)
            del model  # its weights, of which onnxruntime makes another copy
            return UNOPTIMIZED.load(Artifact("onnxruntime", path, self.inputs, self._wanted))

    def _in_blocks(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        model = onnx.load(self._artifact.model, load_external_data=False)
        blocks = cut(model.graph, self._block_bytes)
        known = dict(feeds)
        # Beside the artifact a second name for its weights costs nothing; elsewhere it might take a copy of them.
        with tempfile.TemporaryDirectory(dir=self._weights.parent) as folder:
            link(self._weights, Path(folder) / self._weights.name)
            for index, nodes in enumerate(blocks):
                later = {name for rest in blocks[index + 1 :] for node in rest for name in reads(node)}
                made = [name for node in nodes for name in node.output if name in later or name in self._wanted]
                if not made:
                    continue
                path = Path(folder) / f"{index}.onnx"
                block = extract(model, nodes, known, made)
                onnx.save(block, path)
                inputs = tuple(value.name for value in block.graph.input)
                session = UNOPTIMIZED.load(Artifact("onnxruntime", path, inputs, tuple(made)))
                found = session.run({name: known[name] for name in inputs})
                del session
                yield from ((name, value) for name, value in found.items() if name in self._wanted)
                known = {name: value for name, value in {**known, **found}.items() if name in later}


def link(source: Path, target: Path) -> None:
    """The same file in another folder: by a second name, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def cut(graph: onnx.GraphProto, block_bytes: int) -> list[list[onnx.NodeProto]]:
    """The graph's nodes in order, in blocks that read no more than `block_bytes` of weights; a larger node is alone."""
    sizes = {tensor.name: stored_bytes(tensor) for tensor in graph.initializer}
    blocks: list[list[onnx.NodeProto]] = []
    held: set[str] = set()
    for node in graph.node:
        weights = {name for name in reads(node) if name in sizes}
        if not blocks or (held and sum(sizes[name] for name in held | weights) > block_bytes):
            blocks.append([])
            held = set()
        blocks[-1].append(node)
        held |= weights
    return blocks


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a constant, wherever it lies."""
    places = {entry.key: entry.value for entry in tensor.external_data}
    return int(places["length"]) if "length" in places else tensor.ByteSize()


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of the values that a node reads, those that its inner graphs take from outside among them."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {name for child in graph.node for name in reads(child)} | {value.name for value in graph.output}
            own = {name for child in graph.node for name in child.output}
            found |= inner - own - {entry.name for entry in (*graph.input, *graph.initializer)}
    return found - {""}


def extract(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], known: Mapping[str, Array], made: Collection[str]
) -> onnx.ModelProto:
    """A model of those nodes: its inputs are the values of `known` that they read, its outputs `made`."""
    read = {name for node in nodes for name in reads(node)}
    block = onnx.ModelProto(ir_version=model.ir_version)
    block.opset_import.extend(model.opset_import)
    block.functions.extend(model.functions)
    block.graph.name = "block"
    block.graph.node.extend(nodes)
    block.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    for name in sorted(read & known.keys()):
        kind = onnx.helper.np_dtype_to_tensor_dtype(known[name].dtype)
        block.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * known[name].ndim))
    block.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    return block
