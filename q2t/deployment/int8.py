"""int8 versions of an ONNX model: recipes from small to careful, and the gate that one of them has to pass.

int8 halved the accuracy of one model and cost another nothing (onnxruntime #18430), so no recipe is trusted:
`gate` takes the first that keeps the wanted share of float32's accuracy.

A recipe stores every matrix as int8, in blocks of weights with a scale each: what onnxruntime calls weight only.
Its quantize_dynamic, with a scale per column and one for all activations, decodes as fast, reads a prompt faster
and is a little smaller, but strays much further from float32.
Its MatMulNBitsQuantizer needs a package that onnxruntime does not bring, and stores a tied embedding twice; here
`Gather` and `MatMulNBits` read one matrix.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from q2t.deployment.onnx import copy_settings, publishing
from q2t.deployment.runtime import ONNX_FILE

ZERO = 128
"""The byte that stands for 0: MatMulNBits' default where it is given no zero points."""

INT8 = 4
"""MatMulNBits' accuracy_level: activations are multiplied as int8 too, in blocks. As float32 they are slower
than no quantization at all."""


class Recipe(NamedTuple):
    name: str
    block: int
    """Weights that share a scale: a power of 2 from 16, as MatMulNBits has them."""


RECIPES = (Recipe("weight only, blocks of 64", 64), Recipe("weight only, blocks of 32", 32))
"""Small to careful."""


MAXIMUM_WEIGHTS = onnx.checker.MAXIMUM_PROTOBUF - 2**26
"""Bytes of weights that fit into a graph's own file: protobuf's limit, less room for the graph."""


@dataclass(frozen=True)
class Trial:
    """What one recipe came to."""

    recipe: str
    accuracy: float
    bytes: int
    """Of the whole folder."""


def quantize(folder: Path, target: Path, recipe: Recipe) -> None:
    """Publish the ONNX model folder `folder`, quantized, as `target`. Equal models give equal bytes."""
    with publishing(target) as partial:
        model = onnx.load(folder / ONNX_FILE)
        _quantize(model, recipe.block)
        # Otherwise in a file of their own. Counted here, since protobuf's ByteSize fails past its limit.
        apart = sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= MAXIMUM_WEIGHTS
        onnx.save(model, partial / ONNX_FILE, save_as_external_data=apart, location=f"{ONNX_FILE}.data")
        copy_settings(folder, partial)


def gate(
    folder: Path,
    target: Path,
    accuracy_of: Callable[[Path], float],
    *,
    reference: float,
    recovery: float,
) -> Trial:
    """Publish the model of the first recipe that keeps the share `recovery` of the accuracy `reference`.

    Args:
        accuracy_of: from a model folder to its accuracy, in the reference's unit and from the same run.
        reference: float32's accuracy.

    Returns:
        What was published.

    Raises:
        ValueError: no recipe passed; it holds the figures of all. `target` is untouched then.
    """
    candidate = target.with_name(target.name + ".candidate.partial")
    trials: list[Trial] = []
    for recipe in RECIPES:
        quantize(folder, candidate, recipe)
        size = sum(path.stat().st_size for path in candidate.iterdir())
        trials.append(Trial(recipe.name, accuracy_of(candidate), size))
        if trials[-1].accuracy >= recovery * reference:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(candidate, target)
            return trials[-1]
        shutil.rmtree(candidate)
    figures = "\n".join(f"  {t.recipe:<28} {t.accuracy:8.4f} {t.bytes / 1e6:9.1f} MB" for t in trials)
    raise ValueError(
        f"export.recovery {recovery}: no int8 recipe keeps {recovery:.0%} of float32's accuracy "
        f"{reference:.4f}, at least {recovery * reference:.4f}:\n{figures}\n"
        "Lower export.recovery, or deploy the float32 model"
    )


def _quantize(model: Any, block: int) -> None:
    """Let int8 matrices take the place of the embedding and of every matrix that a MatMul has as its weight."""
    graph = model.graph
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    weights = {tensor.name: tensor for tensor in graph.initializer}
    embed = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] in weights)
    table = _store(graph, embed.input[0], numpy_helper.to_array(weights[embed.input[0]]), block)
    assert table.columns % table.block == 0, "a row that needs padding can't be looked up"
    _replace(graph, embed, _lookup(graph, embed, table))
    tied = {node.output[0]: node for node in graph.node if list(node.input) == [embed.input[0]]}  # the transposed
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        if node.input[1] in weights:
            stored = _store(graph, node.input[1], numpy_helper.to_array(weights[node.input[1]]).T, block)
            _replace(graph, node, [_multiply(node, stored)])
        elif node.input[1] in tied:
            graph.node.remove(tied.pop(node.input[1]))
            _replace(graph, node, [_multiply(node, table)])
    _drop_unused(graph)


class _Stored(NamedTuple):
    """A matrix [rows, columns] as bytes [rows, blocks, block] and scales [rows, blocks]."""

    data: str
    scales: str
    rows: int
    columns: int
    block: int


def _store(graph: Any, name: str, table: Any, block: int) -> _Stored:
    """Add a matrix to the graph. Its blocks are smaller than `block` where that leaves none to pad."""
    rows, columns = table.shape
    fits = math.gcd(columns, block)
    block = fits if fits >= 16 else block
    padded = np.pad(table.astype(np.float32), ((0, 0), (0, -columns % block)))
    blocks = padded.reshape(rows, -1, block)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    data = (np.rint(blocks / divisors) + ZERO).astype(np.uint8)
    stored = _Stored(f"{name}.int8", f"{name}.scales", rows, columns, block)
    graph.initializer.append(numpy_helper.from_array(data, stored.data))
    graph.initializer.append(numpy_helper.from_array(scales, stored.scales))
    return stored


def _lookup(graph: Any, embed: Any, stored: _Stored) -> list[Any]:
    """Nodes for rows of the stored matrix, in float32: [batch, sequence] to [batch, sequence, columns]."""
    constants: dict[str, Any] = {
        "embedding.zero": np.array(ZERO, np.float32),
        "embedding.last": np.array([-1], np.int64),
        "embedding.shape": np.array([0, 0, stored.columns], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    ids, result = embed.input[1], embed.output[0]
    return [
        node("Gather", [stored.data, ids], "embedding.bytes"),
        node("Cast", ["embedding.bytes"], "embedding.floats", to=TensorProto.FLOAT),
        node("Sub", ["embedding.floats", "embedding.zero"], "embedding.centred"),
        node("Gather", [stored.scales, ids], "embedding.factors"),
        node("Unsqueeze", ["embedding.factors", "embedding.last"], "embedding.columns"),
        node("Mul", ["embedding.centred", "embedding.columns"], "embedding.blocks"),
        node("Reshape", ["embedding.blocks", "embedding.shape"], result),
    ]


def _multiply(matmul: Any, stored: _Stored) -> Any:
    """A node that takes a MatMul's place, with the stored matrix transposed."""
    return helper.make_node(
        "MatMulNBits",
        [matmul.input[0], stored.data, stored.scales],
        list(matmul.output),
        name=matmul.name,
        domain="com.microsoft",
        K=stored.columns,
        N=stored.rows,
        bits=8,
        block_size=stored.block,
        accuracy_level=INT8,
    )


def _replace(graph: Any, node: Any, by: list[Any]) -> None:
    """Put nodes in the place of one: a graph's nodes are in topological order."""
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, new in enumerate(by):
        graph.node.insert(place + offset, new)


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
