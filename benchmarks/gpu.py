"""Training on a GPU: ours against TRL's on a model of SmolLM2-135M's shape, ours on one of gemma-3-4b's, and the loss
alone at gemma's vocabulary.

    python benchmarks/gpu.py

writes benchmarks/results/gpu.json and its table of docs/distillation.md, in some four minutes on one H100. Weights and
rows are random: they take as long as any others, and nothing has to be fetched. Everything measured runs in a process
of its own. The weights are float32 and matrix products run in bfloat16, ours by torch's deterministic kernels as in a
stage, TRL's by the default ones. Ours distils from stored labels, TRL (GKDTrainer, off-policy, forward KL) from a
teacher of the student's shape beside it. The first epoch warms up, the others are timed; speeds are tokens, padding not
counted, per second. Memory is the most that torch had allocated on the device. TRL is measured in each of its setups,
ratios are to the fastest or the smallest.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training import TRL, WIDTHS, needed

from q2t.config import Compute
from q2t.readme import fill
from q2t.records import write_json

COMPUTE = Compute(threads=4, dtype="bfloat16", device="cuda")
EPOCHS, TOP_K = 3, 50
LOSSES = tuple(f"loss_{whose}_{size}" for size in WIDTHS for whose in ("q2t", "naive"))
OURS = ("q2t_ce_smollm2", "q2t_kd_smollm2", "q2t_kd_gemma3_4b")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "gemma3_4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
}
ROWS: dict[str, dict[str, Any]] = {
    # As many tokens as the electronics task's questions and answers have.
    "smollm2": {"rows": 512, "batch_size": 64, "prompt": (60, 120), "completion": (40, 160)},
    "gemma3_4b": {"rows": 32, "batch_size": 16, "prompt": (100, 200), "completion": (300, 1024)},
}
LOSS = {"tokens": 4096, "vocabulary": 262_144}


def make_rows(shape: str) -> list[Any]:
    """Random rows with labels of TOP_K tokens."""
    import numpy as np

    from q2t.distillation.rows import Row

    rng, words, sizes = np.random.default_rng(7), SHAPES[shape]["vocab_size"], ROWS[shape]
    logprobs = np.log(0.5) * (np.arange(TOP_K) / 5 + 1)
    logprobs -= np.log(np.exp(logprobs).sum() / 0.99)
    rows = []
    for i in range(sizes["rows"]):
        prompt, completion = (int(rng.integers(*sizes[part])) for part in ("prompt", "completion"))
        ids = rng.integers(3, words, prompt + completion).astype(np.int32)
        best = (ids[prompt:, None].astype(np.int64) + 997 * np.arange(TOP_K)) % words
        labels = {
            "top_ids": best.astype(np.int32),
            "top_logprobs": np.tile(logprobs, (completion, 1)).astype(np.float16),
            "tail_logprob": np.full(completion, np.log(0.01), np.float32),
        }
        rows.append(Row(f"r{i}", "target", "random", 1.0, ids, prompt, **labels))
    return rows


def make_model(shape: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def measure_training(train: Callable[[], Any], rows: Sequence[Any]) -> dict[str, float]:
    """Speed of all epochs but the first, and the memory of it all."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []

    def note(*_: Any) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    train()
    seconds = ends[-1] - ends[len(ends) // EPOCHS - 1]
    tokens = (EPOCHS - 1) * sum(len(row.input_ids) for row in rows)
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"tokens_per_second": round(tokens / seconds), "peak_mib": round(peak), "seconds": round(seconds, 2)}


def train_q2t(shape: str, distil: bool, folder: Path) -> dict[str, float]:
    from q2t.config import load
    from q2t.determinism import seed_everything
    from q2t.distillation.loop import train

    seed_everything(7, COMPUTE)
    shared = {"epochs": EPOCHS, "batch_size": ROWS[shape]["batch_size"], "learning_rate": 1e-5}
    shared |= {"gradient_checkpointing": shape != "smollm2"}
    settings = load().distill.model_copy(update=shared | ({} if distil else {"alpha": 0.0}))
    rows = make_rows(shape)
    if not distil:
        none = {name: getattr(rows[0], name)[:0] for name in ("top_ids", "top_logprobs", "tail_logprob")}
        rows = [replace(row, **none) for row in rows]
    model = make_model(shape)
    flops = needed(model, rows)
    more: dict[str, Any] = {"seed": 7, "compute": COMPUTE, "save_every": 10**6}
    places: dict[str, Any] = {"checkpoints": folder / "checkpoints", "curve": folder / "curve.csv"}
    measured = measure_training(lambda: train(model, rows, settings, **more, **places), rows)
    return measured | {"tflops": round(flops * measured["tokens_per_second"] / 1e12, 1)}


