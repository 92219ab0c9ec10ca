"""Run as: python -m stages.distill. models/untrained and the soft labels -> models/student and its curve."""

from pathlib import Path

from q2t.config import load
from q2t.determinism import seed_everything
from q2t.distillation.labels import read
from q2t.distillation.loop import train
from q2t.sources import load_model, load_tokenizer, save_model
from q2t.stage import checkpoints, run
from q2t.tracking import stage_run

UNTRAINED = Path("models/untrained")
CURVE = Path("reports/curves/distill.csv")


def main() -> None:
    params = load()
    seed_everything(params.distill.seed, params.compute)
    with stage_run("distill") as tracked, checkpoints("distill") as folder:
        student = train(
            load_model(UNTRAINED),
            read(Path("data/soft_labels/labels.parquet")),
            params.distill,
            seed=params.distill.seed,
            compute=params.compute,
            checkpoints=folder,
            curve=CURVE,
        )
        save_model(student, load_tokenizer(UNTRAINED), Path("models/student"))
        tracked.curve(CURVE)


if __name__ == "__main__":
    run(main)
