"""Our training against TRL's, on one machine: cross-entropy and distillation of one model on one set of rows.

    OMP_NUM_THREADS=2 python benchmarks/training.py

writes benchmarks/results/training.json and the table of docs/distillation.md, in about 12 minutes on 2 cores. It needs
models/sources/smollm2, the student; models/teacher, of the same 49,152 tokens; and data/filtered. Everything measured
runs in a process of its own, so that its peak memory is its own.

Ours distils from stored labels, TRL (GKDTrainer, off-policy, forward KL) from the teacher itself beside the
student, which is the only way it has; `with_labelling` counts one labelling for one epoch to our disfavour. The
weights are float32 and matrix products run in bfloat16 on both sides (--dtype float32 is for a CPU that has no
instructions for it); batch, rows and epochs are the same. The first
epoch warms up, the second is timed; speeds are its tokens, padding not counted, per second. TRL is measured in every
setup of TRL, once; ours and its fastest then take turns, and ratios are those of medians. Memory is compared twice:
both sides with gradient checkpointing, which is the smallest that either has, and both without. Peaks are of the whole
process, the interpreter and its libraries included.

The loss at gemma's vocabulary is measured alone, forward and backward: what its peak adds to the hidden states and
the head. The naive one is the full KL of [tokens, vocabulary] logits, the teacher's among them. The head's gradient is
part of it on both sides; `without_head_gradient` has it taken off both. All ratios are ours over theirs.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from q2t.evaluation.cost import machine
from q2t.readme import fill
from q2t.records import Example, read_jsonl, write_json

STUDENT, TEACHER = Path("models/sources/smollm2"), Path("models/teacher")
EXAMPLES = Path("data/filtered/examples.jsonl")
LABELLED, TOP_K, LABEL_BATCH = 128, 50, 16
BATCH, EPOCHS = 8, 2
TRAINING = {"learning_rate": 5e-5, "weight_decay": 0.0}
WARMUP = 0.06

CHECKPOINTING = "_checkpointing"
# Packing is not among them: it changes what a batch is. GKDTrainer pads by itself and refuses padding_free.
TRL: dict[str, dict[str, Any]] = {
    "trl_ce_padding_free": {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
    "trl_ce_grouped": {"group_by_length": True, "gradient_checkpointing": False},
    "trl_kd_grouped": {"group_by_length": True, "gradient_checkpointing": False},
    "trl_kd_grouped_checkpointing": {"group_by_length": True, "gradient_checkpointing": True},
}
LOSS = {"tokens": 1024, "vocabulary": 262_144, "top_k": 64}
WIDTHS = {"gemma3_270m": 640, "gemma3_4b": 2560}


def resident() -> float:
    """Memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """The most memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_labels(folder: Path, dtype: str) -> dict[str, float]:
    """The teacher's soft labels of a sample of the rows, in its own ids; how fast, and how large the file."""
    from q2t.distillation.labels import label, write
    from q2t.sources import load_model, load_tokenizer

    examples = random.Random(7).sample(read_jsonl(EXAMPLES, Example), LABELLED)
    teacher, tokenizer = load_model(TEACHER, dtype), load_tokenizer(TEACHER)
    ids: dict[str, Any] = {"to_student": None, "student_tokenizer": load_tokenizer(STUDENT)}
    start = time.perf_counter()
    rows = label(teacher, tokenizer, examples, top_k=TOP_K, batch_size=LABEL_BATCH, **ids)
    seconds, path = time.perf_counter() - start, folder / "labels.parquet"
    write(path, rows, top_k=TOP_K, teachers={"teacher": "benchmark"})
    return {
        "tokens_per_second": round(sum(len(row.input_ids) for row in rows) / seconds, 1),
        "bytes_per_token": round(path.stat().st_size / sum(row.completion_tokens for row in rows), 1),
    }


