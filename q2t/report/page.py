"""reports/index.html: one self-contained page, the same bytes for the same results.

Model output is untrusted text: the template escapes everything, and nothing is loaded from a network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q2t import report
from q2t.report import charts
from q2t.report.summary import TEACHER, load, read_rows

STAGES = {
    "fetch": "source models, pinned",
    "pose": "problems with checkable answers",
    "specialize": "the teacher learns worked solutions",
    "generate": "the teacher answers, several times",
    "filter": "verified, deduplicated, mixed",
    "initialize": "the student before learning",
    "label": "the teacher's top log-probabilities",
    "distill": "the student learns",
    "prune": "narrowed, then healed",
    "export": "ONNX and int8",
    "evaluate": "one harness for every model",
}
TEXT_LIMIT = 1500
"""Characters of an answer that are shown."""


def render(reports: Path, rejected: Path, params: Mapping[str, Any], lock: Mapping[str, Any]) -> str:
    """The page, from reports/summary.json and the files beside it.

    Args:
        reports: the folder with summary.json, metrics, answers, curves and quality.
        rejected: data/filtered/rejected.jsonl.
        params: params.yaml; `tracking` is not shown, since it can't change a result.
        lock: dvc.lock; this page's own stage is not shown.
    """
    import jinja2

    summary = load(reports)
    final = list(summary)[-1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # select_autoescape() would not recognise ".html.j2"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (report.percent, report.span, report.size, report.millions, report.figure, excerpt):
        environment.filters[function.__name__] = function
    return environment.get_template("page.html.j2").render(
        summary=summary,
        final=final,
        kinds={name: _kind(name, final) for name in summary},
        confidence=f"{100 * params['evaluate']['confidence']:g}%",
        headline=headline(summary),
        charts=_charts(reports, summary, final),
        pipeline=pipeline(reports, summary),
        rejections=rejections(reports, rejected),
        answers=answers(reports, list(dict.fromkeys([next(iter(summary)), TEACHER, final]))),
        quality=quality(reports),
        params={
            section: report.flatten(values if isinstance(values, Mapping) else {section: values})
            for section, values in params.items()
            if section != "tracking"
        },
        outs=outs(lock),
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The result in one or two sentences."""
    final = list(summary)[-1]
    model, teacher = summary[final], summary[TEACHER]
    right = (
        f"{final} reaches {report.percent(model['accuracy'])} accuracy "
        f"on {_problems(summary):,} unseen problems, its teacher {report.percent(teacher['accuracy'])}"
    )
    smaller = (
        f"at {report.size(model['bytes'])} instead of {report.size(teacher['bytes'])} "
        f"({model['bytes'] / teacher['bytes']:.0%})"
    )
    if model["retention"] is None:
        return f"{right}, {smaller}. With nothing right, the teacher leaves nothing to retain."
    return f"{right}: {report.percent(model['retention'])} retained, {smaller}."


