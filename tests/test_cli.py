import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from q2t import cli, profile
from q2t.config import load

PARAMS = """\
# Every knob.
seed: 1  # of everything

compute: {threads: 2, dtype: float32, device: cpu}
launch: python -m

sources:
  large:
    hub: owner/large@0123  # pinned
    license: MIT

# What is kept.
capability:
  families:
    - led
    - rc

  # counts
  lessons: 10
  questions: 10
  dev: 10
  test: 10
  general: 10
  general_test: 10
  grid: coarse
# How it is learnt.
specialize:
  source: large
  epochs: 1
  learning_rate: 5e-4  # peak
  batch_size: 4
  warmup: 0.1
  weight_decay: 0.0
teachers:
  expert:
    model: models/teacher
    prompts: questions
    samples: 1
    temperature: 0.7
    top_p: 0.9
    max_new_tokens: 9
    batch_size: 2
  reference:
    model: models/sources/large
    prompts: general_test
    samples: 1
    temperature: 0.0
    top_p: 1.0
    max_new_tokens: 9
    batch_size: 2
filter:
  teachers: [expert]
  target_share: 1.0
  max_tokens: 99
  max_rows: null
  keep_incorrect: false
  weights: {domain: {target: 1.0, general: 1.0}, teacher: {}, difficulty: 0.0}
initialize: {model: models/teacher, layers: 2, vocabulary: 400, calibration_rows: 4}
label: {top_k: 5, batch_size: 2, beside: {}}
distill: &distill
  seed: 1
  epochs: 1
  learning_rate: 5e-4  # peak
  batch_size: 4
  warmup: 0.1
  weight_decay: 0.0
  alpha: 0.5
  temperature: 2.0
  divergence: forward_kl
  beta: 0.5
  schedule: linear
  spike_factor: null
  domains: [target, general]
  share: 1.0
  teacher_only: []
  balance: false
  curriculum: 0.0
  reasoning: 1.0
  sparsity: 0.0
  gradient_checkpointing: false
  adapter: null
  freeze: []
  online: null
  on_policy: null
  phases: []
prune:
  <<: *distill
  intermediate: 16
  calibration_rows: 4
export: {recovery: 0.9}
evaluate:
  models:
    base: models/sources/large
    teacher: models/teacher
  max_new_tokens: 9
  batch_size: 2
  lenient: [base]
  confidence: 0.95
  resamples: 100

# Not tracked.
tracking:
  uri: sqlite:///.q2t/mlflow.db
  experiment: q2t
# The end.
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml and profiles, as the working directory."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "profiles").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile.apply, "__defaults__", (Path("params.yaml"), Path("profiles")))
    return tmp_path


def overlay(text: str) -> int:
    Path("profiles/tiny.yaml").write_text(text)
    return cli.main(["profile", "tiny"])


def test_a_profile_changes_its_lines_and_no_others(here):
    assert overlay("seed: 2\ncapability: {lessons: 3}\ndistill: {learning_rate: 2e-3}\n") == 0
    before, after = PARAMS.splitlines(), Path("params.yaml").read_text().splitlines()
    assert [(old, new) for old, new in zip(before, after, strict=True) if old != new] == [
        ("seed: 1  # of everything", "seed: 2  # of everything"),
        ("  lessons: 10", "  lessons: 3"),
        ("  learning_rate: 5e-4  # peak", "  learning_rate: 2e-3  # peak"),
    ]
    params = load(Path("params.yaml"))
    assert params.distill.learning_rate == 2e-3 and params.specialize.learning_rate == 5e-4


def test_replacing_a_map_or_a_list_keeps_the_comment_above_the_next_section(here):
    text = """\
sources:
  tiny:
    scratch: {vocabulary: 400, hidden: 8, intermediate: 16, layers: 2, heads: 2, kv_heads: 2}
capability:
  families:
    - led  # the easy one
