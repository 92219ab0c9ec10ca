"""What every stage does around its work: say what went wrong in one line, and know where to resume from."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> None:
    """Run a stage. What a user can put right is one clear message and status 1; a bug keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def root() -> Path:
    """The repository that keeps what outlives a run: the parent's where DVC runs a queued experiment."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def working_folder(stage: str) -> Path:
    """Where this stage keeps its checkpoints: outside its outs, which DVC deletes before every run.

    The name is a hash of the stage's inputs as DVC sees them, so that a checkpoint is never resumed by another
    run than the one that was interrupted. Delete it once the outs are published.
    """
    from q2t.lockfile import entry_before, inputs_key

    return root() / ".q2t" / stage / inputs_key(stage, entry_before(stage, Path(".")))[:16]