def pipeline(reports: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages in the order of the data, each with the counts that its files hold."""
    counts: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for path in sorted((reports / "metrics").glob("*.json")):
        stage, _, item = path.stem.partition("_")
        if stage in counts and stage != "evaluate":
            values = _read(path)
            if stage == "filter":
                values = values | {"rejected": sum(values["rejected"].values())}
            # A box has room for figures; text, tables and lists are in the metric files.
            shown = {key: value for key, value in values.items() if isinstance(value, int | float)}
            counts[stage].append({"item": item, "counts": shown})
    for stage, path in _curves(reports).items():
        steps = max((step for points in charts.read_curve(path).values() for step, _ in points), default=0)
        counts[stage].append({"item": "", "counts": {"steps": int(steps)}})
    evaluated = {"models": len(summary), "problems": _problems(summary)}
    counts["evaluate"].append({"item": "", "counts": evaluated})
    return [{"name": name, "what": what, "runs": counts[name]} for name, what in STAGES.items()]


def rejections(reports: Path, rejected: Path) -> dict[str, Any]:
    """Rows of reason, count, share of all answers and the first example; the commonest reason first."""
    counts = _read(reports / "metrics" / "filter.json")
    examples: dict[str, dict[str, Any]] = {}
    for row in read_rows(rejected):
        examples.setdefault(row["reason"], row)
    judged = counts["kept"] + sum(counts["rejected"].values())
    ordered = sorted(counts["rejected"].items(), key=lambda item: (-item[1], item[0]))
    rows = [
        {"reason": reason, "count": count, "share": count / judged, "example": examples.get(reason)}
        for reason, count in ordered
        if count
    ]
    return {"kept": counts["kept"], "judged": judged, "rows": rows}


def answers(reports: Path, models: list[str], most: int = 3) -> dict[str, list[dict[str, Any]]]:
    """Family to at most `most` problems, each with the answers of `models` side by side.

    The first problem of every pattern of right and wrong is taken, so that losses show as well as gains.
    """
    by_model = {
        name: {row["problem_id"]: row for row in read_rows(reports / "answers" / f"{name}.jsonl")} for name in models
    }
    patterns: dict[str, dict[tuple[bool, ...], dict[str, Any]]] = {}
    for problem in sorted(set.intersection(*(set(rows) for rows in by_model.values()))):
        rows = {name: by_model[name][problem] for name in models}
        first = rows[models[0]]
        pattern = tuple(bool(row["correct"]) for row in rows.values())
        family = patterns.setdefault(first["family"], {})
        shown = {key: first[key] for key in ("question", "expected", "domain")}
        family.setdefault(pattern, shown | {"rows": rows})
    return {
        family: [found[pattern] for pattern in sorted(found, key=lambda p: (-sum(p), p))][:most]
        for family, found in sorted(patterns.items(), key=lambda item: (item[0] == "general", item[0]))
    }


def quality(reports: Path) -> list[dict[str, Any]]:
    """What q2t.quality wrote, as rows: what was expected of which column, and what was found."""
    suites = []
    for path in sorted((reports / "quality").glob("*.json")):
        checks = []
        for result in _read(path)["results"]:
            found, limits = result["found"], result["limits"]
            if "unexpected_count" in found:
                seen = f"{found['unexpected_count']:,} of {found['element_count']:,} unexpected"
            else:
                seen = report.figure(found.get("observed_value"))
            checks.append(
                {
                    "passed": result["success"],
                    "expectation": result["expectation"].removeprefix("expect_").replace("_", " "),
                    "column": result["column"],
                    "arguments": ", ".join(f"{key} {report.figure(limits[key])}" for key in sorted(limits)),
                    "severity": result["severity"],
                    "seen": seen,
                }
            )
        checks.sort(key=lambda check: check["passed"])
        suites.append({"name": path.stem, "checks": checks, "failed": sum(not c["passed"] for c in checks)})
    return suites


def outs(lock: Mapping[str, Any]) -> list[dict[str, Any]]:
    """stage, path, md5 and size of all that dvc.lock names, in the order of the data."""
    order = list(STAGES)
    stages = [(name, entry) for name, entry in lock["stages"].items() if name.split("@")[0] in order]
    stages.sort(key=lambda item: (order.index(item[0].split("@")[0]), item[0]))
    return [
        {"stage": name, "path": out["path"], "md5": out["md5"], "size": out.get("size")}
        for name, entry in stages
        for out in entry.get("outs", [])
    ]


def excerpt(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, cut with a note of how much is left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _charts(reports: Path, summary: Mapping[str, Any], final: str) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "kind": _kind(name, final),
            "value": model["accuracy"],
            "interval": model["interval"],
            "bytes": model["bytes"],
        }
        for name, model in summary.items()
    ]
    retained = [
        row | {"value": model["retention"], "interval": model["retention_interval"]}
        for row, model in zip(rows, summary.values(), strict=True)
    ]
    families = {
        family: charts.bars(
            [
                row | {key if key != "accuracy" else "value": counts[key] for key in ("accuracy", "interval")}
                for row, model in zip(rows, summary.values(), strict=True)
                for counts in [model["families"][family]]
            ],
            f"Accuracy on {family}",
        )
        for family in summary[TEACHER]["families"]
    }
    curves = {stage: charts.curve(path, f"Loss of {stage}") for stage, path in _curves(reports).items()}
    return {
        "size": charts.scatter(rows, "Accuracy against size on disk"),
        "retention": charts.bars(retained, "Retention", reference=1.0),
        "families": families,
        "curves": {stage: chart for stage, chart in curves.items() if chart},
    }


def _curves(reports: Path) -> dict[str, Path]:
    """Stage to the curve that it wrote, in the order of the data."""
    paths = {stage: reports / "curves" / f"{stage}.csv" for stage in STAGES}
    return {stage: path for stage, path in paths.items() if path.exists()}


def _kind(name: str, final: str) -> str:
    return "teacher" if name == TEACHER else "final" if name == final else "other"


def _problems(summary: Mapping[str, Any]) -> int:
    return sum(counts["total"] for counts in summary[TEACHER]["families"].values())


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
