"""The tables of README and docs, filled in from what git has under reports/. Run as: python -m q2t.readme."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from q2t import ablation
from q2t.lockfile import SUMMARY, md5
from q2t.report import publish
from q2t.report.summary import markdown_table

README = Path("README.md")
METHODS = Path("docs/distillation.md")
RUN, FULL_RUN = "reports/profiles/quickstart.run.json", "reports/profiles/full.times.json"
"""Which `commit` the committed run and that of profile `full` ran, and the MD5 of the `summary` that it left."""
FULL = "reports/profiles/full.json"
"""The summary of profile `full`."""
TIMES, BFLOAT16 = "reports/profiles/quickstart.times.json", "reports/profiles/bfloat16.times.json"
"""What `q2t measure` found after a run of the quickstart, in float32 and in bfloat16, with the `commit` that it ran; in
float32 `models_commit` is the one that timed the models."""


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


def results(root: Path, summary: str = SUMMARY, run: str = RUN) -> str:
    """The table of the committed run's models, and the commit that it ran.

    Raises:
        ValueError: the commit is another run's.
    """
    ran, found = _read(root, run), md5(root / summary)
    if ran["summary"] != found:
        raise ValueError(f"{run} is of another run than {summary}: write there the `commit` that ran and {found}")
    return f"{markdown_table(_read(root, summary))}\n\nRun at commit `{ran['commit']}`."


def full(root: Path) -> str:
    """As `results`, of profile `full`."""
    return results(root, FULL, FULL_RUN)


def _read(root: Path, path: str) -> Any:
    return json.loads((root / path).read_text(encoding="utf-8"))


def times(root: Path) -> str:
    """What the stages of the committed run took, and those of one in bfloat16, and what the former's models cost."""
    measured, other = _read(root, TIMES), _read(root, BFLOAT16)
    (minutes, memory), (faster, _) = _stages(measured), _stages(other)
    commits = f"at commit `{measured['commit']}`, models at `{measured['models_commit']}`"
    lines = [f"On {measured['machine']}, {commits};"]
    lines += [f"bfloat16 on {other['machine']}, at commit `{other['commit']}`:", ""]
    lines += ["| Stage | Minutes | Peak memory | Minutes in bfloat16 |", "|:--|--:|--:|--:|"]
    for stage, taken in minutes.items():
        short = f"{faster[stage]:.1f}" if stage in faster else "–"
        lines.append(f"| {stage} | {taken:.1f} | {memory[stage] / 1000:.1f} GB | {short} |")
    most = f"{max(memory.values()) / 1000:.1f} GB"
    lines += [f"| together | {sum(minutes.values()):.0f} | {most} | {sum(faster.values()):.0f} |", ""]
    lines += ["| Model | Tokens a second | First token | Peak memory |", "|:--|--:|--:|--:|"]
    for row in measured["models"]:
        speed = f"{row['tokens_per_second']:.0f} | {row['first_token_ms']:.0f} ms"
        lines.append(f"| {row['model']} | {speed} | {row['peak_memory_mb']:.0f} MB |")
    return "\n".join(lines)


def _stages(measured: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Minutes of the stages, those of one name together, and the most memory, in MB, that one of them had."""
    minutes: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for row in measured["stages"]:
        stage = row["stage"].partition("@")[0]
        minutes[stage] += row["minutes"]
        memory[stage] = max(memory[stage], row["peak_memory_mb"])
    return minutes, memory


def main(root: Path = Path(".")) -> None:
    fill(root / README, "results", results(root))
    fill(root / README, "times", times(root))
    fill(root / README, "full", full(root))
    fill(root / README, "ablations", ablation.controls(root))
    fill(root / README, "sizes", ablation.sizes(root))
    fill(root / README, "seeds", ablation.seeds(root))
    fill(root / METHODS, "methods", ablation.methods(root))


if __name__ == "__main__":
    main()
