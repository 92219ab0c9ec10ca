"""A model folder as ONNX: one graph for prefill and decoding, float32, equal models in equal bytes.

The graph is optimum's (task text-generation-with-past): input_ids, attention_mask, position_ids and
past_key_values.N.key/value in; logits [batch, sequence, vocabulary] and present.N.key/value out. Tied
embeddings are stored once: the output projection reads the embedding transposed.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from q2t.config import Compute
from q2t.deployment.runtime import ONNX_FILE, OnnxEngine, TorchEngine
from q2t.sources import WHITELIST, load_model, load_tokenizer


def export(folder: Path, target: Path) -> None:
    """Publish the torch model of `folder` as the ONNX model folder `target`.

    Weights are written as float32, as ONNX Runtime's CPU kernels and its quantizer want them.
    Past 2 GB, protobuf's limit, they lie in a file of their own beside the graph.

    Raises:
        ValueError: `folder` is no model folder.
    """
    # optimum brings its own logging and imports onnx, diffusers and more at once.
    from optimum.exporters.onnx import onnx_export_from_model

    model = load_model(folder)
    with publishing(target) as partial:
        staging = partial / "everything"
        with _quiet():
            onnx_export_from_model(model, staging, task="text-generation-with-past", do_validation=False)
        for path in staging.glob(f"{ONNX_FILE}*"):
            path.rename(partial / path.name)
        shutil.rmtree(staging)
        copy_settings(folder, partial)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")


@torch.inference_mode()
def deviation(reference: Path, exported: Path, prompts: Sequence[str]) -> float:
    """The largest absolute difference between two models' next-token logits, in float32 on the CPU.

    Args:
        reference: a torch model folder.
        exported: an ONNX model folder.
        prompts: texts; each alone is prefilled, then one token, the reference's choice, is decoded.
    """
    compute = Compute(threads=torch.get_num_threads(), dtype="float32", device="cpu")
    engines: tuple[Any, Any] = TorchEngine(reference, compute), OnnxEngine(exported, compute)
    tokenizer = load_tokenizer(reference)
    largest = 0.0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
        pasts: list[Any] = [None, None]
        for _ in range(2):
            (ours, pasts[0]), (theirs, pasts[1]) = (
                engine(ids, mask, positions, past) for engine, past in zip(engines, pasts, strict=True)
            )
            largest = max(largest, float((ours - theirs).abs().max()))
            ids = ours.argmax(-1)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
    return largest


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces `folder` by rename once the block is through."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def copy_settings(folder: Path, target: Path) -> None:
    """Copy what a model folder holds beside the weights: configuration and tokenizer, bytes as they are."""
    for name in WHITELIST:
        if name != "model.safetensors" and (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns of every branch it can't follow, optimum of every tied weight it is about to merge."""
    logger = logging.getLogger("optimum")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
