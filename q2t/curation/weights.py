"""What a training row counts in the loss: by domain, by teacher, and by how hard its problem is."""

import math
from collections.abc import Mapping, Sequence

from q2t.config import Weights
from q2t.records import Example


def weigh(examples: Sequence[Example], verified: Mapping[str, float], settings: Weights) -> list[Example]:
    """The rows with their weights, of mean 1, so that only what rows count against each other changes.

    Args:
        verified: problem id to the share of its answers that are right, in (0, 1]. A target row counts in proportion to
            this share to the power of -difficulty. With 1, problems count alike, however many of their answers were
            kept (rows of hard problems count more: DART-Math, arXiv 2407.13690, draws more of them instead); with -1,
            a row counts as the share says, which is then a soft label of its problem.
    """
    raw = [
        settings.domain[row.domain]
        * settings.teacher.get(row.teacher, 1.0)
        * (verified[row.problem_id] ** -settings.difficulty if row.domain == "target" else 1.0)
        for row in examples
    ]
    mean = math.fsum(raw) / len(raw)
    return [row.model_copy(update={"weight": value / mean}) for row, value in zip(examples, raw, strict=True)]
