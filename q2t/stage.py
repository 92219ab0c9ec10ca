"""What every stage does around its work: say what went wrong in one line, and know where to resume from."""

import errno
import gc
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from q2t.config import Compute

DONE, DELETED = ".done", ".deleted"
"""End the name of a folder of checkpoints whose stage has published its outs, and of one that is being deleted."""


def run(main: Callable[[], None]) -> None:
    """Run a stage. What a user can put right is one clear message and status 1; a bug keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It prints a traceback of what tracking says in one line, a full disk for example.
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)
    # Imports are most of a short stage, and make a million objects that stay, among which Python would look for garbage
    # again and again. What is garbage later are small objects, and no tensors.
    gc.set_threshold(100_000, 20, 100)
    message = None
    if is_main():
        _forget_recorded()
    try:
        main()
    except ValueError as error:
        message = str(error)
    except Exception as error:
        if not _no_room(error):
            raise
        reason = str(error).partition("\n")[0]
        message = f"no room on the disk; make some and run again, it goes on from there: {reason}"
    if message is not None:  # said when the error is gone, and with it open progress bars
        sys.exit(f"{Path(sys.argv[0]).stem}: {message}")


def _no_room(error: Exception) -> bool:
    """Python gives an errno, safetensors and tokenizers one in their text, and torch none."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    told = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return code in codes or shutil.disk_usage(root()).free < 2**20


def root() -> Path:
    """The repository that keeps what outlives a run: the parent's where DVC runs a queued experiment."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def is_main() -> bool:
    """Whether this is the one process that publishes and tracks; torchrun numbers those that it starts."""
    return os.environ.get("RANK", "0") == "0"


def own_device(compute: Compute) -> str:
    """Where this process computes: with several GPUs, on the one that torchrun counts for it."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if compute.device == "cuda" else compute.device


@contextmanager
def checkpoints(stage: str) -> Iterator[Path]:
    """The folder of this stage's checkpoints: outside its outs, which DVC deletes before every run.

    The name is a hash of the stage's inputs as DVC sees them, so that a checkpoint is never resumed by another
    run than the one that was interrupted. Once the block, which publishes the outs, is through, the folder is marked
    as done and stays until another stage begins: killed before it has recorded the outs, DVC deletes them, and runs
    the stage again from here. So does `dvc repro --force` of the stage that ran last.
    """
    from q2t.lockfile import entry_before, inputs_key

    folder = root() / ".q2t" / stage / inputs_key(stage, entry_before(stage, Path(".")))[:16]
    done = folder.with_suffix(DONE)
    if is_main():
        with suppress(FileNotFoundError):
            os.replace(done, folder)
        for other in list(folder.parent.glob(f"*{DONE}")):
            _delete(other)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if is_main():
        os.replace(folder, done)


def _forget_recorded() -> None:
    """Delete the checkpoints of other stages that are done: DVC begins a stage when it has recorded those before."""
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]  # behind dvc.yaml's path, from another folder
    if not stage:
        return  # started by hand: what DVC has recorded is not known
    work = root() / ".q2t"
    for folder in [*work.glob(f"*/*{DELETED}"), *work.glob(f"*/*{DONE}")]:
        if folder.parent.name != stage:
            _delete(folder)


def _delete(folder: Path) -> None:
    """By rename first, so that what a kill leaves half-deleted is no checkpoint."""
    deleted = folder.with_suffix(DELETED)
    with suppress(OSError):  # a stage of a queued experiment, which may run beside, deletes it too
        os.replace(folder, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def published(out: str, *, needed: bool) -> Path | None:
    """What dvc.lock's last run wrote as `out`, in DVC's cache; None if there was none or the cache hasn't it.

    DVC deletes an out before the stage runs, so this is where the stage finds what it wrote before.

    Raises:
        ValueError: it is needed, since it answers today's questions by today's teacher, and only a remote can have it.
    """
    from q2t.lockfile import LOCK, cached, entry_before, out_hashes, read_yaml

    lock = Path(LOCK)
    stages = read_yaml(lock.read_text(encoding="utf-8"), LOCK)["stages"] if lock.is_file() else {}
    stage, md5 = next(((n, h) for n, entry in stages.items() if (h := out_hashes({n: entry}).get(out))), ("", ""))
    found = cached(md5) if md5 else None
    if md5 and not found and needed and _asked(stages[stage]) == _asked(entry_before(stage, Path("."))):
        raise ValueError(
            f"{LOCK} names {out}, which DVC's cache lacks, and its answers would be paid for again: "
            f"`dvc pull {out}` first, or take its stage out of {LOCK} to ask anew"
        )
    return found


def _asked(entry: dict[str, Any]) -> list[Any]:
    """What a server's answers hang on: not where our side computes, how many are asked for, or how many at a time, and
    not every byte of the pointer's folder, which may name the key's variable anew."""
    params = entry["params"]["params.yaml"]
    (teacher,) = (value for key, value in params.items() if key.startswith("teachers."))
    pointer = Path(teacher["model"])
    deps = {dep["path"]: dep["md5"] for dep in entry["deps"] if not dep["path"].endswith(".py")}
    return [
        {path: md5 for path, md5 in deps.items() if Path(path) != pointer},
        params["seed"],
        {key: value for key, value in teacher.items() if key not in ("samples", "batch_size")},
    ]
