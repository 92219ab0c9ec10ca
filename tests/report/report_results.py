"""A small tree of results, as the stages before the report leave it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = ["base", "teacher", "untrained", "student", "pruned", "onnx", "int8"]
RIGHT = {"base": 1, "teacher": 17, "untrained": 0, "student": 15, "pruned": 13, "onnx": 13, "int8": 12}
BYTES = dict(zip(MODELS, (269, 269, 160, 160, 122, 246, 64), strict=True))
"""Megabytes."""
FAMILIES = ["divider", "gain", "led", "mosfet", "rc_filter"]
PROBLEMS = 20
EVIL = '</pre><script>alert("x")</script>'


@dataclass
class Results:
    reports: Path
    rejected: Path
    examples: Path
    requirements: Path
    params: dict[str, Any]
    lock: dict[str, Any]


def make_results(root: Path) -> Results:
    reports = root / "reports"
    for name in MODELS:
        _answers(reports, name)
    metrics = {
        "pose": {"lessons": 1200, "questions": 600, "dev": 50, "test": 100, "general": 500, "parts": 1485},
        "generate_expert": {"answers": 4000, "truncated": 31, "tokens": 412345},
        "generate_base": {"answers": 500, "truncated": 60, "tokens": 81234},
        "filter": {
            "kept": 2310,
            "read": 4500,
            "rejected": {"wrong": 1800, "malformed": 61, "duplicate": 329, "unused": 0},
            "malformed": {"no_answer": 61},
            "wrong": {"wrong_part": 300, "wrong_value": 1500},
            "families": {family: {"read": 800, "kept": 362} for family in FAMILIES}
            | {"general": {"read": 500, "kept": 500}},
        },
        "label": {"rows": 2310, "tokens": 330112, "mean_tail": 0.00123},
        "export": {"recovery": 0.981, "passed": True},
    }
    for stage, values in metrics.items():
        _json(reports / "metrics" / f"{stage}.json", values)
    _curves(reports / "curves")
    checks = [
        _check(
            "expect_column_values_to_be_unique",
            {"column": "id"},
            True,
            "critical",
            {"unexpected_count": 0, "element_count": 2310},
        ),
        _check(
            "expect_column_mean_to_be_between",
            {"column": "tokens", "max_value": 200},
            False,
            "warning",
            {"observed_value": 231.4},
        ),
    ]
    _json(reports / "quality" / "examples.json", {"success": False, "results": checks})
    _json(reports / "quality" / "prompts.json", {"success": True, "results": checks[:1]})
    rejected = root / "data" / "filtered" / "rejected.jsonl"
    examples = root / "data" / "filtered" / "examples.jsonl"
    _jsonl(examples, [{"teacher": "expert", "problem_id": "p1"}] * 3 + [{"teacher": "base", "problem_id": "g7"}])
    reasons = {"wrong": "read 471, expected 470", "malformed": "two answer blocks", "duplicate": ""}
    _jsonl(
        rejected,
        [
            {
                "id": f"c{number}",
                "problem_id": "p1",
                "family": "led",
                "teacher": "expert",
                "reason": reason,
                "detail": detail,
                "text": f"<think>5 - 2 = 3</think><answer>471 ohm</answer>{EVIL}",
            }
            for number, (reason, detail) in enumerate(reasons.items())
        ],
    )
    params = {
        "seed": 7,
        "compute": {"threads": 2, "dtype": "bfloat16", "device": "cpu"},
        "sources": {
            "smollm": {
                "hub": "HuggingFaceTB/SmolLM2-135M-Instruct@" + "0" * 40,
                "path": None,
                "license": "Apache-2.0",
            }
        },
        "capability": {"families": FAMILIES, "test": PROBLEMS},
        "specialize": {"source": "smollm", "epochs": 2, "learning_rate": 0.0005},
        "initialize": {"model": "models/teacher"},
        "teachers": {
            "expert": {"model": "models/teacher", "prompts": "questions", "samples": 4},
            "base": {"model": "models/sources/smollm", "prompts": "general", "samples": 2},
        },
        "filter": {
            "teachers": ["expert", "base"],
            "target_share": 0.8,
            "max_tokens": 256,
            "max_rows": None,
            "keep_incorrect": False,
        },
        "distill": {"alpha": 0.7, "temperature": 2.0, "learning_rate": 0.0004},
        "evaluate": {
            "models": {name: f"models/{name}" for name in MODELS},
            "max_new_tokens": 256,
            "confidence": 0.95,
            "resamples": 200,
        },
        "tracking": {"uri": "sqlite:///hidden.db", "experiment": "q2t"},
    }
    paths = {
        "pose": "data/prompts",
        "distill": "models/student",
        "fetch@smollm": "models/sources/smollm",
        "generate@expert": "data/generations/expert.jsonl",
        "filter": "data/filtered",
        "report": "reports/index.html",
    }
    reads = {
        "generate@expert": ["data/prompts/questions.jsonl", "q2t/records.py"],
        "filter": ["data/generations", "data/prompts"],
        "report": ["data/filtered/rejected.jsonl"],
    }
    stages = {
        name: {
            "deps": [{"path": dep, "md5": "0"} for dep in reads.get(name, [])],
            "outs": [{"path": path, "md5": f"{number:032x}", "size": 10**7 * number + 1}],
        }
        for number, (name, path) in enumerate(paths.items())
    }
    requirements = root / "requirements.lock"
    requirements.write_text("# Exact.\nnumpy==2.4.6\ntorch==2.13.0\nzipp==3.1\n", encoding="utf-8")
    return Results(reports, rejected, examples, requirements, params, {"schema": "2.0", "stages": stages})


def forget_lenient(results: Results) -> None:
    """As a run with an empty evaluate.lenient leaves it."""
    path = results.reports / "metrics" / "evaluate_base.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    _json(path, {key: value for key, value in metrics.items() if key not in ("lenient", "chance")})
    answers = results.reports / "answers" / "base.jsonl"
    _jsonl(answers, [json.loads(line) | {"lenient": None} for line in answers.read_text(encoding="utf-8").splitlines()])


def _answers(reports: Path, name: str) -> None:
    rows, families = [], {}
    free = {"text": f"Sure! {EVIL}", "correct": False, "rule": "no_quantity", "measured": None}
    for shift, family in enumerate(FAMILIES):
        right = max(0, RIGHT[name] - 2 * shift)
        families[family] = {"correct": right, "total": PROBLEMS}
        for number in range(PROBLEMS):
            correct = number < right
            rows.append(
                {
                    "problem_id": f"{family}{number:02}",
                    "family": family,
                    "domain": "target",
                    "question": f"{family}, number {number}: limit a 2.1 V LED at 9 V to 15 mA, in E24",
                    "text": f"<think>6.9 / 0.015 = 460</think><answer>{470 if correct else 460} ohm</answer>",
                    "correct": correct,
                    "rule": "ok" if correct else "wrong_value",
                    "expected": 470,
                    "measured": 470 if correct else 460,
                    "unit": "ohm",
                    "lenient": free if name == "base" else None,
                }
            )
    rows.append(
        {
            "problem_id": "g1",
            "family": "general",
            "domain": "general",
            "question": "What is the capital of France?",
            "text": f"Paris. {EVIL}",
            "correct": None,
            "rule": "undecided",
            "expected": None,
            "measured": None,
            "unit": "",
            "lenient": None,
        }
    )
    _jsonl(reports / "answers" / f"{name}.jsonl", rows)
    accuracy = sum(c["correct"] for c in families.values()) / (PROBLEMS * len(families))
    lenient = {
        "accuracy": 0.1,
        "interval": [0.05, 0.18],
        "families": {family: {"correct": 2, "total": PROBLEMS} for family in FAMILIES},
    }
    chance = {family: 1 / 3 if family == "mosfet" else 0.0 for family in FAMILIES}
    _json(
        reports / "metrics" / f"evaluate_{name}.json",
        ({"lenient": lenient, "chance": chance} if name == "base" else {})
        | {
            "model": name,
            "families": families,
            "accuracy": accuracy,
            "interval": [max(0.0, accuracy - 0.09), min(1.0, accuracy + 0.09)],
            "parameters": BYTES[name] * 500_000,
            "embedding_parameters": 3_500_000,
            "bytes": BYTES[name] * 1_000_000,
            "forgetting": {"bits_per_byte": 0.7 + RIGHT[name] / 20, "degenerate": RIGHT[name] / 50},
            "truncated": 0.02,
            "held_out": {"correct": RIGHT[name] // 2, "total": 10},
        },
    )


def _curves(folder: Path) -> None:
    folder.mkdir(parents=True)
    for stage, steps, kl in (("specialize", 190, False), ("distill", 160, True), ("prune", 60, True)):
        lines = ["step,loss,cross_entropy,kl,learning_rate,gradient_norm"]
        for step in range(1, steps + 1):
            noise = 1 + 0.3 * ((step * 7919 % 101) / 101 - 0.5)
            entropy = (2.4 * 0.97**step + 0.06) * noise
            divergence = (1.1 * 0.98**step + 0.12) * noise
            loss = 0.3 * entropy + 0.7 * divergence if kl else entropy
            lines.append(f"{step},{loss:.5f},{entropy:.5f},{f'{divergence:.5f}' if kl else ''},0.0004,1.2")
        (folder / f"{stage}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check(kind: str, kwargs: dict[str, Any], success: bool, severity: str, found: dict[str, float]) -> dict[str, Any]:
    limits = {key: value for key, value in kwargs.items() if key != "column"}
    return {
        "expectation": kind,
        "column": kwargs.get("column", ""),
        "limits": limits,
        "severity": severity,
        "success": success,
        "errors": [],
        "found": found,
    }


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