def train_trl(distil: bool, setup: dict[str, Any], folder: Path) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = make_rows("smollm2")
    words = {f"w{i}": i for i in range(SHAPES["smollm2"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w2"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    data: dict[str, list[Any]] = {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "completion_mask": [[0] * row.prompt_length + [1] * row.completion_tokens for row in rows],
    }
    shared: dict[str, Any] = {"bf16": True, "report_to": "none", "save_strategy": "no", "output_dir": str(folder)}
    shared |= {"num_train_epochs": EPOCHS, "per_device_train_batch_size": ROWS["smollm2"]["batch_size"]}
    shared |= {"learning_rate": 1e-5, "weight_decay": 0.0, "optim": "adamw_torch_fused"} | setup
    if distil:
        data["prompt"] = [""] * len(rows)  # read, but only generation uses it
    inputs: dict[str, Any] = {"train_dataset": Dataset.from_dict(data), "processing_class": tokenizer}
    if distil:
        teacher = make_model("smollm2").to(torch.bfloat16)
        settings = GKDConfig(lmbda=0.0, beta=0.0, **shared)
        trainer: Any = GKDTrainer(make_model("smollm2"), teacher, settings, **inputs)
    else:
        trainer = SFTTrainer(make_model("smollm2"), SFTConfig(completion_only_loss=True, **shared), **inputs)
    return measure_training(trainer.train, rows)


def measure_peak() -> dict[str, Any]:
    """TFLOP/s of large products in bfloat16, the card's peak for what follows."""
    import torch
    from triton.testing import do_bench

    rates = {}
    for m, k, n in ((8192, 8192, 8192), (8192, 2560, 10_240), (8192, 576, 1536)):
        a, b = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        rates[f"{m}x{k}x{n}"] = round(2 * m * k * n / do_bench(lambda a=a, b=b: a @ b.T, return_mode="median") / 1e9)
    return rates | {"peak": max(rates.values()), "device": torch.cuda.get_device_name()}


def measure_loss(ours: bool, width: int) -> dict[str, float]:
    """Time of forward and backward of the distillation loss, and the memory that they add to its inputs; the naive
    one's teacher logits are counted, and made before."""
    import torch
    import torch.nn.functional as F

    from q2t.determinism import seed_everything
    from q2t.distillation.losses import chunk_size, completion_loss

    seed_everything(7, COMPUTE)
    tokens, words, cuda = LOSS["tokens"], LOSS["vocabulary"], torch.device("cuda")
    hidden = torch.randn(tokens, width, device=cuda, requires_grad=True)
    head = torch.empty(words, width, device=cuda).normal_(std=0.02).requires_grad_()
    targets = torch.randint(words, (tokens,), device=cuda)
    top = torch.full((tokens, TOP_K), -5.0, device=cuda)
    ids = torch.arange(TOP_K, device=cuda).expand(tokens, TOP_K)
    labels = ids, top, torch.log1p(-top.exp().sum(1))
    weights = torch.zeros(tokens, device=cuda), torch.ones(tokens, device=cuda)
    teacher = None if ours else torch.randn(tokens, words, device=cuda)

    def once() -> None:
        hidden.grad = head.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            if ours:
                loss = completion_loss(hidden, head, targets, *labels, *weights, 1.0, chunk_size(head)).total
            else:
                student = (hidden @ head.T).float()
                loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
                del student
        loss.backward()

    once()
    hidden.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - (0 if teacher is None else 4 * teacher.numel())
    start = time.perf_counter()
    for _ in range(5):
        once()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 5
    return {
        "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20),
        "head_gradient_mib": round(head.numel() * 4 / 2**20),
        "milliseconds": round(seconds * 1000, 1),
    }


def measure(name: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    if name == "matmul":
        return measure_peak()
    if name.startswith("loss"):
        _, whose, size = name.split("_", 2)
        return measure_loss(whose == "q2t", WIDTHS[size])
    with tempfile.TemporaryDirectory() as folder:
        if name in TRL:
            return train_trl("_kd" in name, TRL[name], Path(folder))
        _, kind, shape = name.split("_", 2)
        return train_q2t(shape, kind == "kd", Path(folder))


def in_a_process(name: str) -> dict[str, Any]:
    """Forked from one that has imported all and not touched the device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(measure, name).result()
        except Exception as error:
            if name not in TRL:
                raise
            traceback.print_exc()
            return {"failed": type(error).__name__}


def figures(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over theirs. A setup of TRL's that failed has no figures."""

    def best(kind: str, what: str, choose: Callable[..., float]) -> float:
        return choose(run[what] for name, run in runs.items() if name in TRL and kind in name and what in run)

    found: dict[str, Any] = {}
    for kind in ("ce", "kd"):
        ours = runs[f"q2t_{kind}_smollm2"]
        found[f"throughput_vs_trl_{kind}"] = round(
            ours["tokens_per_second"] / best(f"_{kind}", "tokens_per_second", max), 2
        )
        found[f"memory_vs_trl_{kind}"] = round(ours["peak_mib"] / best(f"_{kind}", "peak_mib", min), 3)
    for shape in SHAPES:
        found[f"share_of_peak_{shape}"] = round(runs[f"q2t_kd_{shape}"]["tflops"] / runs["matmul"]["peak"], 3)
    for size in WIDTHS:
        ours, naive = (runs[f"loss_{whose}_{size}"] for whose in ("q2t", "naive"))
        for what, unit in (("memory", "peak_mib"), ("time", "milliseconds")):
            found[f"loss_{what}_vs_naive_262k_{size}"] = round(ours[unit] / naive[unit], 3)
    return found


def section(results: dict[str, Any]) -> str:
    """What docs/distillation.md says of them."""
    runs = results["runs"]
    rows = {
        "SmolLM2-135M, cross-entropy: tokens a second": f"{runs['q2t_ce_smollm2']['tokens_per_second']:,}",
        "against SFTTrainer's fastest setup": f"{results['throughput_vs_trl_ce']:.2f}",
        "SmolLM2-135M, distillation: tokens a second": f"{runs['q2t_kd_smollm2']['tokens_per_second']:,}",
        "against GKDTrainer's fastest setup, off policy": f"{results['throughput_vs_trl_kd']:.2f}",
        "memory, cross-entropy against SFTTrainer's smallest": f"{results['memory_vs_trl_ce']:.2f}",
        "memory, distillation against GKDTrainer's smallest": f"{results['memory_vs_trl_kd']:.2f}",
        "share of the card's matrix peak": f"{results['share_of_peak_smollm2']:.1%}",
        "gemma-3-4b's shape, distillation: tokens a second": f"{runs['q2t_kd_gemma3_4b']['tokens_per_second']:,}",
        "share of the card's matrix peak, recomputed activations not counted": (
            f"{results['share_of_peak_gemma3_4b']:.1%}"
        ),
        "its memory": f"{runs['q2t_kd_gemma3_4b']['peak_mib'] / 1024:.0f} GiB",
    }
    for size, width in WIDTHS.items():
        memory, seconds = (results[f"loss_{what}_vs_naive_262k_{size}"] for what in ("memory", "time"))
        what = f"the loss of {LOSS['tokens']:,} tokens, vocabulary 262,144, width {width:,}, against the naive"
        rows[f"{what}: memory, time"] = f"{memory:.2f}, {seconds:.2f}"
    said = f"{runs['matmul']['device']}, bfloat16, {runs['matmul']['peak']} TFLOP/s at best, one run each."
    return "\n".join(
        [said, "", "| Figure | |", "|:--|--:|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    given = parser.parse_args()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # or counting devices starts CUDA, and no fork can use it
    import torch  # noqa: F401
    import trl.experimental.gkd  # noqa: F401

    import q2t.distillation.loop  # noqa: F401

    runs: dict[str, dict[str, Any]] = {}
    for name in ("matmul", *OURS, *LOSSES, *TRL):
        runs[name] = in_a_process(name)
        print(name, runs[name], file=sys.stderr, flush=True)
    settings = {"epochs": EPOCHS, "top_k": TOP_K, "rows": ROWS, "shapes": SHAPES, "loss": LOSS | WIDTHS}
    settings |= {"trl_setups": TRL} | {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    results = {"settings": settings, **figures(runs), "runs": runs}
    write_json(given.output, results)
    if given.output == parser.get_default("output"):  # the document shows that one
        fill(Path("docs/distillation.md"), "gpu", section(results))


if __name__ == "__main__":
    main()
