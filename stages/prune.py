"""Run as: python -m stages.prune. models/student and the soft labels -> models/pruned: importance, cut, heal."""

import json
from pathlib import Path

from q2t.compression.width import cut, neuron_importance
from q2t.config import load
from q2t.determinism import seed_everything
from q2t.distillation.batches import calibration
from q2t.distillation.course import learn
from q2t.distillation.labels import read
from q2t.records import Example, read_jsonl
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.stage import checkpoints, is_main, own_device, run
from q2t.tracking import stage_run

STUDENT = Path("models/student")
CURVE = Path("reports/curves/prune.csv")


def main() -> None:
    params = load()
    settings = params.prune
    seed_everything(settings.seed, params.compute)
    with stage_run("prune") as tracked, checkpoints("prune") as folder:
        rows = read(Path("data/soft_labels/labels.parquet"))
        model = load_model(STUDENT)
        # Ids are hashes, so the first rows are a random sample.
        sample = [row for row in rows if row.domain == "target"][: settings.calibration_rows]
        importance = neuron_importance(model.to(own_device(params.compute)), calibration(sample))
        tokenizer = load_tokenizer(STUDENT)
        healed = learn(
            cut(model.cpu(), settings.intermediate, importance),
            tokenizer,
            rows,
            read_jsonl(Path("data/filtered/examples.jsonl"), Example),
            json.loads(Path("models/untrained/vocabulary_map.json").read_text()),
            settings,
            compute=params.compute,
            checkpoints=folder,
            curve=CURVE,
            systems=params.systems,
            told=params.told,
        )
        if is_main():
            save_model(healed, tokenizer, Path("models/pruned"))
            tracked.curve(CURVE)


if __name__ == "__main__":
    run(main)
