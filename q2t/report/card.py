"""reports/MODEL_CARD.md: the card that goes with the published model to the Hugging Face Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q2t import report
from q2t.report.dataset import source_of
from q2t.report.summary import TEACHER, chance, load, markdown_table, measured

TAGS = sorted(["distillation", "electronics", "onnx", "pruning", "q2t", "text-generation"])


def render(reports: Path, params: Mapping[str, Any]) -> str:
    """The card as Markdown with the Hub's front matter, from reports/summary.json and metrics/filter.json.

    It describes the last model of `evaluate.models`. Base model and license are those of the source that the student is
    cut from: `initialize.model`, or what the teacher was made of.
    """
    from huggingface_hub import EvalResult, ModelCardData

    summary = load(reports)
    final = list(summary)[-1]
    folder = str(Path(params["evaluate"]["models"][final]))
    teachers = [params["teachers"][name] for name in params["filter"]["teachers"]]
    origin = source_of(params, params["initialize"]["model"])
    source = params["sources"][params["specialize"]["source"]]
    data = ModelCardData(
        model_name=f"q2t {final}",
        base_model=origin.get("base_model") or hub_id(origin),
        language="en",
        library_name="transformers",
        license=str(origin.get("license") or "unknown").lower(),
        metrics=["accuracy"],
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="q2t",
                dataset_name="q2t test split",
                metric_type="accuracy",
                metric_name="Accuracy, macro over families",
                metric_value=round(summary[final]["accuracy"], 4),
            )
        ],
    )
    return report.template("card.md.j2").render(
        front_matter=data.to_yaml(),
        final=final,
        model=summary[final],
        teacher=summary[TEACHER],
        base=summary.get("base"),
        folder=folder,
        is_onnx=folder in ("models/onnx", "models/int8"),
        writers=sorted({str(Path(one["model"])) for one in teachers if not one["prompts"].startswith("general")}),
        table=markdown_table(summary),
        measured=measured(summary),
        chance=chance(summary),
        source=next((str(source[k]) for k in ("hub", "registry", "path") if source.get(k)), "a random model"),
        counts=json.loads((reports / "metrics" / "filter.json").read_text(encoding="utf-8")),
        params=params,
        confidence=f"{100 * params['evaluate']['confidence']:g}%",
    )


def hub_id(source: Mapping[str, Any]) -> str | None:
    """OWNER/NAME on the Hub; None for a model that came from elsewhere: the Hub refuses other names."""
    return source["hub"].split("@")[0] if source.get("hub") else None
