"""Great Expectations: what has to be true of each data set, next to the rows that it guards.

A suite is a function that returns expectations on the columns of its frame; `validate` runs it in memory.
A critical expectation that fails stops the stage with example rows; a warning is logged and reported.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q2t.records import Completion, Example, Problem, write_json

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

WARNING: Any = "warning"
EXAMPLES = 3
"""Rows shown for each failed expectation."""


class QualityError(ValueError):
    """A critical expectation failed."""


def validate(name: str, frame: "pd.DataFrame", suite: list[Any], reports: Path = Path("reports/quality")) -> list[str]:
    """Check a frame, and write `reports`/NAME.json: the same bytes for the same rows.

    Args:
        suite: what `problems`, `completions`, `examples` or `labels` returned.

    Returns:
        One line for each warning.

    Raises:
        QualityError: a critical expectation failed. The report is written all the same.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    for noisy in ("great_expectations", "great_expectations.data_context.types.base"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # they set INFO when they are imported
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe(name).get_batch({"dataframe": frame})
    outcome = batch.validate(gx.ExpectationSuite(name, expectations=suite), result_format="SUMMARY").to_json_dict()

    results = sorted((_plain(r) for r in outcome["results"]), key=lambda r: (r["column"], r["expectation"]))
    report = {"rows": len(frame), "success": outcome["success"], "results": results}
    write_json(reports / f"{name}.json", report)
    failed = [result for result in results if not result["success"]]
    warnings = [f"{name}: {_line(result)}" for result in failed if result["severity"] == WARNING]
    critical = [result for result in failed if result["severity"] != WARNING]
    for line in warnings:
        logger.warning("%s", line)
    if critical:
        text = [f"{name}: {len(critical)} of {len(results)} expectations failed on {len(frame)} rows"]
        for result in critical:
            text += [f"  {_line(result)}", *_rows(frame, result)]
        raise QualityError("\n".join(text))
    return warnings


# --- Frames: what a suite looks at, computed from the rows


def problem_frame(rows: Sequence[Problem], same: Callable[[Problem], Hashable]) -> "pd.DataFrame":
    """One row per problem of all splits. `same` says which problems are one and must not be in two splits."""
    import pandas as pd

    frame = pd.DataFrame([row.model_dump(include={"id", "family", "domain", "split", "question"}) for row in rows])
    frame["question_length"] = frame["question"].str.strip().str.len()
    frame["splits"] = frame.groupby([str(same(row)) for row in rows])["split"].transform("nunique")
    frame["unsolved_lesson"] = [int(row.split == "lessons" and not row.solution.strip()) for row in rows]
    return frame


def completion_frame(rows: Iterable[Completion]) -> "pd.DataFrame":
    """One row per answer."""
    import pandas as pd

    columns = ["id", "problem_id", "finish_reason", "prompt_tokens", "completion_tokens"]
    frame = pd.DataFrame([row.model_dump(include=set(columns)) for row in rows], columns=columns)
    frame["truncated"] = (frame["finish_reason"] == "length").astype(int)
    return frame


def example_frame(rows: Iterable[Example]) -> "pd.DataFrame":
    """One row per training row."""
    import pandas as pd

    frame = pd.DataFrame([row.model_dump() for row in rows], columns=list(Example.model_fields))
    frame["target"] = (frame["domain"] == "target").astype(int)
    frame["text_length"] = frame["text"].str.strip().str.len()
    return frame


def label_frame(rows: Iterable[Any]) -> "pd.DataFrame":
    """One row per labelled row (`distillation.rows.Row`): numbers that tell whether its arrays fit."""
    import numpy as np
    import pandas as pd

    measured = []
    for row in rows:
        logprobs = np.concatenate([row.top_logprobs.ravel(), row.tail_logprob]).astype(np.float32)
        lengths = {len(row.top_ids), len(row.top_logprobs), len(row.tail_logprob)}
        measured.append(
            {
                "id": row.id,
                "weight": row.weight,
                "prompt_length": row.prompt_length,
                "answer_length": row.completion_tokens,
                "misfit": int(lengths not in ({row.completion_tokens}, {0})),
                "labelled": int(lengths == {row.completion_tokens}),
                "nan": int(np.isnan(logprobs).sum()),
                "largest_logprob": float(np.nanmax(logprobs, initial=-np.inf)) if len(logprobs) else None,
            }
        )
    return pd.DataFrame(measured)


# --- Suites


def problems(families: Sequence[str]) -> list[Any]:
    """For `problem_frame`: ids are hashes, nothing is in two splits, lessons are worked out."""
    import great_expectations.expectations as gxe

    return [
        *_ids("id"),
        gxe.ExpectColumnValuesToBeInSet(column="family", value_set=[*families, "general"]),
        gxe.ExpectColumnValuesToBeBetween(column="question_length", min_value=10, max_value=4000),
        gxe.ExpectColumnValuesToBeBetween(column="splits", min_value=1, max_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="unsolved_lesson", max_value=0),
        gxe.ExpectColumnDistinctValuesToContainSet(column="family", value_set=[*families, "general"], severity=WARNING),
    ]


def completions(truncated: float = 0.2) -> list[Any]:
    """For `completion_frame`. More than a share of `truncated` that ran into the token cap is a warning, and so are
    counts of no token: some servers count none of an empty answer, which the filter drops, and some none at all."""
    import great_expectations.expectations as gxe

    return [
        *_ids("id"),
        gxe.ExpectColumnValuesToNotBeNull(column="problem_id"),
        gxe.ExpectColumnValuesToBeInSet(column="finish_reason", value_set=["stop", "length"]),
        gxe.ExpectColumnValuesToBeBetween(column="prompt_tokens", min_value=1, severity=WARNING),
        gxe.ExpectColumnValuesToBeBetween(column="completion_tokens", min_value=1, severity=WARNING),
        gxe.ExpectColumnMeanToBeBetween(column="truncated", max_value=truncated, severity=WARNING),
    ]


def examples(families: Sequence[str], target_share: float, tolerance: float = 0.02) -> list[Any]:
    """For `example_frame`. The share of target rows is counted in rows; a family without any is a warning."""
    import great_expectations.expectations as gxe

    low, high = max(target_share - tolerance, 0.0), min(target_share + tolerance, 1.0)
    return [
        *_ids("id"),
        gxe.ExpectColumnMeanToBeBetween(column="target", min_value=low, max_value=high),
        gxe.ExpectColumnValuesToBeBetween(column="weight", min_value=0, strict_min=True),
        gxe.ExpectColumnValuesToBeBetween(column="text_length", min_value=1),
        gxe.ExpectColumnDistinctValuesToContainSet(column="family", value_set=list(families), severity=WARNING),
    ]


def labels() -> list[Any]:
    """For `label_frame`: log-probabilities for each token of the answer or for none, nothing above 0 or nan.

    Most rows without any is a warning: a teacher may give none, but then training is on its words alone.
    """
    import great_expectations.expectations as gxe

    return [
        *_ids("id"),
        gxe.ExpectColumnValuesToBeBetween(column="weight", min_value=0, strict_min=True),
        gxe.ExpectColumnValuesToBeBetween(column="prompt_length", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="answer_length", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="misfit", max_value=0),
        gxe.ExpectColumnValuesToBeBetween(column="nan", max_value=0),
        gxe.ExpectColumnValuesToBeBetween(column="largest_logprob", max_value=1e-3),  # 0, and float16's rounding
        gxe.ExpectColumnMeanToBeBetween(column="labelled", min_value=0.5, severity=WARNING),
    ]


def _ids(column: str) -> list[Any]:
    """Unique content hashes, in a table that has rows."""
    import great_expectations.expectations as gxe

    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        gxe.ExpectColumnValuesToNotBeNull(column=column),
        gxe.ExpectColumnValuesToBeUnique(column=column),
        gxe.ExpectColumnValuesToMatchRegex(column=column, regex="^[0-9a-f]{16}$"),
    ]


