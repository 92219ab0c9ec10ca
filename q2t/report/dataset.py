"""reports/DATASET_CARD.md: the card that goes with data/filtered to the Hugging Face Hub."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q2t import report
from q2t.report.summary import read_rows

CATALOGUE_LICENSE = "cc-by-sa-4.0"
QUESTIONS_LICENSE = "apache-2.0"
COLUMNS = {
    "id": "hash of the question and of all that shaped the answer",
    "problem_id": "hash of family, operands and question",
    "family": "the problem's family; `general` for chat",
    "domain": "`target` or `general`",
    "teacher": "who answered, by name in `params.yaml`",
    "question": "the user's turn",
    "text": "the assistant's turn; target rows have the form `<think>reasoning</think><answer>answer</answer>`",
    "weight": "of the row in the loss",
}
"""q2t.records.Example, in words."""


def render(reports: Path, examples: Path, params: Mapping[str, Any]) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        reports: the folder with metrics/filter.json and metrics/pose.json.
        examples: data/filtered/examples.jsonl.
        params: params.yaml.
    """
    from huggingface_hub import DatasetCardData

    counts, posed = (_read(reports / "metrics" / f"{stage}.json") for stage in ("filter", "pose"))
    rows = read_rows(examples)
    by_teacher = Counter(row["teacher"] for row in rows)
    teachers = {
        name: {
            "model": params["teachers"][name]["model"],
            "license": license_of(params, params["teachers"][name]["model"]),
            "rows": by_teacher[name],
            "samples": params["teachers"][name]["samples"],
        }
        for name in params["filter"]["teachers"]
    }
    data = DatasetCardData(
        pretty_name="q2t: answers to electronics problems",
        language=["en"],
        license=sorted(
            {CATALOGUE_LICENSE, QUESTIONS_LICENSE, *(teacher["license"].lower() for teacher in teachers.values())}
        ),
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        multilinguality=["monolingual"],
        size_categories=[size_category(counts["kept"])],
        source_datasets=["original"],
        task_categories=["text-generation"],
        tags=sorted(["distillation", "electronics", "q2t", "synthetic"]),
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": "examples.jsonl"}]},
            {"config_name": "rejected", "data_files": [{"split": "train", "path": "rejected.jsonl"}]},
        ],
    )
    return report.template("dataset.md.j2").render(
        front_matter=data.to_yaml(),
        counts=counts,
        questions=len({row["problem_id"] for row in rows}),
        families=sorted(counts["families"].items(), key=lambda item: (item[0] == "general", item[0])),
        posed=posed,
        rejected=sorted(counts["rejected"].items(), key=lambda item: (-item[1], item[0])),
        teachers=teachers,
        columns=COLUMNS,
        params=params,
    )


def license_of(params: Mapping[str, Any], model: str) -> str:
    """The licence of the source behind a teacher's model."""
    return str(source_of(params, model).get("license") or "unknown")


def source_of(params: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The entry of `sources` behind a model's folder; of an endpoint the license "other": its provider's terms hold."""
    folder = str(Path(model))
    name = params["specialize"]["source"] if folder == "models/teacher" else folder.removeprefix("models/sources/")
    source: Mapping[str, Any] = params["sources"].get(name, {"license": "other"})
    return source


def size_category(rows: int) -> str:
    """The Hub's name for a data set of so many rows."""
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((name for bound, name in bounds.items() if rows < bound), "1M<n<10M")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
