"""A teacher whose weights are on this machine."""

from pathlib import Path

from q2t.config import Compute, Teacher
from q2t.deployment.runtime import Request, load
from q2t.records import Completion, Problem, content_id
from q2t.sources import fingerprint
from q2t.teachers.journal import Journal
from q2t.teachers.keys import completion_key


def answers(
    problems: list[Problem], teacher: Teacher, journal: Journal, *, name: str, seed: int, compute: Compute
) -> list[Completion]:
    """`teacher.samples` answers to every problem, in the problems' order; those in the journal are not asked again.

    Each answer draws from a random stream of its own, seeded by its key. Batches are fixed by the list of
    problems, and each is journalled when it is done.
    """
    folder = Path(teacher.model)
    runtime = load(folder, compute)
    model = fingerprint(folder)
    around = [runtime.tokenizer.chat_template] + [teacher.system] * bool(teacher.system)
    template = content_id(*around)
    sampling = teacher.model_dump(include={"temperature", "top_p", "max_new_tokens", "batch_size"})
    sampling |= compute.model_dump()
    keyed = []
    for problem in problems:
        for sample in range(teacher.samples):
            key, settings = completion_key(name, model, template, sampling, problem.id, sample, seed)
            keyed.append((key, settings, problem, sample))
    requests = [Request(runtime.prompt(problem.question, teacher.system), int(key, 16)) for key, _, problem, _ in keyed]
    batches = runtime.generate(
        requests,
        max_new_tokens=teacher.max_new_tokens,
        temperature=teacher.temperature,
        top_p=teacher.top_p,
        batch_size=teacher.batch_size,
        finished={place for place, (key, *_) in enumerate(keyed) if key in journal.rows},
        describe=f"generate {name}",
    )
    for batch in batches:
        rows = []
        for place, answer in batch:
            key, settings, problem, sample = keyed[place]
            rows.append(
                Completion(
                    id=key,
                    problem_id=problem.id,
                    teacher=name,
                    sample=sample,
                    text=answer.text,
                    finish_reason=answer.finish_reason,
                    prompt_tokens=answer.prompt_tokens,
                    completion_tokens=answer.completion_tokens,
                    settings=settings,
                )
            )
        journal.append(rows)
    return [journal.rows[key] for key, *_ in keyed]