def measure_training(train: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Speed of the second epoch of a training, which has EPOCHS, and the memory of it all."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[tuple[float, float]] = []
    register_optimizer_step_post_hook(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    loaded = resident()
    train()
    assert len(ends) % EPOCHS == 0
    (wall, core), (end_wall, end_core) = ends[len(ends) // EPOCHS - 1], ends[-1]
    return {
        "tokens_per_second": round(tokens / (end_wall - wall), 1),
        "tokens_per_core_second": round(tokens / (end_core - core), 1),
        "loaded_mib": round(loaded),
        "peak_mib": round(peak()),
    }


def train_q2t(
    folder: Path, rows: Sequence[Any], distil: bool, dtype: Any, *, compiled: bool = False, **setup: Any
) -> dict[str, float]:
    from torch import get_num_threads

    from q2t.config import Compute, load
    from q2t.distillation.loop import train
    from q2t.sources import load_model

    shared: dict[str, Any] = TRAINING | {"epochs": EPOCHS, "batch_size": BATCH, "warmup": WARMUP}
    settings = load().distill.model_copy(update=shared | setup | ({} if distil else {"alpha": 0.0}))
    if not distil:
        none = {name: getattr(rows[0], name)[:0] for name in ("top_ids", "top_logprobs", "tail_logprob")}
        rows = [replace(row, **none) for row in rows]
    model = load_model(STUDENT)
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=True)
    compute = Compute(threads=get_num_threads(), dtype=dtype, device="cpu")
    places = {"checkpoints": folder / "checkpoints", "curve": folder / "curve.csv"}
    flops, tokens = needed(model, rows), sum(len(row.input_ids) for row in rows)
    more: dict[str, Any] = {"seed": 7, "compute": compute, "save_every": 10**6, **places}
    measured = measure_training(lambda: train(model, rows, settings, **more), tokens)
    return measured | {"gflops": round(flops * measured["tokens_per_second"] / 1e9, 1)}


def needed(model: Any, rows: Sequence[Any]) -> float:
    """Operations that training needs per token of the rows: forward and twice that backward.

    Two for every weight of a linear layer, those of the head for completion tokens only; and causal attention's two
    products. Padding, and all that is not a matrix product, counts nothing.
    """
    config, embedding = model.config, model.get_input_embeddings().weight
    inner = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape != embedding.shape)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    lengths = [len(row.input_ids) for row in rows]
    completions = sum(row.completion_tokens for row in rows)
    flops = 6 * (inner * sum(lengths) + embedding.numel() * completions) + 3 * attention * sum(n**2 for n in lengths)
    return flops / sum(lengths)


def train_trl(folder: Path, rows: Sequence[Any], distil: bool, dtype: str, setup: dict[str, Any]) -> dict[str, float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from q2t.sources import load_model, load_tokenizer

    student, tokenizer = load_model(STUDENT), load_tokenizer(STUDENT)
    data: dict[str, list[Any]] = {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "completion_mask": [[0] * row.prompt_length + [1] * row.completion_tokens for row in rows],
    }
    plain: dict[str, Any] = {
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    shared = plain | TRAINING | {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH}
    shared |= {"lr_scheduler_type": "linear", "warmup_ratio": WARMUP, "output_dir": str(folder / "trl")} | setup
    if distil:
        data["prompt"] = [""] * len(rows)  # read, but only generation uses it
    inputs: dict[str, Any] = {"train_dataset": Dataset.from_dict(data), "processing_class": tokenizer}
    if distil:
        settings = GKDConfig(lmbda=0.0, beta=0.0, **shared)
        trainer: Any = GKDTrainer(student, load_model(TEACHER, dtype), settings, **inputs)
    else:
        trainer = SFTTrainer(student, SFTConfig(completion_only_loss=True, **shared), **inputs)
    return measure_training(trainer.train, sum(map(len, data["input_ids"])))


def measure_peak(dtype: str, seconds: float = 1.0) -> dict[str, float]:
    """GFLOP/s of products in this type, the student's for a micro-batch and a large one; the best is the peak."""
    import torch
    from torch.utils.benchmark import Timer

    config = json.loads((STUDENT / "config.json").read_text(encoding="utf-8"))
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = [(512, width, width), (512, width, inner), (512, inner, width), (320, width, words), (2048, 2048, 2048)]
    rates = {}
    for m, k, n in shapes:
        kind = getattr(torch, dtype)
        matrices = {"a": torch.randn(m, k, dtype=kind), "b": torch.randn(n, k, dtype=kind)}
        timer = Timer("a @ b.T", globals=matrices, num_threads=torch.get_num_threads())
        rates[f"{m}x{k}x{n}"] = round(2 * m * k * n / timer.blocked_autorange(min_run_time=seconds).median / 1e9, 1)
    return rates | {"peak": max(rates.values())}


def measure_loss(ours: bool, width: int, dtype: str) -> dict[str, float]:
    """Memory that forward and backward of the distillation loss add to its inputs."""
    import torch
    import torch.nn.functional as F

    from q2t.distillation.losses import chunk_size, completion_loss

    torch.manual_seed(7)
    tokens, words, k = LOSS["tokens"], LOSS["vocabulary"], LOSS["top_k"]
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.empty(words, width).normal_(std=0.02).requires_grad_()
    targets = torch.randint(words, (tokens,))
    before = resident()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        if ours:
            top = torch.full((tokens, k), -5.0)
            labels = torch.arange(k).expand(tokens, k), top, torch.log1p(-top.exp().sum(1))
            loss = completion_loss(
                hidden, head, targets, *labels, torch.zeros(tokens), torch.ones(tokens), 1.0, chunk_size(head)
            ).total
        else:
            teacher = torch.randn(tokens, words)
            student = (hidden @ head.T).float()
            loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
            del teacher, student
    loss.backward()
    added = peak() - before
    return {"peak_mib": round(added), "without_head_gradient_mib": round(added - head.numel() * 4 / 2**20)}


def measure(name: str, folder: Path, rows: int, dtype: str) -> dict[str, float]:
    """One measurement, in this process."""
    if name == "labels":
        return make_labels(folder, dtype)
    if name == "matmul":
        return measure_peak(dtype)
    if name.startswith("loss"):
        _, ours, size = name.split("_", 2)
        return measure_loss(ours == "q2t", WIDTHS[size], dtype)
    from q2t.distillation.labels import read

    chosen = read(folder / "labels.parquet")[:rows]
    distil = "_kd" in name
    if name in TRL:
        return train_trl(folder, chosen, distil, dtype, TRL[name])
    return train_q2t(folder, chosen, distil, dtype, gradient_checkpointing=name.endswith(CHECKPOINTING))


def section(results: dict[str, Any]) -> str:
    """What docs/distillation.md says of them."""
    loss = results["loss_memory_vs_naive_262k"]
    head = results["runs"]["loss_q2t_gemma3_4b"][0]
    share = 1 - head["without_head_gradient_mib"] / head["peak_mib"]
    rows = {
        "tokens a second, cross-entropy, against SFTTrainer": results["throughput_vs_trl_ce"],
        "tokens a second, distillation, against GKDTrainer off policy": results["throughput_vs_trl_kd"],
        "the same, one labelling for one epoch counted": results["throughput_vs_trl_kd_with_labelling"],
        "distillation with gradient checkpointing, against its fastest": results["throughput_vs_trl_kd_checkpointing"],
        "peak memory, distillation, both with gradient checkpointing": results["memory_vs_trl_kd"],
        "the same, both without": results["memory_vs_trl_kd_without_checkpointing"],
        "share of the machine's matrix peak": results["share_of_matmul_peak"],
        "memory of the loss, vocabulary 262,144, hidden size 640 (gemma-3-270m)": loss["gemma3_270m"],
        f"the same at 2,560 (gemma-3-4b); the head's gradient is {share:.0%} of it": loss["gemma3_4b"],
    }
    settings = results["settings"]
    said = (
        f"{settings['rows']} rows, batches of {settings['batch_size']}, {settings['cores']} cores, "
        f"{settings['dtype']}; a stored label takes {results['label_bytes_per_token']:.0f} bytes a token at "
        f"k = {settings['top_k']}."
    )
    table = ["| Figure | Ratio |", "|:--|--:|", *(f"| {name} | {value:.2f} |" for name, value in rows.items())]
    return "\n".join([said, "", *table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24, help=f"to train on, a multiple of {BATCH}")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and of TRL's fastest setup")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help="one measurement, in this process")
    given = parser.parse_args()
    assert given.rows % BATCH == 0, "a step of fewer rows would be measured as a whole one"
    if given.only:
        print(json.dumps(measure(given.only[0], Path(given.only[1]), given.rows, given.dtype)))
        return

    runs: dict[str, list[dict[str, float]]] = {}

    def run(*names: str) -> None:
        for name in names:
            # This process imports no torch: what it holds would count in the peaks of those it starts.
            command = [sys.executable, __file__, "--rows", str(given.rows), "--dtype", given.dtype]
            command += ["--only", name, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.setdefault(name, []).append(json.loads(output.splitlines()[-1]))
            print(name, runs[name][-1], file=sys.stderr)

    def median(name: str, what: str = "tokens_per_second") -> float:
        return statistics.median(one[what] for one in runs[name])

    def fastest(kind: str) -> str:
        return max((name for name in TRL if kind in name), key=median)

    def memory_ratio(setup: str) -> float:
        return round(median("q2t_kd" + setup, "peak_mib") / median("trl_kd_grouped" + setup, "peak_mib"), 3)

    def loss_ratios(what: str) -> dict[str, float]:
        ratios = {n: median(f"loss_q2t_{n}", what) / median(f"loss_naive_{n}", what) for n in WIDTHS}
        return {size: round(ratio, 3) for size, ratio in ratios.items()}

    with tempfile.TemporaryDirectory() as folder:
        run("labels", "matmul", "q2t_ce", *(name for name in TRL if "_ce" in name))
        run("q2t_kd", "q2t_kd" + CHECKPOINTING, *(name for name in TRL if "_kd" in name))
        for _ in range(1, given.rounds):
            run("q2t_ce", fastest("_ce"), "q2t_kd", "q2t_kd" + CHECKPOINTING, fastest("_kd"))
        run("matmul", *(f"loss_{whose}_{size}" for size in WIDTHS for whose in ("q2t", "naive")))

    ce, kd = fastest("_ce"), fastest("_kd")
    labelled = 1 / (1 / median("q2t_kd") + 1 / median("labels"))
    figures = {
        "throughput_vs_trl_ce": round(median("q2t_ce") / median(ce), 2),
        "throughput_vs_trl_kd": round(median("q2t_kd") / median(kd), 2),
        "throughput_vs_trl_kd_with_labelling": round(labelled / median(kd), 2),
        "throughput_vs_trl_kd_checkpointing": round(median("q2t_kd" + CHECKPOINTING) / median(kd), 2),
        "memory_vs_trl_kd": memory_ratio(CHECKPOINTING),
        "memory_vs_trl_kd_without_checkpointing": memory_ratio(""),
        "share_of_matmul_peak": round(median("q2t_kd", "gflops") / max(one["peak"] for one in runs["matmul"]), 3),
        "loss_memory_vs_naive_262k": loss_ratios("peak_mib"),
        "loss_memory_vs_naive_262k_without_head_gradient": loss_ratios("without_head_gradient_mib"),
        "label_bytes_per_token": median("labels", "bytes_per_token"),
    }
    settings: dict[str, Any] = {
        "student": STUDENT.name,
        "teacher": TEACHER.name,
        "cores": len(os.sched_getaffinity(0)),
        "dtype": given.dtype,
        "machine": machine(),
    }
    settings |= {"threads": os.environ.get("OMP_NUM_THREADS", "default"), "rows": given.rows, "batch_size": BATCH}
    settings |= {"epochs": EPOCHS, "steps_timed": given.rows // BATCH, "rounds": given.rounds, **TRAINING}
    settings |= {"labelled_rows": LABELLED, "top_k": TOP_K, "loss": LOSS | WIDTHS, "trl_setups": TRL}
    settings |= {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    results = {"settings": settings, **figures, "runs": runs}
    write_json(given.output, results)
    if given.output == parser.get_default("output"):  # the document shows that one
        fill(Path("docs/distillation.md"), "training", section(results))


if __name__ == "__main__":
    main()
