"""Run as: python -m stages.report. Metrics, answers, curves -> reports/summary.json, index.html and the two cards."""

from pathlib import Path

from ruamel.yaml import YAML

from q2t.config import load
from q2t.report import card, dataset, page, publish, summary
from q2t.stage import run
from q2t.tracking import stage_run

REPORTS, FILTERED = Path("reports"), Path("data/filtered")


def main() -> None:
    params = load()
    yaml = YAML(typ="safe")
    settings = params.evaluate
    with stage_run("report") as tracked:
        figures = summary.build(
            REPORTS,
            settings.models,
            resamples=settings.resamples,
            confidence=settings.confidence,
            seed=params.seed,
        )
        shown = yaml.load(Path("params.yaml"))
        publish(
            REPORTS / "index.html",
            page.render(
                REPORTS,
                FILTERED / "rejected.jsonl",
                shown,
                yaml.load(Path("dvc.lock")),
                Path("requirements.lock"),
            ),
        )
        publish(REPORTS / "MODEL_CARD.md", card.render(REPORTS, shown))
        publish(REPORTS / "DATASET_CARD.md", dataset.render(REPORTS, FILTERED / "examples.jsonl", shown))
        tracked.metrics(figures)
    print(summary.markdown_table(figures))


if __name__ == "__main__":
    run(main)
