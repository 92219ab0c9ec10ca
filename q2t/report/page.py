"""reports/index.html: one self-contained page, the same bytes for the same results.

Model output is untrusted text: the template escapes everything, and nothing is loaded from a network.
"""

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from q2t import report
from q2t.report import charts
from q2t.report.summary import LENIENT, TEACHER, chance, load, measured, read_rows

STAGES = {
    "fetch": "source models, pinned",
    "pose": "problems with checkable answers",
    "specialize": "the teacher learns worked solutions",
    "generate": "the teachers answer",
    "filter": "judged, deduplicated, mixed",
    "initialize": "the student before learning",
    "label": "the teacher's top log-probabilities",
    "distill": "the student learns",
    "prune": "narrowed, then healed",
    "export": "ONNX and int8",
    "evaluate": "one harness for every model",
}
REASONS = {
    "truncated": "stopped at the token limit",
    "too_long": "more tokens than the student may learn",
    "empty": "a general answer without a letter or digit",
    "special_tokens": "holds a mark of a chat template",
    "leaked_tags": "a general answer with <think> or <answer> tags",
    "malformed": "not of the form <think>…</think><answer>…</answer>",
    "degenerate": "a general answer that repeats itself",
    "wrong": "the verifier says no",
    "contaminated": "answers a problem with a held-out one's operands, or a general prompt worded like a held-out one",
    "near_duplicate": "answers a general prompt worded like an earlier training prompt",
    "duplicate": "the same answer to the same problem, once more",
    "not_sampled": "passed every rule, but not in the sample of filter.max_rows",
    "surplus": "passed every rule, but more than the mix has room for",
}
"""q2t.curation.curate.Reason, in words."""
EXAMPLES = 3
"""Rejected answers that are shown for each reason, and problems for each family."""
PACKAGES = (
    *("torch", "transformers", "trl", "tokenizers", "onnxruntime", "optimum-onnx", "numpy"),
    *("dvc", "mlflow", "great-expectations", "datasketch"),
)
"""Those that shape results; the lock file has them all."""


