"""What each method of distillation does on the smoke profile's model: `python benchmarks/methods.py DIR`.

DIR is a copy of the repository in which `q2t profile smoke && dvc repro prune` ran. Every method starts from the same
untrained student and sees the same rows. For each, benchmarks/results/methods.json has its own loss over the first
and the last steps, and KL(teacher || student) at temperature 1 over all labelled tokens, before and after: of the
teacher's best tokens and the mass of all others. The table is in docs/distillation.md.
"""

import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from q2t.config import Adapter, Distill, Online, OnPolicy, Phase, load
from q2t.determinism import seed_everything
from q2t.distillation import batches, losses
from q2t.distillation.course import learn
from q2t.distillation.labels import read
from q2t.distillation.rows import Row
from q2t.readme import fill
from q2t.records import Example, read_jsonl, write_json
from q2t.sources import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/methods.json"
EPOCHS = 4
ENDS = 5
"""Steps at either end of a run, or of its last phase, that its loss is the mean of."""
TEACHER = "models/teacher"
PAIRS = [[1, 1], [2, 2], [3, 4]]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN = OnPolicy(teacher=TEACHER, max_new_tokens=96, batch_size=64, top_k=8)
METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"alpha": 0.0},
    "forward KL": {"alpha": 1.0},
    "reverse KL": {"alpha": 1.0, "divergence": "reverse_kl"},
    "Jensen-Shannon": {"alpha": 1.0, "divergence": "jsd"},
    "cross-entropy and forward KL": {},
    "balanced": {"balance": True},
    "curriculum, hard rows first": {"curriculum": 1.0},
    "curriculum, easy rows first": {"curriculum": -1.0},
    "answer over reasoning": {"reasoning": 0.1},
    "the teacher alone": {"teacher_only": ["target"]},
    "the whole distribution": {"alpha": 1.0, "online": Online(teacher=TEACHER, logits=True)},
    "hidden states, cosine": {"online": Online(teacher=TEACHER, hidden=PAIRS)},
    "hidden states, MSE": {"online": Online(teacher=TEACHER, hidden=PAIRS, distance="mse")},
    "attention maps": {"online": Online(teacher=TEACHER, attention=PAIRS)},
    "spans, matched": {"alpha": 0.0, "online": Online(teacher=TEACHER, spans="matched")},
    "spans, ULD": {"alpha": 0.0, "online": Online(teacher=TEACHER, spans="uld")},
    "own answers in a last phase": {"phases": [Phase(epochs=2), Phase(epochs=2, learning_rate=5e-4, on_policy=OWN)]},
    "LoRA": {"adapter": Adapter(kind="lora", modules=MODULES), "learning_rate": 0.01},
    "IA3": {"adapter": Adapter(kind="ia3", modules=["k_proj", "v_proj", "down_proj"]), "learning_rate": 0.03},
    "embeddings frozen": {"freeze": ["model.embed_tokens.*"]},
    "sparse neurons": {"sparsity": 1e-4},
}


@torch.no_grad()
def kl(model: Any, rows: list[Row]) -> float:
    """Nats per labelled token."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 64):
        batch = batches.collate(rows[start : start + 64])
        logits = batches.predicting_states(model, batch) @ model.get_output_embeddings().weight.T
        total += float(losses.distillation(logits, batch.top_ids, batch.top_logprobs, batch.tail_logprob, 1.0).sum())
        tokens += len(batch.targets)
    return total / tokens


def measure(
    changes: dict[str, Any], settings: Distill, rows: list[Row], compute: Any, folder: Path
) -> dict[str, float]:
    untrained = Path("models/untrained")
    seed_everything(settings.seed, compute)
    model = load_model(untrained)
    before = kl(model, rows)
    trained = learn(
        model,
        load_tokenizer(untrained),
        rows,
        read_jsonl(Path("data/filtered/examples.jsonl"), Example),
        json.loads((untrained / "vocabulary_map.json").read_text()),
        settings.model_copy(update={"epochs": EPOCHS} | changes),
        compute=compute,
        checkpoints=folder / "checkpoints",
        curve=folder / "curve.csv",
    )
    with open(folder / "curve.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    last = lines[-1].get("phase")
    steps = [float(line["loss"]) for line in lines if line.get("phase") == last]
    found = {"loss_first": fmean(steps[:ENDS]), "loss_last": fmean(steps[-ENDS:])}
    found |= {"kl_before": before, "kl_after": kl(trained, rows)}
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| Method | Its own loss | KL to the teacher |", "|:--|--:|--:|"]
    for name, row in ((name, results[name]) for name in METHODS if name in results):
        own = f"{row['loss_first']:.3g} → {row['loss_last']:.3g}"
        lines.append(f"| {name} | {own} | {row['kl_before']:.3g} → {row['kl_after']:.3g} |")
    return "\n".join(lines)


def main() -> None:
    os.chdir(sys.argv[1])
    params = load()
    rows = read(Path("data/soft_labels/labels.parquet"))
    results = {}
    for name, changes in METHODS.items():
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(changes, params.distill, rows, params.compute, Path(folder))
        print(name, results[name])
    write_json(RESULTS, results)
    fill(ROOT / "docs/distillation.md", "smoke", table(results))


if __name__ == "__main__":
    main()
