"""The journal of answers: what a teacher has said is on the disk at once, and is never asked again."""

import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from q2t.records import Completion, dump_line

log = logging.getLogger(__name__)


class Journal:
    """An append-only JSON Lines file of completions, keyed by `Completion.id`.

    A process killed at any moment loses no acknowledged row, and at most the rows it was writing. Processes
    (queued experiments) may share a journal: a lock file beside it keeps their lines apart. Threads may share
    the object.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there. Lines that are no completion are skipped with a warning, and so asked again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = FileLock(f"{path}.lock")
        self._threads = threading.Lock()
        self.rows: dict[str, Completion] = {}
        """By id; of several rows with one id the first."""
        self.skipped = 0
        """Lines that could not be read."""
        self._end = 0
        """Of the lines that are known."""
        if path.exists():
            with self._lock:
                self.rows, self.skipped, self._end = _read(path)
            _warn(path, self.skipped)

    def append(self, rows: Iterable[Completion]) -> None:
        """Write the rows whose ids are new, to other processes too. When this returns they are on the disk.

        Raises:
            OSError: not written, the disk is full for example. The journal holds what it held before.
        """
        with self._threads, self._lock:
            self._catch_up()
            new: dict[str, Completion] = {}
            for row in rows:
                if row.id not in self.rows:
                    new.setdefault(row.id, row)
            if not new:
                return
            lines = "".join(dump_line(row) + "\n" for row in new.values()).encode()
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                self._end = _write(file, lines)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}: could not add {len(new)} answers to the journal. "
                    f"The {len(self.rows)} before them are kept; make room and run again",
                    str(self.path),
                ) from error
            finally:
                os.close(file)
            self.rows.update(new)

    def seed(self, published: Path) -> int:
        """Take over the answers of a generations file published earlier; the number of new ones."""
        before = len(self.rows)
        rows, skipped, _ = _read(published)
        _warn(published, skipped)
        self.append(rows.values())
        return len(self.rows) - before

    def _catch_up(self) -> None:
        """Take in what other processes have written since: their answers came first, and are everyone's."""
        if self.path.exists() and self.path.stat().st_size > self._end:
            others, _, self._end = _read(self.path, self._end)
            self.rows |= others


def _read(path: Path, start: int = 0) -> tuple[dict[str, Completion], int, int]:
    """The rows by id from an offset on, the number of lines skipped, and the offset behind the last whole one."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read()
    *lines, tail = content.split(b"\n")
    rows: dict[str, Completion] = {}
    skipped = 1 if tail else 0  # without its newline a line was never acknowledged
    for line in lines:
        try:
            row = Completion.model_validate_json(line)
        except ValidationError:
            skipped += 1
        else:
            rows.setdefault(row.id, row)
    return rows, skipped, start + len(content) - len(tail)


def _warn(path: Path, skipped: int) -> None:
    if skipped:
        log.warning("%s: skipped %d half-written or malformed lines; those answers are asked again", path, skipped)


def _write(file: int, lines: bytes) -> int:
    """Append and sync, and give the file's new end. A half-written last line goes first, and a failed write leaves
    nothing behind."""
    end = _end_of_lines(file)
    os.ftruncate(file, end)
    try:
        written = 0
        while written < len(lines):
            written += os.write(file, lines[written:])
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise
    return end + len(lines)


def _end_of_lines(file: int) -> int:
    """The offset behind the last newline, 0 if there is none."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        os.lseek(file, start, os.SEEK_SET)
        newline = os.read(file, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
