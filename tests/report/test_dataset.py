"""The data set's card: front matter that the Hub accepts, and the figures."""

from typing import Any

import pytest
from huggingface_hub import DatasetCard
from report_results import Results

from q2t.records import Example
from q2t.report import dataset


def _card(results: Results) -> DatasetCard:
    return DatasetCard(dataset.render(results.reports, results.examples, results.params))


def test_front_matter_is_read_back(results: Results) -> None:
    data: Any = _card(results).data
    assert data.license == ["apache-2.0", "cc-by-sa-4.0"]
    assert (data.language, data.size_categories, data.task_categories) == (["en"], ["1K<n<10K"], ["text-generation"])
    assert data.tags == sorted(data.tags)
    files = [each["data_files"][0]["path"] for each in data.configs]
    assert files == ["examples.jsonl", "rejected.jsonl"]


def test_body_has_the_figures(results: Results) -> None:
    text = _card(results).text
    assert "2,310 answers to 2 questions" in text
    assert "| `examples.jsonl` | 2,310 |" in text and "| `rejected.jsonl` | 2,190 |" in text
    assert "| mosfet | 800 | 362 |" in text
    assert "| expert | `models/teacher` | 4 | 3 | Apache-2.0 |" in text
    assert "| base | `models/sources/smollm` | 2 | 1 | Apache-2.0 |" in text
    assert "| lessons | 1,200 |" in text and "parts |" not in text and "| unused |" not in text
    assert "KiCad's exception" in text and "CC BY-SA 4.0" in text
    assert "{{" not in text and "None" not in text


def test_columns_are_those_of_the_rows() -> None:
    assert set(dataset.COLUMNS) == set(Example.model_fields)


def test_the_control_claims_no_verified_rows(results: Results) -> None:
    results.params["filter"]["keep_incorrect"] = True
    content = _card(results).content
    assert content.lower().count("verifi") == 1 and "its target rows are not verified" in content


def test_general_rows_are_among_the_verified_ones_so_the_name_claims_nothing(results: Results) -> None:
    made = _card(results)
    assert "# Answers to electronics problems" in made.text and "Verified" not in made.content
    assert dict(made.data.to_dict())["pretty_name"] == "q2t: answers to electronics problems"


@pytest.mark.parametrize(
    ("model", "license"),
    [
        ("models/teacher", "Apache-2.0"),
        ("./models/teacher/", "Apache-2.0"),
        ("models/sources/smollm", "Apache-2.0"),
        ("models/sources/api", "other"),
    ],
)
def test_a_teachers_answers_have_the_licence_of_its_source(results: Results, model: str, license: str) -> None:
    assert dataset.license_of(results.params, model) == license


@pytest.mark.parametrize(
    ("rows", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**5, "100K<n<1M"), (10**6, "1M<n<10M")]
)
def test_size_category(rows: int, name: str) -> None:
    assert dataset.size_category(rows) == name


def test_bytes_repeat(results: Results) -> None:
    assert _card(results).content == _card(results).content
