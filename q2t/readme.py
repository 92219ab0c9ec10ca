"""The tables of README and docs, filled in from what git has under reports/. Run as: python -m q2t.readme."""

import json
import subprocess
from pathlib import Path

from q2t import ablation
from q2t.lockfile import SUMMARY
from q2t.report import publish
from q2t.report.summary import markdown_table

README = Path("README.md")
METHODS = Path("docs/distillation.md")
FULL = "reports/profiles/full.json"
"""The summary that a run of profile `full` left."""


def fill(readme: Path, name: str, text: str) -> None:
    """Replace what stands between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: the markers are missing, doubled or out of order; the file is left alone.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before = readme.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{readme}: needs one line {begin} and, below it, one line {end}")
    head, rest = before.split(begin)
    _, tail = rest.split(end)
    publish(readme, f"{head}{begin}\n{text}\n{end}{tail}")


def results(root: Path, path: str) -> str:
    """The table of a summary's models, and the commit that has it."""
    summary = json.loads((root / path).read_text(encoding="utf-8"))
    log = ["git", "log", "-1", "--format=%h", "--", path]
    commit = subprocess.run(log, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    return f"{markdown_table(summary)}\n\nMeasured at commit `{commit}`."


def main(root: Path = Path(".")) -> None:
    fill(root / README, "results", results(root, SUMMARY))
    fill(root / README, "full", results(root, FULL))
    fill(root / README, "ablations", ablation.controls(root))
    fill(root / README, "sizes", ablation.sizes(root))
    fill(root / METHODS, "methods", ablation.methods(root))


if __name__ == "__main__":
    main()
