"""What stored labels cost: `python benchmarks/labels.py` in a repository whose quickstart has run

writes benchmarks/results/labels.json, and the table in docs/distillation.md from it.

    write, read    labels.parquet by q2t, against as many bytes by one plain write and fsync, or read
    start          three times from `dvc exp run -S distill.temperature=...` until the student's first batch, where it
                   is stopped: DVC's look at the graph, its copy of the workspace, imports, models, labels
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from q2t.distillation import labels
from q2t.evaluation.cost import machine
from q2t.readme import fill
from q2t.records import write_json
from q2t.store import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
LABELS = ROOT / "data/soft_labels/labels.parquet"
RESULTS = ROOT / "benchmarks/results/labels.json"
REPEATS = 5
NAME, TRACKING = "benchmark-start", ".q2t/benchmark.db"


def seconds(call: Callable[[], Any]) -> float:
    def once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(REPEATS))


def plain(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def start(temperature: float) -> float:
    """Seconds until training starts at a temperature that no run had before."""
    dvc = [sys.executable, "-m", "dvc", "exp"]
    sets = [f"distill.temperature={temperature}", f"tracking.uri=sqlite:///{TRACKING}"]
    command = [*dvc, "run", "--temp", "-n", NAME, "-S", sets[0], "-S", sets[1], "-s", "distill"]
    before = set((ROOT / ".q2t/distill").glob("*"))
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr
        try:
            said = b""
            while b"train:   0%" not in said:
                piece = os.read(process.stderr.fileno(), 1 << 16)
                assert piece, said.decode()
                said += piece
            return time.perf_counter() - began
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.stderr.read()
            process.wait()
            subprocess.run([*dvc, "remove", NAME], cwd=ROOT, capture_output=True)
            for left in set((ROOT / ".q2t/distill").glob("*")) - before:
                shutil.rmtree(left)


@contextmanager
def database() -> Iterator[None]:
    """MLflow's, apart from the user's runs. Who has run the pipeline has one: making it, seconds of its own, isn't part
    of a start."""
    os.environ.update(ENVIRONMENT | os.environ)  # read when mlflow is imported
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{ROOT / TRACKING}").search_experiments()
    try:
        yield
    finally:
        for left in (ROOT / TRACKING).parent.glob(f"{Path(TRACKING).stem}*"):
            left.unlink()


def main() -> None:
    rows, content = labels.read(LABELS), LABELS.read_bytes()
    k = rows[0].top_ids.shape[1]
    tokens = sum(len(row.top_ids) for row in rows)
    with tempfile.TemporaryDirectory(dir=ROOT / ".q2t") as folder:
        path = Path(folder) / "labels.parquet"
        took = {
            "write": seconds(lambda: labels.write(path, rows, top_k=k, teachers={})),
            "write_plain": seconds(lambda: plain(path.with_suffix(".plain"), content)),
            "read": seconds(lambda: labels.read(path)),
            "read_plain": seconds(path.read_bytes),
        }
    with database():
        starts = [round(start(1.0 + place / 64), 1) for place in (1, 3, 5)]
    found = {
        "machine": machine(),
        "rows": len(rows),
        "top_k": k,
        "labelled_tokens": tokens,
        "bytes": len(content),
        "bytes_per_token": len(content) / tokens,
        "milliseconds": {name: round(1000 * value, 1) for name, value in took.items()},
        "start_seconds": starts,
    }
    write_json(RESULTS, found)
    fill(ROOT / "docs/distillation.md", "labels", table(found))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    took, starts = found["milliseconds"], found["start_seconds"]
    tokens = f"{found['labelled_tokens']:,} labelled tokens at k = {found['top_k']}"
    lines = [
        f"{found['rows']:,} rows, {tokens}, on {found['machine']}:",
        "",
        "| What | Figure |",
        "|:--|--:|",
        f"| bytes a token | {found['bytes_per_token']:.0f} |",
        f"| written; the same bytes by one write and fsync | {took['write']:.0f} ms; {took['write_plain']:.0f} ms |",
        f"| read; the same bytes out of the page cache | {took['read']:.0f} ms; {took['read_plain']:.0f} ms |",
        f"| until the first batch at another temperature | {min(starts):.0f} to {max(starts):.0f} s |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
