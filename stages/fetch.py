"""Run as: python -m stages.fetch SOURCE. The pinned model of that name in params.yaml -> models/sources/SOURCE."""

import sys
from pathlib import Path

from q2t.capability.general import PROMPTS
from q2t.config import load
from q2t.sources import fetch
from q2t.stage import root, run
from q2t.tracking import stage_run


def main() -> None:
    name = sys.argv[1]
    source = load().sources[name]
    if source.path:  # of the repository, and not of the copy in which DVC runs an experiment
        source = source.model_copy(update={"path": str(root() / source.path)})
    with stage_run(f"fetch@{name}"):
        fetch(name, source, Path("models/sources") / name, corpus=PROMPTS)


if __name__ == "__main__":
    run(main)
