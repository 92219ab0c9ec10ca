"""Run as: python -m stages.pose. The catalogue and the families -> data/prompts, one file for each split."""

from pathlib import Path

from q2t import quality
from q2t.capability import general
from q2t.capability.electronics import catalog
from q2t.capability.families import make_families
from q2t.capability.posing import pose
from q2t.config import load
from q2t.records import operands, write_json, write_jsonl
from q2t.stage import run
from q2t.tracking import stage_run


def main() -> None:
    params = load()
    settings = params.capability
    with stage_run("pose") as tracked:
        parts, dropped = catalog.read_all(Path("data/catalog"))
        splits = pose(make_families(settings.families, parts), settings, params.seed)
        everyday = general.problems(settings.general, settings.general_test)
        for split in ("general", "general_test"):
            splits[split] = [problem for problem in everyday if problem.split == split]
        rows = [problem for split in splits.values() for problem in split]
        quality.validate("prompts", quality.problem_frame(rows, operands), quality.problems(settings.families))
        for split, problems in splits.items():
            write_jsonl(Path(f"data/prompts/{split}.jsonl"), problems)
        counts: dict[str, int] = {split: len(problems) for split, problems in splits.items()}
        metrics = counts | {"parts": len(parts), "parts_without_rating": len(dropped)}
        write_json(Path("reports/metrics/pose.json"), metrics)
        tracked.metrics(metrics)


if __name__ == "__main__":
    run(main)
