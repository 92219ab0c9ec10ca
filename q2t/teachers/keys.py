"""The key of an answer: a hash of all that shapes it."""

from collections.abc import Mapping

from q2t.records import Json, content_id


def completion_key(
    teacher: str,
    model_fingerprint: str,
    template_hash: str,
    sampling: Mapping[str, Json],
    problem_id: str,
    sample: int,
    seed: int,
) -> tuple[str, dict[str, Json]]:
    """`Completion.id` and `Completion.settings` of one answer.

    Args:
        teacher: name in params.yaml's `teachers`.
        model_fingerprint: checksum of local weights, or model and endpoint.
        template_hash: of all that is put around the question: chat template, system prompt, examples.
        sampling: everything else that can change the text: temperature, top_p, max_new_tokens, dtype, ...
        problem_id: itself a hash of the question.
        sample: number of this answer among the answers to the problem, from 0.
        seed: of the run.
    """
    settings: dict[str, Json] = {
        "model": model_fingerprint,
        "template": template_hash,
        "sampling": dict(sampling),
        "seed": seed,
    }
    return content_id(teacher, settings, problem_id, sample), settings
