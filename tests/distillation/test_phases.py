"""Which rows, losses and learning rate each step has."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from q2t.config import Online, OnPolicy, Phase, load
from q2t.distillation import batches, phases


def with_phases(settings: Any, *given: dict[str, Any], **changes: Any) -> Any:
    return settings.model_copy(update={"phases": [Phase(**phase) for phase in given], **changes})


def plan(rows: Any, settings: Any) -> list[phases.Step]:
    return list(phases.plan(rows, settings, seed=3))


def places(step: phases.Step) -> list[list[int]]:
    return [[int(row.id[1:]) for row in micro] for micro in step.micro_batches]


def indices(steps: list[phases.Step]) -> list[int]:
    return [i for step in steps for micro in places(step) for i in micro]


def test_without_phases_a_run_is_the_section_alone(rows: Any, settings: Any) -> None:
    chosen = rows(11)
    steps = plan(chosen, settings)
    lengths = [len(row.input_ids) for row in chosen]
    expected = [step for epoch in range(2) for step in batches.plan(lengths, 4, 4, seed=3, epoch=epoch)]
    assert [places(step) for step in steps] == expected
    assert all(step.phase == 1 and step.settings == settings for step in steps)
    assert [step.learning_rate for step in steps] == [0.01 * phases.schedule(i, 6, 0.2) for i in range(6)]


def test_a_phase_names_what_differs(rows: Any, settings: Any) -> None:
    """And its learning rate goes from warm-up to decay within it; no two epochs have one order."""
    given = with_phases(settings, {}, {"epochs": 1, "alpha": 0.0, "learning_rate": 0.5, "divergence": "jsd"})
    first, second = given.in_phases()
    assert first.model_dump() == given.model_dump()
    changed = {key for key, value in second.model_dump().items() if value != given.model_dump()[key]}
    assert changed == {"epochs", "alpha", "learning_rate", "divergence"}
    steps = plan(rows(11), given)
    assert [(step.phase, step.place) for step in steps] == [*((1, i) for i in range(6)), *((2, i) for i in range(3))]
    assert [step.learning_rate for step in steps[6:]] == [0.5 * phases.schedule(i, 3, 0.2) for i in range(3)]
    epochs = [indices(steps[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_domains_and_share_choose_the_rows(rows: Any, settings: Any) -> None:
    chosen = rows(40)
    for row in chosen[::4]:
        object.__setattr__(row, "domain", "general")
    general = phases.select(chosen, settings.model_copy(update={"domains": ["general"]}), 3)
    assert general == list(range(0, 40, 4))
    shares = [phases.select(chosen, settings.model_copy(update={"share": share}), 3) for share in (0.01, 0.25, 0.5, 1)]
    assert [len(share) for share in shares] == [1, 10, 20, 40]
    assert all(set(small) < set(large) for small, large in zip(shares, shares[1:], strict=False))
    assert shares[1] != phases.select(chosen, settings.model_copy(update={"share": 0.25}), 4)
    steps = plan(chosen, with_phases(settings, {"share": 0.25}, {"domains": ["general"]}))
    for phase, expected in ((1, shares[1]), (2, general)):
        assert sorted(set(indices([step for step in steps if step.phase == phase]))) == expected


def test_a_phase_on_policy_asks_as_it_begins_and_learns_from_labels_alone(rows: Any, settings: Any) -> None:
    """Its domains and share choose the questions, and of the answers all are learnt from."""
    on_policy = OnPolicy(teacher="t", max_new_tokens=9, batch_size=2, top_k=4)
    given = with_phases(settings, {"epochs": 1}, {"share": 0.5, "on_policy": on_policy})
    chosen, asked = rows(20), []

    def answers(phase: Any, number: int, of_phase: Any) -> Any:
        asked.append((phase.on_policy, number, [row.id for row in of_phase]))
        return rows(30, seed=1)[20:]

    steps = phases.plan(chosen, given, seed=3, answers=answers)
    first = [next(steps) for _ in range(5)]
    assert not asked and {step.phase for step in first} == {1}
    second = list(steps)
    assert asked == [(on_policy, 2, [chosen[i].id for i in phases.select(chosen, second[0].settings, 3)])]
    assert sorted(indices(second)) == sorted([*range(20, 30)] * 2)
    assert {tuple(step.settings.teacher_only) for step in second} == {("target", "general")}
    assert not first[0].settings.teacher_only and first[0].settings.on_policy is None


def test_all_tokens_of_a_run_are_counted(rows: Any, settings: Any) -> None:
    given = with_phases(settings, {"share": 0.25}, {"epochs": 1})
    steps = plan(rows(11), given)
    found = sum(len(row.input_ids) for step in steps for micro in step.micro_batches for row in micro)
    assert phases.tokens(rows(11), given, seed=3) == found


def test_a_phase_can_leave_the_online_teacher_out(settings: Any) -> None:
    online = Online(teacher="t", hidden=[[1, 1]])
    given = with_phases(settings, {}, {"online": False}, online=online)
    assert [phase.online for phase in given.in_phases()] == [online, None]


def test_a_phase_without_rows_is_refused(rows: Any, settings: Any) -> None:
    with pytest.raises(ValueError, match=r"domains is \['general'\], and no training row"):
        phases.plan(rows(4), with_phases(settings, {}, {"domains": ["general"]}), seed=3)


def test_a_wrong_key_of_a_phase_is_explained(tmp_path: Path) -> None:
    yaml = YAML()
    params = yaml.load(Path("params.yaml"))
    params["distill"]["phases"] = [{"epochs": 1}, {"alfa": 0.5}]
    yaml.dump(params, tmp_path / "params.yaml")
    with pytest.raises(ValueError, match=r"unknown key 'alfa' in distill.phases.1: did you mean 'alpha'"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedule_rises_to_one_and_ends(shape: Any) -> None:
    factors = [phases.schedule(step, 100, 0.1, shape) for step in range(100)]
    assert factors[10] == 1.0 == max(factors)
    assert np.allclose(factors[:10], np.arange(1, 11) / 11)
    last = {"linear": 1 / 90, "cosine": (1 - math.cos(math.pi / 90)) / 2, "constant": 1.0}[shape]
    assert factors[-1] == pytest.approx(last)
    halfway = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[shape]
    assert factors[55] == pytest.approx(halfway)
    assert phases.schedule(0, 5, 0.0, shape) == 1.0


def test_linear_is_the_default_and_straight() -> None:
    factors = [phases.schedule(step, 100, 0.1) for step in range(100)]
    assert np.allclose(np.diff(factors, 2)[[*range(8), *range(12, 98)]], 0)
