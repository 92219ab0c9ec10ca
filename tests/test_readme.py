"""The README's tables: replaced between their markers, and in the repository up to date."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from q2t import ablation
from q2t.lockfile import SUMMARY
from q2t.readme import RUN, fill, full, results, times

ROOT = Path(__file__).resolve().parents[1]


def test_filling_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# q2t\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nMore.\n")
    fill(readme, "results", "new")
    once = readme.read_text()
    assert once == "# q2t\n<!-- results:begin -->\nnew\n<!-- results:end -->\n\nMore.\n"
    fill(readme, "results", "new")
    assert readme.read_text() == once


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- results:end -->\n<!-- results:begin -->", "<!-- results:begin -->"]
)
def test_a_readme_without_markers_is_left_alone(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="results:begin"):
        fill(readme, "results", "new")
    assert readme.read_text() == text


def test_a_table_of_another_run_than_its_commit_is_refused(tmp_path):
    for path in (SUMMARY, RUN):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    assert results(tmp_path) == results(ROOT)
    (tmp_path / SUMMARY).write_text((ROOT / SUMMARY).read_text().replace("0", "1", 1))
    with pytest.raises(ValueError, match="quickstart.run.json is of another run than reports/summary.json"):
        results(tmp_path)


def test_the_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for table in (
        results(ROOT),
        full(ROOT),
        times(ROOT),
        ablation.controls(ROOT),
        ablation.sizes(ROOT),
        ablation.seeds(ROOT),
    ):
        assert table.strip() in readme, "run `make readme`"
    methods = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    assert ablation.methods(ROOT).strip() in methods, "run `make readme`"


@pytest.mark.parametrize(
    "benchmark, render, results, document",
    [
        ("decoding", "table", "decoding", "README.md"),
        ("labels", "table", "labels", "docs/distillation.md"),
        ("methods", "table", "methods", "docs/distillation.md"),
        ("cross_tokenizer", "section", "cross_tokenizer", "docs/distillation.md"),
        ("training", "section", "training", "docs/distillation.md"),
        ("gpu", "section", "gpu", "docs/distillation.md"),
    ],
)
def test_documents_show_the_committed_benchmarks(benchmark, render, results, document, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text())
    assert getattr(import_module(benchmark), render)(found).strip() in (ROOT / document).read_text()


def test_every_method_lowers_its_own_loss_and_the_divergence_from_the_teacher(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = json.loads((ROOT / "benchmarks/results/methods.json").read_text())
    assert found.keys() == import_module("methods").METHODS.keys()
    for row in found.values():
        assert row["loss_last"] < row["loss_first"] and row["kl_after"] < row["kl_before"]


def test_the_document_shows_what_the_reference_case_needs_now(monkeypatch):
    """Computed from the profile and from what the GPU gave: nothing is stored in between."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert import_module("reference").section() in (ROOT / "docs/distillation.md").read_text()