def render(
    reports: Path, rejected: Path, params: Mapping[str, Any], lock: Mapping[str, Any], requirements: Path
) -> str:
    """The page, from reports/summary.json and the files beside it.

    Args:
        reports: the folder with summary.json, metrics, answers, curves and quality.
        rejected: data/filtered/rejected.jsonl.
        params: params.yaml; `tracking` is not shown, since it can't change a result.
        lock: dvc.lock; this page's own stage is not shown, nor what params.yaml no longer has.
        requirements: requirements.lock.
    """
    summary = load(reports)
    final = list(summary)[-1]
    lock = {"stages": {name: entry for name, entry in lock["stages"].items() if is_current(name, params)}}
    stages = pipeline(reports, summary, params)
    return report.template("page.html.j2").render(
        summary=summary,
        final=final,
        measured=measured(summary),
        chance=chance(summary),
        lenient=LENIENT,
        kinds={name: _kind(name, summary) for name in measured(summary)},
        confidence=f"{100 * params['evaluate']['confidence']:g}%",
        headline=headline(summary),
        charts=_charts(reports, summary),
        graph=charts.graph(*graph(stages, lock), "Which stage reads what which stage wrote"),
        pipeline=stages,
        rejections=rejections(reports, rejected),
        answers=answers(reports, list(dict.fromkeys([next(iter(summary)), TEACHER, final]))),
        quality=quality(reports, params),
        params={
            section: report.flatten(values if isinstance(values, Mapping) else {section: values})
            for section, values in params.items()
            if section != "tracking"
        },
        outs=outs(lock),
        packages=packages(requirements),
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The result in two or three sentences."""
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
    found = f"{right}: {report.percent(model['retention'])} retained, {smaller}."
    guesses = chance(summary)
    if guesses is None:
        return found
    free = [
        f"{name} with {LENIENT} {report.percent(row['lenient']['accuracy'])}"
        for name, row in summary.items()
        if "lenient" in row
    ]
    return f"{found} Judged by free text, {', '.join(free)}; blind guesses {report.percent(guesses['accuracy'])}."


def is_current(stage: str, params: Mapping[str, Any]) -> bool:
    """Whether the graph has the stage, such as "generate@expert".

    What foreach made of an entry that was taken out of params.yaml stays in dvc.lock and on disk.
    """
    name, _, key = stage.partition("@")
    keys = {"fetch": params["sources"], "generate": params["teachers"], "evaluate": params["evaluate"]["models"]}
    return key in keys.get(name, ("",))


def graph(stages: list[dict[str, Any]], lock: Mapping[str, Any]) -> tuple[list[dict[str, str]], set[tuple[str, str]]]:
    """The stages with the rows or steps that each came to, and which one reads what another wrote, from dvc.lock.

    `stages`: those of `pipeline`.
    """
    texts = dict.fromkeys(STAGES, "")
    for stage in stages:
        counts = [run["counts"] for run in stage["runs"]]
        match stage["name"]:
            case "fetch":
                texts["fetch"] = f"{sum(name.startswith('fetch@') for name in lock['stages'])} pinned"
            case "pose":
                texts["pose"] = (
                    f"{sum(v for c in counts for k, v in c.items() if not k.startswith('parts')):,} problems"
                )
            case "generate":
                texts["generate"] = f"{sum(c.get('answers', 0) for c in counts):,} answers"
            case "filter":
                texts["filter"] = " of ".join(f"{c[k]:,}" for c in counts for k in ("kept", "read")) + " rows kept"
            case name:
                shown = ((c, key) for c in counts for key in ("steps", "rows", "layers", "models") if key in c)
                texts[name] = next((f"{c[key]:,} {key}" for c, key in shown), "")
    written = {
        out["path"]: name.split("@")[0] for name, entry in lock["stages"].items() for out in entry.get("outs", [])
    }
    edges = {
        (source, name.split("@")[0])
        for name, entry in lock["stages"].items()
        for dep in entry.get("deps", [])
        for path, source in written.items()
        if f"{dep['path']}/".startswith(f"{path}/") or path.startswith(f"{dep['path']}/")
    }
    nodes = [{"name": name, "text": text} for name, text in texts.items()]
    return nodes, {(a, b) for a, b in edges if a != b and a in STAGES and b in STAGES}


def pipeline(reports: Path, summary: Mapping[str, Any], params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages in the order of the data, each with the counts that its files hold."""
    counts: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for path in sorted((reports / "metrics").glob("*.json")):
        stage, _, item = path.stem.partition("_")
        if stage in counts and stage != "evaluate" and is_current(f"{stage}@{item}", params):
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
    """Rows of reason, count, share of all answers and first examples, the commonest reason first; kept by family."""
    counts = _read(reports / "metrics" / "filter.json")
    examples: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(rejected):
        shown = examples.setdefault(row["reason"], [])
        if len(shown) < EXAMPLES and row["family"] not in [other["family"] for other in shown]:
            shown.append(row)
    judged = counts["kept"] + sum(counts["rejected"].values())
    ordered = sorted(counts["rejected"].items(), key=lambda item: (-item[1], item[0]))
    rows = [
        {
            "reason": reason,
            "what": REASONS[reason],
            "details": sorted(counts.get(reason, {}).items(), key=lambda item: (-item[1], item[0])),
            "count": count,
            "share": count / judged,
            "examples": examples.get(reason, []),
        }
        for reason, count in ordered
        if count
    ]
    families = sorted(counts["families"].items(), key=lambda item: (item[0] == "general", item[0]))
    return {"kept": counts["kept"], "judged": judged, "rows": rows, "families": families}


def answers(reports: Path, models: list[str], count: int = EXAMPLES) -> dict[str, list[dict[str, Any]]]:
    """Family to `count` problems, more where there are more patterns, each with the answers of `models` side by side.

    The first problem of every pattern of right and wrong comes first, so that losses show as well as gains, and then
    each pattern's second.
    """
    by_model = {
        name: {row["problem_id"]: row for row in read_rows(reports / "answers" / f"{name}.jsonl")} for name in models
    }
    patterns: dict[str, dict[tuple[bool, ...], list[dict[str, Any]]]] = {}
    for problem in sorted(set.intersection(*(set(rows) for rows in by_model.values()))):
        rows = {name: by_model[name][problem] for name in models}
        first = rows[models[0]]
        pattern = tuple(bool(row["correct"]) for row in rows.values())
        shown = {key: first[key] for key in ("question", "expected", "domain")} | {"unit": first.get("unit", "")}
        patterns.setdefault(first["family"], {}).setdefault(pattern, []).append(shown | {"rows": rows})
    chosen = {}
    for family, found in sorted(patterns.items(), key=lambda item: (item[0] == "general", item[0])):
        ordered = [found[pattern] for pattern in sorted(found, key=lambda p: (-sum(p), p))]
        turns = zip_longest(*ordered)
        chosen[family] = [problem for turn in turns for problem in turn if problem][: max(count, len(found))]
    return chosen


def quality(reports: Path, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What q2t.quality wrote, as rows: what was expected of which column, and what was found."""
    suites = []
    for path in sorted((reports / "quality").glob("*.json")):
        if not is_current(path.stem.replace("generations_", "generate@"), params):
            continue
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


def packages(requirements: Path) -> dict[str, str]:
    """Package to version, of PACKAGES."""
    pinned = (
        line.split(" ")[0].strip().partition("==") for line in requirements.read_text(encoding="utf-8").splitlines()
    )
    versions = {name: version for name, _, version in pinned}
    return {name: versions[name] for name in PACKAGES if name in versions}


def _charts(reports: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "kind": _kind(name, summary),
            "value": row["accuracy"],
            "interval": row["interval"],
            "bytes": row["bytes"],
        }
        for name, row in measured(summary).items()
    ]
    retained = [
        {
            "name": name,
            "kind": _kind(name, summary),
            "value": model["retention"],
            "interval": model["retention_interval"],
        }
        for name, model in summary.items()
    ]
    guesses = chance(summary)
    families = {
        family: charts.bars(
            [
                row
                | {"value": other["families"][family]["accuracy"], "interval": other["families"][family]["interval"]}
                for row, other in zip(rows, measured(summary).values(), strict=True)
            ],
            f"Accuracy on {family}",
            reference=guesses["families"][family] or None if guesses else None,
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


def _kind(name: str, summary: Mapping[str, Any]) -> str:
    """The class that colours a row."""
    if name not in summary:
        return "lenient"
    return "teacher" if name == TEACHER else "final" if name == list(summary)[-1] else "other"


def _problems(summary: Mapping[str, Any]) -> int:
    return sum(counts["total"] for counts in summary[TEACHER]["families"].values())


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
