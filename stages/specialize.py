"""Run as: python -m stages.specialize. A source and data/prompts/lessons.jsonl -> models/teacher, its curve."""

import os
from pathlib import Path

import pandas as pd

from q2t.config import load
from q2t.determinism import seed_everything
from q2t.records import Problem, read_jsonl, write_json
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.stage import checkpoints, is_main, run
from q2t.teachers.specialist import CURVE, specialize
from q2t.tracking import stage_run


def main() -> None:
    params = load()
    seed_everything(params.seed, params.compute)
    source = Path("models/sources") / params.specialize.source
    curve = Path("reports/curves/specialize.csv")
    with stage_run("specialize") as tracked, checkpoints("specialize") as folder:
        lessons = read_jsonl(Path("data/prompts/lessons.jsonl"), Problem)
        tokenizer = load_tokenizer(source)
        if params.specialize.epochs:
            model, losses = specialize(
                load_model(source),
                tokenizer,
                lessons,
                params.specialize,
                seed=params.seed,
                compute=params.compute,
                checkpoints=folder,
            )
        elif is_main():
            model, losses = load_model(source, dtype="auto"), []
        if is_main():
            curve.parent.mkdir(parents=True, exist_ok=True)
            partial = curve.with_name(curve.name + ".partial")
            pd.DataFrame(losses, columns=CURVE).to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
            os.replace(partial, curve)
            save_model(model, tokenizer, Path("models/teacher"))
            metrics = {"lessons": len(lessons), "final_loss": losses[-1]["loss"]} if losses else {"lessons": 0}
            write_json(Path("reports/metrics/specialize.json"), metrics)
            tracked.metrics(metrics)
            tracked.curve(curve)


if __name__ == "__main__":
    run(main)
