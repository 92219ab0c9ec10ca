"""What a model costs: decoding speed, time to the first token, peak memory. Never part of the graph.

Each model is measured in a process of its own, so that none finds memory or threads that another left behind.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q2t.config import PARAMS, Compute, load
from q2t.determinism import seed_everything
from q2t.records import Problem, read_jsonl

if TYPE_CHECKING:
    from q2t.deployment.runtime import Runtime

QUESTIONS = Path("data/prompts/test.jsonl")
TIMINGS = Path("reports/timings.json")
REPEATS, TOKENS = 5, 64
"""Questions asked of each model, and tokens decoded for each, whether the model would have stopped or not."""


def measure(root: Path) -> list[dict[str, Any]]:
    """Measure the models of `evaluate.models` that are there.

    Returns:
        A row for each model, in the order of params.yaml: `model`, its name, and `measure_model`'s figures.

    Raises:
        ValueError: there are no test questions, or a model fails.
    """
    params = load(root / PARAMS)
    if not (root / QUESTIONS).is_file():
        raise ValueError(f"{QUESTIONS} is missing: run `dvc repro` or `dvc pull data/prompts`")
    problems = read_jsonl(root / QUESTIONS, Problem)
    spread = problems[:: max(1, len(problems) // REPEATS)][:REPEATS]  # the families are shuffled
    rows = []
    for name, folder in params.evaluate.models.items():
        if not (root / folder / "config.json").is_file():  # not built yet, or a pointer to an endpoint
            print(f"skipped {name}: there is no model in {folder}", file=sys.stderr)
            continue
        try:
            figures = measure_model(root / folder, params.compute, [problem.question for problem in spread])
        except ValueError as error:
            raise ValueError(f"evaluate.models.{name}: {error}") from None
        rows.append({"model": name, **figures})
    return rows


def measure_model(folder: Path, compute: Compute, questions: Sequence[str]) -> dict[str, float]:
    """Measure the torch or ONNX model in `folder`, in a fresh process and at batch size 1.

    Returns:
        tokens_per_second: of decoding, the first token apart; median over the questions.
        first_token_ms: from question to first token, with tokenization; median.
        peak_memory_mb: of the process, with the libraries that it loads; 10**6 bytes, main memory only.

    Raises:
        ValueError: the process failed.
    """
    given = {"compute": compute.model_dump(), "questions": list(questions)}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(folder.resolve())],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],  # where q2t is, installed or not
        env=os.environ | {"OMP_NUM_THREADS": str(compute.threads)},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ValueError(f"the model in {folder} can't be measured: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(folder: Path, compute: Compute, questions: Sequence[str]) -> dict[str, float]:
    seed_everything(0, compute)  # threads and instructions are those of the stages; before what reads them is loaded

    from q2t.deployment.runtime import load

    runtime = load(folder, compute)
    _ask(runtime, questions[0])  # warm-up: allocators, kernels that are chosen at first use
    first, rest = zip(*(_ask(runtime, question) for question in questions), strict=True)
    return {
        "tokens_per_second": round(TOKENS / statistics.median(rest), 2),
        "first_token_ms": round(1000 * statistics.median(first), 2),
        "peak_memory_mb": peak_memory_mb(),
    }


def _ask(runtime: "Runtime", question: str) -> tuple[float, float]:
    """Seconds until the first token, and for the TOKENS after it."""
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        ids = runtime.tokenizer(runtime.prompt(question), add_special_tokens=False, return_tensors="pt").input_ids
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
        logits, past = runtime.engine(ids, mask, positions, None)
        ids = logits.argmax(-1)[:, None].cpu()  # and waits for a GPU
        first = time.perf_counter()
        for _ in range(TOKENS):
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
            logits, past = runtime.engine(ids, mask, positions, past)
            ids = logits.argmax(-1)[:, None].cpu()
        return first - start, time.perf_counter() - first


def machine() -> str:
    """What the timings were taken on: they differ elsewhere. The instructions are those that it has; in float32 stages
    keep to AVX2 (`q2t.determinism`)."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    cards = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    wide = any("avx512f" in line.split() for line in lines if line.startswith("flags"))
    level = "AVX512" if wide else torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores of {processor} ({level}){cards}, torch {torch.__version__}"


def peak_memory_mb() -> float:
    """The most main memory that this process has held, in 10**6 bytes.

    On Linux not from getrusage, which begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        peak = int(line.split()[1]) * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    return round(peak / 1e6, 1)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    figures = _measure_here(Path(sys.argv[1]), Compute(**request["compute"]), request["questions"])
    print(json.dumps(figures, sort_keys=True))
