"""One harness for every model: same questions, greedy, same token cap; only a teacher may have a system prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from q2t.capability.families import is_held_out, verify
from q2t.config import Evaluate
from q2t.curation.rules import repetition
from q2t.curation.trajectory import Malformed, parse
from q2t.deployment.runtime import Request, Runtime
from q2t.evaluation.retention import accuracy_interval, macro_accuracy
from q2t.records import Json, Problem, Record, Verdict


class Judged(Record):
    """A model's answer to one problem, and what the verifier says of it. General prompts have no verdict."""

    problem_id: str
    family: str
    domain: Literal["target", "general"]
    question: str
    text: str
    finish_reason: Literal["stop", "length"]
    correct: bool | None
    rule: str
    expected: Json
    measured: Json
    unit: str = ""
    """Of `expected` and `measured`; empty where they are no quantities."""
    lenient: dict[str, Json] | None = None
    """text, correct, rule and measured of the answer to the same question after worked examples, judged leniently."""

    def beside(self, free: "Judged") -> "Judged":
        """This answer, with the lenient one to the same question beside it."""
        assert free.problem_id == self.problem_id
        return self.model_copy(update={"lenient": free.model_dump(include={"text", "correct", "rule", "measured"})})


def judge(problem: Problem, text: str, finish_reason: str) -> Verdict:
    """The verdict on a whole answer. A truncated answer is wrong, whatever it says so far."""
    if finish_reason == "length":
        return Verdict(correct=False, rule="truncated")
    try:
        trajectory = parse(text)
    except Malformed as error:
        return Verdict(correct=False, rule=f"malformed: {error.rule}")
    return verify(problem, trajectory.answer)


def answer(
    runtime: Runtime,
    problems: list[Problem],
    settings: Evaluate,
    requests: Sequence[Request] | None = None,
    judge: Callable[[Problem, str, str], Verdict] = judge,
    *,
    system: str = "",
) -> list[Judged]:
    """Greedy answers to all problems, in their order, judged.

    Args:
        requests: one for each problem, if it isn't just the question in the chat template.
        system: what the model has to be told of the answer's format, before each question that a verifier judges.
        judge: the verdict on a problem's answer and its finish reason.
    """
    requests = requests or [
        Request(runtime.prompt(p.question, system if p.domain == "target" else "")) for p in problems
    ]
    judged: dict[int, Judged] = {}
    for batch in runtime.generate(
        requests,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        describe="evaluate",
    ):
        for place, given in batch:
            problem = problems[place]
            verdict = judge(problem, given.text, given.finish_reason) if problem.domain == "target" else None
            judged[place] = Judged(
                problem_id=problem.id,
                family=problem.family,
                domain=problem.domain,
                question=problem.question,
                text=given.text,
                finish_reason=given.finish_reason,
                correct=verdict.correct if verdict else None,
                rule=verdict.rule if verdict else "",
                expected=problem.check.get("expected"),
                measured=verdict.measured if verdict else None,
                unit=str(problem.check.get("unit", "")),
            )
    return [judged[place] for place in range(len(problems))]


def by_family(judged: list[Judged]) -> dict[str, list[bool]]:
    """The verdicts of the target problems, in order."""
    verdicts: dict[str, list[bool]] = {}
    for row in judged:
        if row.correct is not None:
            verdicts.setdefault(row.family, []).append(row.correct)
    return verdicts


def score(judged: list[Judged], settings: Evaluate) -> dict[str, Any]:
    """Accuracy per family and in the macro mean with its interval, and the share of truncated answers."""
    verdicts = by_family(judged)
    target = [row for row in judged if row.correct is not None]
    return {
        "families": {family: {"correct": sum(each), "total": len(each)} for family, each in sorted(verdicts.items())},
        "accuracy": macro_accuracy(verdicts),
        "interval": list(accuracy_interval(verdicts, settings.confidence)),
        "truncated": sum(row.finish_reason == "length" for row in target) / len(target),
    }


def held_out(problems: Sequence[Problem], judged: Sequence[Judged]) -> dict[str, int]:
    """Right answers, and all, to the problems with an operand value that no other split has."""
    verdicts = [bool(row.correct) for problem, row in zip(problems, judged, strict=True) if is_held_out(problem)]
    return {"correct": sum(verdicts), "total": len(verdicts)}


def degenerate(judged: list[Judged]) -> float:
    """Share of the answers to general prompts that are empty or repeat themselves (Gopher's rules)."""
    general = [row.text for row in judged if row.domain == "general"]
    return sum(not text.strip() or repetition(text) is not None for text in general) / len(general)


def size(folder: Path) -> dict[str, int]:
    """Parameters of the torch module that the config describes, tied ones once; embeddings apart; the folder's size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embedding_parameters": sum(ends.values()),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }
