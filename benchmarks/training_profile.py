"""Where the time of a training step goes on a CPU, and whether torch.compile saves any of it.

    OMP_NUM_THREADS=2 python benchmarks/training_profile.py

writes benchmarks/results/training_profile.json, in about 4 minutes; torch.compile needs a C++ compiler. Model, rows and
settings are those of benchmarks/training.py, whose measurement `q2t_kd` this is: as it is, with its decoder layers
compiled, and under torch.profiler. Speeds are of the second of two epochs, seconds of both; shares are of operators'
own time in both, with the model's loading.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from training import BATCH, EPOCHS, make_labels, train_q2t

from q2t.distillation.labels import read
from q2t.evaluation.cost import machine
from q2t.records import write_json

RESULTS = Path("benchmarks/results/training_profile.json")
ROWS = 24
SMALLEST = 0.01
"""Operators of less than this share are left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    dtype = parser.parse_args().dtype
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # nothing that an earlier run compiled
        make_labels(folder, dtype)
        rows = read(folder / "labels.parquet")[:ROWS]

        def run(**how: Any) -> dict[str, float]:
            start = time.perf_counter()
            speed = train_q2t(folder, rows, True, dtype, **how)["tokens_per_second"]
            return {"tokens_per_second": speed, "seconds": round(time.perf_counter() - start, 1)}

        runs = {"eager": run(), "compiled": run(compiled=True), "eager again": run()}
        torch.compiler.reset()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            runs["profiled"] = run()
    events: Any = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: round(event.self_cpu_time_total / whole, 3) for event in events}
    results = {
        "machine": machine(),
        "dtype": dtype,
        "rows": ROWS,
        "steps": EPOCHS * ROWS // BATCH,
        "runs": runs,
        "share": {name: share for name, share in sorted(shares.items()) if share >= SMALLEST},
    }
    write_json(RESULTS, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
