"""The `q2t` command. Every verb imports what it needs itself, so that `q2t --help` starts at once."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ANSWER = 512
"""Tokens after which `q2t ask` stops a model that does not."""


def catalog(arguments: argparse.Namespace) -> None:
    from q2t.capability.electronics import catalog

    parts, dropped = catalog.build(arguments.symbols)
    catalog.write(parts, dropped, arguments.out)
    print(f"{len(parts)} parts, {len(dropped)} dropped: {arguments.out}")


def profile(arguments: argparse.Namespace) -> None:
    from q2t.config import PARAMS
    from q2t.profile import apply

    edited = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", PARAMS], capture_output=True).returncode == 1
    changed = apply(arguments.name)
    if edited:
        print(
            f"{PARAMS} was not the last commit's: what it said elsewhere stays. `git checkout {PARAMS}` before "
            f"`q2t profile {arguments.name}` gives the profile alone.",
            file=sys.stderr,
        )
    print("\n".join(f"changed {path}" for path in changed) or "params.yaml has these values already")


def track(arguments: argparse.Namespace) -> None:
    from q2t.tracking import track

    print(f"MLflow run {track(rev=arguments.rev)}")


def measure(arguments: argparse.Namespace) -> None:
    from q2t.evaluation import cost
    from q2t.records import write_json
    from q2t.report import publish, template
    from q2t.tracking import log_timings

    models = cost.measure(Path("."))
    print(table([knowledge(row["model"]) | row for row in models]))
    stages = log_timings(models)
    if stages:
        print(f"\n{table(stages)}")
    timings = {"machine": cost.machine(), "models": models, "stages": stages}
    write_json(cost.TIMINGS, timings)
    publish(cost.TIMINGS.with_suffix(".html"), template("timings.html.j2").render(timings))


def knowledge(model: str, summary: Path = Path("reports/summary.json")) -> dict[str, Any]:
    """What the report says of a model: the columns beside its cost."""
    models = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    known = {key: models.get(model, {}).get(key) for key in ("accuracy", "retention", "parameters", "bytes")}
    size = known.pop("bytes")
    return {"model": model, **known, "megabytes": size / 1e6 if size else None}


def ablate(arguments: argparse.Namespace) -> None:
    from q2t import ablation

    ablation.run(arguments.name)
    print("\n\n".join([ablation.controls(), ablation.methods(), ablation.seeds(), ablation.sizes()]))


def ask(arguments: argparse.Namespace) -> None:
    if not arguments.model.is_dir():
        raise ValueError(f"there is no model in {arguments.model}: run `dvc repro` or `dvc pull {arguments.model}`")
    from q2t.config import Compute
    from q2t.determinism import seed_everything

    compute = Compute(threads=arguments.threads, dtype="float32", device="cpu")
    seed_everything(0, compute)  # threads, and the instructions that `evaluate` keeps to, for the same words
    from q2t.deployment.runtime import load

    runtime = load(arguments.model, compute)
    for piece in runtime.stream(arguments.question, max_new_tokens=ANSWER):
        print(piece, end="", flush=True)
    print()


def count(text: str) -> int:
    """A number of things, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text in columns; numbers to four digits, nothing where a row has no value."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="q2t", description="Keep one capability of a large model in a small one.")
    verbs = main.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(run.__name__, help=help, description=help)
        made.set_defaults(run=run)
        return made

    made = verb(ablate, "Run experiments of q2t/ablations.yaml, and print what they come to.")
    made.add_argument("name", nargs="*", metavar="NAME", help="(default: all)")

    made = verb(ask, "Ask a model, and print its answer as it comes.")
    made.add_argument("question")
    made.add_argument("--model", type=Path, default=Path("models/int8"), help="model folder (default: %(default)s)")
    made.add_argument("--threads", type=count, default=2, help="CPU threads (default: %(default)s)")

    made = verb(catalog, "Read the parts catalogue anew from KiCad's symbol libraries.")
    made.add_argument("symbols", type=Path, metavar="SYMBOLS", help="folder of .kicad_sym files")
    made.add_argument("--out", type=Path, default=Path("data/catalog"), help="(default: %(default)s)")

    verb(measure, "Time the models, and print what each costs beside what it knows, then what the stages took.")

    made = verb(profile, "Merge a profile into params.yaml.")
    made.add_argument("name", metavar="NAME")

    made = verb(track, "Show the pipeline's result in MLflow; doing it again changes nothing.")
    made.add_argument("--rev", help="commit, tag, branch or DVC experiment (default: the workspace)")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. What a user can put right is one line and status 2."""
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError) as error:
        print(f"q2t: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
