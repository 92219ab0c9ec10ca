"""Run as: python -m stages.evaluate MODEL. One model on test and general_test -> its answers and its metrics."""

import sys
from pathlib import Path

from q2t.config import load
from q2t.deployment import runtime
from q2t.determinism import seed_everything
from q2t.evaluation import forgetting, harness, lenient
from q2t.records import Completion, Problem, read_jsonl, write_json, write_jsonl
from q2t.stage import run
from q2t.tracking import stage_run


def main() -> None:
    name = sys.argv[1]
    params = load()
    folder = Path(params.evaluate.models[name])
    seed_everything(params.seed, params.compute)
    with stage_run(f"evaluate@{name}") as tracked:
        test = read_jsonl(Path("data/prompts/test.jsonl"), Problem)
        general = read_jsonl(Path("data/prompts/general_test.jsonl"), Problem)
        references = read_jsonl(Path("data/generations/reference.jsonl"), Completion)
        model = runtime.load(folder, params.compute)
        system = params.told.get(params.evaluate.models[name], "")
        judged = harness.answer(model, test + general, params.evaluate, system=system)
        metrics = {
            "model": name,
            **harness.score(judged, params.evaluate),
            "held_out": harness.held_out(test, judged[: len(test)]),
            **harness.size(folder),
            "forgetting": {
                "bits_per_byte": forgetting.bits_per_byte(model, general, references),
                "degenerate": harness.degenerate(judged),
            },
        }
        if name in params.evaluate.lenient:
            lessons = read_jsonl(Path("data/prompts/lessons.jsonl"), Problem)
            requests = lenient.requests(model.tokenizer, test, lessons)
            found = harness.answer(model, test, params.evaluate, requests, lenient.judge)
            judged[: len(test)] = [strict.beside(free) for strict, free in zip(judged[: len(test)], found, strict=True)]
            metrics["lenient"] = harness.score(found, params.evaluate)
            metrics["chance"] = lenient.chance(test)
        write_jsonl(Path(f"reports/answers/{name}.jsonl"), judged)
        write_json(Path(f"reports/metrics/evaluate_{name}.json"), metrics)
        tracked.metrics(metrics)


if __name__ == "__main__":
    run(main)