specialize: {source: tiny}
"""
    assert overlay(text) == 0
    after = Path("params.yaml").read_text()
    assert "kv_heads: 2}\n\n# What is kept.\ncapability:" in after
    assert "    - led  # the easy one\n\n  # counts\n  lessons: 10" in after
    assert "    - rc" not in after


def test_named_maps_are_replaced_whole(here):
    models = "evaluate: {models: {teacher: models/teacher}, lenient: []}\n"
    assert overlay("sources: {small: {path: x}}\nspecialize: {source: small}\n" + models) == 0
    params = load(Path("params.yaml"))
    assert list(params.sources) == ["small"] and params.evaluate.models == {"teacher": "models/teacher"}
    assert params.evaluate.resamples == 100
    assert "# Not tracked.\ntracking:" in Path("params.yaml").read_text()


def test_a_profile_applied_twice_is_applied_once(here, capsys):
    text = "seed: 3\nsources: {small: {path: x}}\nspecialize: {source: small}\ncapability: {families: [rc]}\n"
    overlay(text)
    once = Path("params.yaml").read_bytes()
    assert capsys.readouterr().out.split() == [
        *("changed", "seed", "changed", "sources"),
        *("changed", "specialize.source", "changed", "capability.families"),
    ]
    overlay(text)
    assert Path("params.yaml").read_bytes() == once
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {alpha: 1.0}", "params.yaml has no distil: did you mean 'distill'?"),
        ("distill: {alfa: 1.0}", "params.yaml has no distill.alfa: did you mean 'alpha'?"),
        ("label: {top_k: many}", "'top_k' in label: Input should be a valid integer"),
        ("sources: {s: {path: x, hub: y}}", "a source needs exactly one of"),
    ],
)
def test_a_wrong_profile_is_one_clear_error_and_changes_nothing(here, capsys, text, message):
    assert overlay(text) == 2
    out, error = capsys.readouterr()
    assert message in error and "Traceback" not in error and not out
    assert Path("params.yaml").read_text() == PARAMS and not list(here.glob("*.partial"))


@pytest.mark.parametrize("arguments", [["profile", "tiny"], ["measure"], ["track"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [("seed: [1\nlabel: {", "is no YAML: while parsing"), ("", "(is empty|is no YAML map|got None)")],
)
def test_parameters_that_are_no_yaml_are_one_clear_error(here, capsys, arguments, text, message):
    overlay("seed: 2")
    capsys.readouterr()
    Path("params.yaml").write_text(text)
    Path("dvc.lock").write_text("stages: {}")
    assert cli.main(arguments) == 2
    assert re.match(f"q2t: params.yaml.*{message}", capsys.readouterr().err, re.DOTALL)


def test_a_profile_on_edited_parameters_says_so(here, capsys):
    for command in (
        ["init", "-q"],
        ["add", "params.yaml"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"],
    ):
        subprocess.run(["git", *command], check=True)
    os.utime("params.yaml", (1, 1))  # as a copy has it, and no edit
    assert overlay("seed: 3") == 0 and not capsys.readouterr().err
    assert overlay("seed: 4") == 0
    assert "`git checkout params.yaml` before `q2t profile tiny`" in capsys.readouterr().err


def test_no_threads_are_no_choice(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ask", "why?", "--threads", "0"])
    assert "argument --threads: invalid count value: '0'" in capsys.readouterr().err


def test_an_unknown_profile_names_the_known_ones(here, capsys):
    overlay("seed: 2")
    assert cli.main(["profile", "tinny"]) == 2
    assert "no profile 'tinny': there are tiny" in capsys.readouterr().err


def test_catalog_writes_the_parts(tmp_path, monkeypatch, capsys):
    from q2t.capability.electronics import catalog

    written = {}
    monkeypatch.setattr(catalog, "build", lambda symbols: ([symbols], []))
    monkeypatch.setattr(catalog, "write", lambda parts, dropped, folder: written.update({folder: parts}))
    assert cli.main(["catalog", "symbols", "--out", str(tmp_path)]) == 0
    assert written == {tmp_path: [Path("symbols")]}
    assert "1 parts, 0 dropped" in capsys.readouterr().out


def test_track_prints_the_run(monkeypatch, capsys):
    from q2t import tracking

    monkeypatch.setattr(tracking, "track", lambda rev: f"run-of-{rev}")
    assert cli.main(["track", "--rev", "v1"]) == 0
    assert capsys.readouterr().out == "MLflow run run-of-v1\n"


def test_measure_shows_cost_beside_what_is_known_and_logs_it(here, monkeypatch, capsys):
    rows = [
        {"model": "teacher", "tokens_per_second": 28.4321, "first_token_ms": 180.5, "peak_memory_mb": 1096.6},
        {"model": "<new>", "tokens_per_second": 101.26, "first_token_ms": 40.2, "peak_memory_mb": 697.4},
    ]
    stages = [
        {"stage": "distill", "minutes": 7.84, "peak_memory_mb": 4203.7},
        {"stage": "prune", "minutes": 5.1, "peak_memory_mb": 2790.9},
    ]
    logged: list = []
    monkeypatch.setattr("q2t.evaluation.cost.measure", lambda root: rows)
    monkeypatch.setattr("q2t.tracking.log_timings", lambda models: logged.extend(models) or stages)
    Path("reports").mkdir()
    known = {
        "accuracy": 0.61234,
        "retention": 1.0,
        "parameters": 134515008,
        "bytes": 538090000,
        "families": {},
    }
    Path("reports/summary.json").write_text(json.dumps({"teacher": known}))
    assert cli.main(["measure"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [
            "model",
            "accuracy",
            "retention",
            "parameters",
            "megabytes",
            *("tokens_per_second", "first_token_ms", "peak_memory_mb"),
        ],
        ["teacher", "0.612", "1", "134,515,008", "538.1", "28.4", "180.5", "1096.6"],
        ["<new>", "101.3", "40.2", "697.4"],
        [],
        ["stage", "minutes", "peak_memory_mb"],
        ["distill", "7.84", "4203.7"],
        ["prune", "5.1", "2790.9"],
    ]
    assert logged == rows
    written = json.loads(Path("reports/timings.json").read_text())
    assert re.fullmatch(r"\d+ cores of .+ \(.+\).*, torch .+", written.pop("machine"))
    assert written == {"models": rows, "stages": stages}
    page = re.sub(r"<[^>]+>", " ", Path("reports/timings.html").read_text())
    told = [line.split() for line in page.splitlines()]
    assert ["distill", "7.8", "4.2", "GB"] in told and ["together", "12.9", "4.2", "GB"] in told
    assert ["&lt;new&gt;", "101", "40", "ms", "697", "MB"] in told


def test_ask_streams_the_answer(tmp_path, monkeypatch, capsys):
    runtime = ModuleType("runtime")

    seeded = []

    def load(folder, compute):
        assert seeded == ["float32"], "it keeps to the instructions that the stages keep to, and says so first"
        return SimpleNamespace(stream=lambda q, max_new_tokens: [q, " ", folder.name, f" {compute.threads}"])

    runtime.load = load
    monkeypatch.setitem(sys.modules, "q2t.deployment.runtime", runtime)
    monkeypatch.setattr("q2t.determinism.seed_everything", lambda seed, compute: seeded.append(compute.dtype))
    assert cli.main(["ask", "why?", "--model", str(tmp_path), "--threads", "1"]) == 0
    assert capsys.readouterr().out == f"why? {tmp_path.name} 1\n"


def test_ask_without_a_model_says_how_to_get_one(here, capsys):
    assert cli.main(["ask", "why?"]) == 2
    message = capsys.readouterr().err
    assert message == ("q2t: there is no model in models/int8: run `dvc repro` or `dvc pull models/int8`\n")


def test_a_folder_without_symbols_is_one_line(here, capsys):
    assert cli.main(["catalog", "nowhere"]) == 2
    message = capsys.readouterr().err
    assert "nowhere" in message and message.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["ask"], ["profile", "a", "b"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: q2t" in capsys.readouterr().err


def test_help_names_every_verb_and_imports_nothing_heavy():
    heavy = {
        "torch",
        "mlflow",
        "great_expectations",
        "transformers",
        "pydantic",
        "pandas",
        "dvc",
        "ruamel.yaml",
    }
    code = f"import sys, q2t.cli; print({heavy} & set(sys.modules)); q2t.cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("set()\n") and done.returncode == 0
    for verb in ("ablate", "ask", "catalog", "measure", "profile", "track"):
        assert f"\n    {verb} " in done.stdout
