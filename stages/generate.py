"""Run as: python -m stages.generate TEACHER. Prompts and one teacher -> data/generations/TEACHER.jsonl.

Answers are journalled outside the out, which DVC deletes before every run. What a server answered before is taken over
from the out that dvc.lock names, so that a clone without the journal asks nothing again: none is paid for twice.
"""

import sys
from pathlib import Path

from q2t import quality
from q2t.config import load
from q2t.determinism import seed_everything
from q2t.records import Problem, read_jsonl, write_json, write_jsonl
from q2t.sources import POINTER
from q2t.stage import checkpoints, published, root, run
from q2t.teachers import local, openai, worked
from q2t.teachers.journal import Journal
from q2t.tracking import stage_run


def main() -> None:
    name = sys.argv[1]
    params = load()
    teacher = params.teachers[name]
    seed_everything(params.seed, params.compute)
    out, folder = Path(f"data/generations/{name}.jsonl"), Path(teacher.model)
    with stage_run(f"generate@{name}") as tracked, checkpoints(f"generate@{name}") as work:
        problems = read_jsonl(Path(f"data/prompts/{teacher.prompts}.jsonl"), Problem)
        if teacher.prompts == "lessons":
            rows = worked.answers(problems, teacher, name=name)
        elif (folder / POINTER).exists():
            # A server's answers cost money and never come twice the same: its journal outlives the run.
            journal = Journal(root() / f".q2t/generate/{name}.jsonl")
            pointer = openai.load_pointer(folder)
            lacks = openai.lacks(problems, teacher, pointer, journal, name=name, seed=params.seed)
            if before := published(str(out), needed=lacks):
                journal.seed(before)
            rows = openai.answers(problems, teacher, pointer, journal, name=name, seed=params.seed)
        else:
            # A model's answers come again to the bit, but only by the same code in the same batches: this run's alone.
            journal = Journal(work / "answers.jsonl")
            rows = local.answers(problems, teacher, journal, name=name, seed=params.seed, compute=params.compute)
        quality.validate(f"generations_{name}", quality.completion_frame(rows), quality.completions())
        write_jsonl(out, rows)
        metrics = {
            "prompts": len(problems),
            "answers": len(rows),
            "truncated": sum(row.finish_reason == "length" for row in rows) / len(rows),
            "completion_tokens": sum(row.completion_tokens for row in rows),
        }
        write_json(Path(f"reports/metrics/generate_{name}.json"), metrics)
        tracked.metrics(metrics)


if __name__ == "__main__":
    run(main)
