import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from q2t.records import Completion, dump_line, read_jsonl, write_jsonl
from q2t.teachers.journal import Journal


def row(number: int, text: str = "") -> Completion:
    return Completion(
        id=f"{number:016x}",
        problem_id="p",
        teacher="t",
        sample=number,
        text=text or f"R = 4.7 kΩ\u2028line {number}\n" * (1 + number % 40),
        finish_reason="stop",
        prompt_tokens=1,
        completion_tokens=2,
        settings={"seed": 0},
    )


ROWS = [row(number) for number in range(300)]

WRITER = """
import sys
from pathlib import Path
from q2t.records import Completion, read_jsonl
from q2t.teachers.journal import Journal
journal = Journal(Path(sys.argv[1]))
for row in read_jsonl(Path(sys.argv[2]), Completion):
    if row.id not in journal.rows:
        journal.append([row])
        print(row.id, flush=True)
"""


def start_writer(journal: Path, rows: Path) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(journal), str(rows)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_what_another_process_wrote_first_is_everyones(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    ours, theirs = Journal(path), Journal(path)
    theirs.append([row(1, "first"), row(2, "theirs")])
    ours.append([row(1, "second"), row(3, "ours")])
    theirs.append([row(3, "too late")])
    assert ours.rows == theirs.rows | ours.rows == Journal(path).rows
    assert [r.text for r in read_jsonl(path, Completion)] == ["first", "theirs", "ours"]


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.append(ROWS[:3])
    journal.append([ROWS[1], row(1, "another text"), ROWS[3], row(3, "another text")])
    journal.append([])
    assert list(journal.rows.values()) == ROWS[:4]
    assert list(Journal(path).rows.values()) == ROWS[:4] == read_jsonl(path, Completion)


def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    asked, path = tmp_path / "rows.jsonl", tmp_path / "journal.jsonl"
    write_jsonl(asked, ROWS)
    rng = random.Random(0)
    acknowledged: set[str] = set()
    kills = 0
    while True:
        writer = start_writer(path, asked)
        assert writer.stdout is not None
        if kills < 5:
            for _ in range(rng.randint(1, 40)):  # so that it is killed while it writes
                acknowledged.add(writer.stdout.readline().strip())
            time.sleep(rng.random() * 0.003)
            writer.send_signal(signal.SIGKILL)
            kills += 1
        acknowledged.update(line.strip() for line in writer.stdout if line.endswith("\n"))
        finished = writer.wait() == 0
        assert acknowledged - {""} <= set(Journal(path).rows)
        if finished:
            break
    assert kills == 5
    assert path.read_bytes() == asked.read_bytes()


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_half_written_line_is_cut_off_before_the_next_is_written(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = tmp_path / "journal.jsonl", tmp_path / "whole.jsonl"
    write_jsonl(whole, ROWS[:4])
    path.write_bytes(whole.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING):
        journal = Journal(path)
    assert journal.skipped == 1 and "skipped 1" in caplog.text
    assert list(journal.rows.values()) == ROWS[:3]
    journal.append(ROWS[:4])
    assert path.read_bytes() == whole.read_bytes()


def test_a_half_written_first_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"x" * 200_000)
    Journal(path).append(ROWS[:1])
    assert read_jsonl(path, Completion) == ROWS[:1]


def test_malformed_lines_lose_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [dump_line(r).encode() for r in ROWS[:3]]
    bad = [b"{}", b"\x00" * 50, b"\xff\xfe", lines[0][:-9], b""]
    path.write_bytes(b"\n".join([lines[0], *bad, lines[1]]) + b"\n")
    journal = Journal(path)
    assert journal.skipped == len(bad)
    journal.append([ROWS[2]])
    assert list(Journal(path).rows.values()) == ROWS[:3]
    assert bad[3] in path.read_bytes()  # nobody's line is deleted: a newer q2t may be able to read it


def test_another_process_killed_while_we_are_open_costs_us_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(ROWS[:1])
    with path.open("ab") as other:
        other.write(dump_line(ROWS[1]).encode()[:50])
    journal.append([ROWS[2]])
    assert list(Journal(path).rows.values()) == [ROWS[0], ROWS[2]]


def test_two_processes_and_several_threads_keep_their_lines_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    halves = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(halves[0], ROWS[:60])
    write_jsonl(halves[1], ROWS[60:120])
    writers = [start_writer(path, half) for half in halves]
    journal = Journal(path)
    threads = [threading.Thread(target=journal.append, args=([r],)) for r in ROWS[120:160]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert {r.id: r for r in read_jsonl(path, Completion)} == {r.id: r for r in ROWS[:160]}


def test_seeding_takes_over_what_is_new(tmp_path: Path) -> None:
    published = tmp_path / "expert.jsonl"
    write_jsonl(published, ROWS[:10])
    published.write_bytes(published.read_bytes() + b"half a line")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(ROWS[5:7])
    assert journal.seed(published) == 8
    assert journal.seed(published) == 0
    assert {r.id: r for r in Journal(journal.path).rows.values()} == {r.id: r for r in ROWS[:10]}
    with pytest.raises(FileNotFoundError):
        journal.seed(tmp_path / "missing.jsonl")


FULL = """
import resource, sys
from pathlib import Path
from q2t.records import Completion, read_jsonl
from q2t.teachers.journal import Journal
path, rows = Path(sys.argv[1]), read_jsonl(Path(sys.argv[2]), Completion)
journal = Journal(path)
journal.append(rows[:3])
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, resource.RLIM_INFINITY))
try:
    journal.append(rows[3:5])
except OSError as error:
    print(error)
    assert list(journal.rows.values()) == rows[:3]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(Journal(path).rows.values()) == rows[:3] == read_jsonl(path, Completion)
    journal.append(rows[3:5])
    assert read_jsonl(path, Completion) == rows
else:
    sys.exit("no error")
"""


def test_a_file_that_may_grow_no_further_keeps_its_rows(tmp_path: Path) -> None:
    asked = tmp_path / "rows.jsonl"
    write_jsonl(asked, ROWS[:5])
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "journal.jsonl"), str(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert "could not add 2 answers" in done.stdout and "The 3 before them are kept" in done.stdout


def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(ROWS[:2])
    before = journal.path.read_bytes()
    write = os.write

    def fill_up(file: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fill_up)
        with pytest.raises(OSError, match="No space left on device: could not add 1 answers") as caught:
            journal.append([ROWS[2]])
    assert caught.value.errno == errno.ENOSPC
    assert journal.path.read_bytes() == before
    journal.append([ROWS[2]])
    assert list(Journal(journal.path).rows.values()) == ROWS[:3]


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    path = tmp_path / "journal.jsonl"
    Journal(path).append(ROWS[:3])
    assert read_jsonl(path, Completion) == ROWS[:3]
