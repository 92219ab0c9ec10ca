"""What a stage knows of its last run."""

from copy import deepcopy

import pytest

from q2t import stage

ENTRY = {
    "deps": [
        {"path": "stages/generate.py", "md5": "a"},
        {"path": "data/prompts/questions.jsonl", "md5": "b"},
        {"path": "models/gpt", "md5": "c.dir"},
    ],
    "params": {
        "params.yaml": {"seed": 7, "teachers.expert": {"model": "models/gpt/", "temperature": 0.7, "batch_size": 8}}
    },
}


@pytest.mark.parametrize(
    ("place", "value", "asked_anew"),
    [
        (("deps", 0, "md5"), "z", False),
        (("deps", 2, "md5"), "z.dir", False),  # the variable that holds the key has another name
        (("params", "params.yaml", "teachers.expert", "batch_size"), 9, False),
        (("params", "params.yaml", "teachers.expert", "temperature"), 0.8, True),
        (("params", "params.yaml", "teachers.expert", "model"), "models/other", True),
        (("params", "params.yaml", "seed"), 8, True),
        (("deps", 1, "md5"), "z", True),
    ],
)
def test_what_a_servers_answers_hang_on(place, value, asked_anew):
    changed = deepcopy(ENTRY)
    *path, last = place
    at = changed
    for key in path:
        at = at[key]
    at[last] = value
    assert (stage._asked(changed) != stage._asked(ENTRY)) is asked_anew
