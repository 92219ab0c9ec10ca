from typing import Any

import pytest

from q2t.teachers.keys import completion_key

ARGUMENTS: dict[str, Any] = {
    "teacher": "expert",
    "model_fingerprint": "weights",
    "template_hash": "chatml",
    "sampling": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 256},
    "problem_id": "p1",
    "sample": 0,
    "seed": 42,
}


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "other"},
        {"model_fingerprint": "other"},
        {"template_hash": "other"},
        {"sampling": {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256}},
        {"sampling": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 256, "dtype": "bfloat16"}},
        {"problem_id": "p2"},
        {"sample": 1},
        {"seed": 43},
    ],
)
def test_all_that_shapes_an_answer_shapes_its_key(change: dict[str, Any]) -> None:
    assert completion_key(**ARGUMENTS)[0] != completion_key(**ARGUMENTS | change)[0]


def test_the_key_stays_over_releases_and_does_not_depend_on_order() -> None:
    """Changing this value asks every user's teacher everything again."""
    key, settings = completion_key(**ARGUMENTS)
    assert key == "6a0130a04057d9c5"
    assert settings == {
        "model": "weights",
        "template": "chatml",
        "sampling": ARGUMENTS["sampling"],
        "seed": 42,
    }
    turned = dict(reversed(ARGUMENTS["sampling"].items()))
    assert completion_key(**ARGUMENTS | {"sampling": turned})[0] == key
