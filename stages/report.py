"""Run as: python -m stages.report. Metrics, answers and curves -> reports/summary.json, index.html, MODEL_CARD.md."""

from pathlib import Path

from ruamel.yaml import YAML

from q2t.config import load
from q2t.report import card, page, publish, summary
from q2t.stage import run
from q2t.tracking import stage_run

REPORTS = Path("reports")


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
            page.render(REPORTS, Path("data/filtered/rejected.jsonl"), shown, yaml.load(Path("dvc.lock"))),
        )
        publish(REPORTS / "MODEL_CARD.md", card.render(REPORTS, shown))
        tracked.metrics(figures)


if __name__ == "__main__":
    run(main)
