"""Run as: python -m stages.distill. models/untrained and the soft labels -> models/student and its curve."""

import json
from pathlib import Path

from q2t.config import load
from q2t.determinism import seed_everything
from q2t.distillation.course import learn
from q2t.distillation.labels import read
from q2t.records import Example, read_jsonl
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.stage import checkpoints, is_main, run
from q2t.tracking import stage_run

UNTRAINED = Path("models/untrained")
CURVE = Path("reports/curves/distill.csv")


def main() -> None:
    params = load()
    seed_everything(params.distill.seed, params.compute)
    with stage_run("distill") as tracked, checkpoints("distill") as folder:
        tokenizer = load_tokenizer(UNTRAINED)
        student = learn(
            load_model(UNTRAINED),
            tokenizer,
            read(Path("data/soft_labels/labels.parquet")),
            read_jsonl(Path("data/filtered/examples.jsonl"), Example),
            json.loads((UNTRAINED / "vocabulary_map.json").read_text()),
            params.distill,
            compute=params.compute,
            checkpoints=folder,
            curve=CURVE,
            systems=params.systems,
            told=params.told,
        )
        if is_main():
            save_model(student, tokenizer, Path("models/student"))
            tracked.curve(CURVE)


if __name__ == "__main__":
    run(main)
