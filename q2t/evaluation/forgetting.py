"""How much of what is not the target is gone. Reported, never gated: the rest is meant to fade."""

from q2t.deployment.runtime import Runtime
from q2t.records import Completion, Problem


def bits_per_byte(runtime: Runtime, problems: list[Problem], references: list[Completion]) -> float:
    """Bits per UTF-8 byte that the model needs for the base model's own answers to the general test prompts.

    Bytes and not tokens, so that models with different vocabularies compare.

    Raises:
        ValueError: the base model wrote nothing.
    """
    if not any(reference.text for reference in references):
        raise ValueError(
            "teachers.reference: none of its answers has any text, so that forgetting can't be measured: "
            "take a model that answers in its chat template, or raise max_new_tokens"
        )
    questions = {problem.id: problem.question for problem in problems}
    bits = size = 0.0
    for reference in references:
        # An answer that was cut at the limit doesn't say that it ends there.
        prompt, stops = runtime.prompt(questions[reference.problem_id]), reference.finish_reason == "stop"
        bits += runtime.bits(prompt, reference.text, stops=stops)
        size += len(reference.text.encode())
    return bits / size
