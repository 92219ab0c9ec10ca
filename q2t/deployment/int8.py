"""int8 versions of an ONNX model: recipes from small to careful, and the gate that one of them has to pass.

Dynamic quantization halved the accuracy of one model and cost another nothing (onnxruntime #18430), so no
recipe is trusted: `gate` takes the first that keeps the wanted share of float32's accuracy.

All recipes store the embedding and the output projection as one matrix of int8, in blocks with a scale each,
which `Gather` and `MatMulNBits` read both; quantize_dynamic would leave a tied projection in float32.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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

BLOCK = 64
"""Weights that share a scale."""


class Recipe(NamedTuple):
    name: str
    quantize: Callable[[Path, Path], None]
    """From an ONNX file to another, which it writes."""


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
        recipe.quantize(folder / ONNX_FILE, partial / ONNX_FILE)
        copy_settings(folder, partial)


def gate(
    folder: Path,
    target: Path,
    accuracy_of: Callable[[Path], float],
    *,
    reference: float,
    recovery: float,
    recipes: Sequence[Recipe] | None = None,
) -> Trial:
    """Publish the first recipe's model that keeps the share `recovery` of the accuracy `reference`.

    Args:
        accuracy_of: from a model folder to its accuracy, in the reference's unit and from the same run.
        reference: float32's accuracy.
        recipes: RECIPES unless given.

    Returns:
        What was published.

    Raises:
        ValueError: no recipe passed; it holds the figures of all. `target` is untouched then.
    """
    candidate = target.with_name(target.name + ".candidate.partial")
    trials: list[Trial] = []
    for recipe in RECIPES if recipes is None else recipes:
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


def _quantize(source: Path, target: Path, blockwise: str) -> None:
    """int8 weights: blockwise where a node's name has a match of the pattern, dynamic elsewhere.

    Blockwise is what onnxruntime's MatMulNBitsQuantizer does. That one needs a package which onnxruntime does
    not bring, and stores a matrix once per use.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    graph = model.graph
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    _share_embedding(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "MatMul" and node.input[1] in weights and re.search(blockwise, node.name):
            table = numpy_helper.to_array(weights[node.input[1]]).T
            _multiply(graph, node, _store(graph, node.input[1], table))
    _drop_unused(graph)
    # A scale per column is 0.8 of SmolLM2-135M's 142 MB, and takes a fifth of the divergence away.
    with _quiet():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF,
        )


def _share_embedding(graph: Any) -> None:
    """Store embedding and output projection as int8, once if they are tied."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    embed = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] in weights)
    head = next(node for node in graph.node if node.output[0] == "logits")
    transpose = next((node for node in graph.node if node.output[0] == head.input[1]), None)

    table = numpy_helper.to_array(weights[embed.input[0]])
    assert table.shape[1] % _block(table.shape[1]) == 0, "a row that needs padding can't be looked up"
    stored = _store(graph, "embedding", table)
    _replace(graph, embed, _lookup(graph, embed, stored))
    if transpose is None:  # not tied
        stored = _store(graph, "lm_head", numpy_helper.to_array(weights[head.input[1]]).T)
    else:
        assert transpose.op_type == "Transpose" and transpose.input[0] == embed.input[0]
        graph.node.remove(transpose)
    _multiply(graph, head, stored)


class _Stored(NamedTuple):
    """A matrix [rows, columns] as bytes [rows, blocks, block] and scales [rows, blocks]."""

    data: str
    scales: str
    rows: int
    columns: int


def _store(graph: Any, name: str, table: Any) -> _Stored:
    rows, columns = table.shape
    block = _block(columns)
    padded = np.pad(table.astype(np.float32), ((0, 0), (0, -columns % block)))
    blocks = padded.reshape(rows, -1, block)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    data = (np.rint(blocks / divisors) + ZERO).astype(np.uint8)
    stored = _Stored(f"{name}.int8", f"{name}.scales", rows, columns)
    graph.initializer.append(numpy_helper.from_array(data, stored.data))
    graph.initializer.append(numpy_helper.from_array(scales, stored.scales))
    return stored


def _block(columns: int) -> int:
    """Weights that share a scale. Divides the columns where it can; MatMulNBits has powers of 2 from 16."""
    block = math.gcd(columns, BLOCK)
    return block if block >= 16 else BLOCK


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


def _multiply(graph: Any, matmul: Any, stored: _Stored) -> None:
    """Let a MatMul's place be taken by one with the stored matrix, transposed."""
    new = helper.make_node(
        "MatMulNBits",
        [matmul.input[0], stored.data, stored.scales],
        list(matmul.output),
        name=matmul.name,
        domain="com.microsoft",
        K=stored.columns,
        N=stored.rows,
        bits=8,
        block_size=_block(stored.columns),
        accuracy_level=INT8,
    )
    _replace(graph, matmul, [new])


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


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime recommends a pre-processing that has nothing to do here, through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


RECIPES = (
    Recipe("dynamic", partial(_quantize, blockwise="(?!)")),
    Recipe("dynamic without down_proj", partial(_quantize, blockwise="down_proj")),
    Recipe("weight only", partial(_quantize, blockwise="")),
)
"""Small to careful."""