# --- Results


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result is worth keeping; its times, tracebacks and random names are not."""
    config = result["expectation_config"]
    limits = {k: v for k, v in config["kwargs"].items() if k not in ("batch_id", "column")}
    errors = [e["exception_message"] for e in result["exception_info"].values() if isinstance(e, dict)]
    kept = (
        "observed_value",
        "element_count",
        "unexpected_count",
        "unexpected_percent",
        "partial_unexpected_list",
    )
    found = {key: result["result"][key] for key in kept if key in result["result"]}
    if missing := result["result"].get("partial_missing_list"):
        found["partial_missing_list"] = sorted(missing)  # Great Expectations takes it out of a set
    return {
        "expectation": config["type"],
        "column": config["kwargs"].get("column", ""),
        "limits": limits,
        "severity": config["severity"],
        "success": result["success"],
        "errors": errors,
        "found": found,
    }


def _line(result: dict[str, Any]) -> str:
    limits = ", ".join(f"{k}={v}" for k, v in result["limits"].items())
    found = result["found"]
    if result["errors"]:
        seen = result["errors"][0]
    elif "unexpected_count" in found:
        seen = f"{found['unexpected_count']} of {found['element_count']} rows differ"
    elif "partial_missing_list" in found:
        seen = f"missing {found['partial_missing_list']}"
    else:
        seen = f"observed {found.get('observed_value')}"
    return f"{result['column'] or 'table'}: {result['expectation']}({limits}): {seen}"


def _rows(frame: "pd.DataFrame", result: dict[str, Any]) -> list[str]:
    """Example rows for an expectation on single values, indented."""
    values = result["found"].get("partial_unexpected_list", [])
    if not values:
        return []
    wrong = (
        frame[frame[result["column"]].isin(values)] if values[0] is not None else frame[frame[result["column"]].isna()]
    )
    table = wrong.head(EXAMPLES).to_string(index=False, max_colwidth=40)
    return [f"      {line}" for line in table.splitlines()]
