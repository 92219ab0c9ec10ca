"""Run as: python -m stages.filter. All generations -> data/filtered: what is learnt, and what is not and why."""

from pathlib import Path

from q2t import quality
from q2t.capability.families import verify
from q2t.config import load
from q2t.curation.curate import curate
from q2t.records import Completion, Problem, read_jsonl, write_json, write_jsonl
from q2t.stage import run
from q2t.tracking import stage_run

PROMPTS = Path("data/prompts")


def main() -> None:
    params = load()
    settings = params.filter
    with stage_run("filter") as tracked:
        curated = curate(
            [
                row
                for name in settings.teachers
                for row in read_jsonl(Path(f"data/generations/{name}.jsonl"), Completion)
            ],
            [
                problem
                for split in ("lessons", "questions", "general")
                for problem in read_jsonl(PROMPTS / f"{split}.jsonl", Problem)
            ],
            settings,
            verify,
            params.seed,
            held_out=[
                problem
                for split in ("dev", "test", "general_test")
                for problem in read_jsonl(PROMPTS / f"{split}.jsonl", Problem)
            ],
        )
        quality.validate(
            "examples",
            quality.example_frame(curated.examples),
            quality.examples(params.capability.families, settings.target_share),
        )
        write_jsonl(Path("data/filtered/examples.jsonl"), curated.examples)
        write_jsonl(Path("data/filtered/rejected.jsonl"), curated.rejected)
        write_json(Path("reports/metrics/filter.json"), curated.counts)
        tracked.metrics(curated.counts)


if __name__ == "__main__":
    run(main)
