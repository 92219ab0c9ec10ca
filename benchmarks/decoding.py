"""Our runtime against transformers' own `generate`, on one batch: a model's sampled answers to a task's questions.

    OMP_NUM_THREADS=2 python benchmarks/decoding.py models/teacher data/prompts/questions.jsonl

prints one line of JSON. Both sample from the same prompts and stop at the same token; what they draw differs, so
that tokens a second is the figure to compare. Core seconds count what this process computed; they hold where others
use the machine too.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from q2t.config import Compute
from q2t.deployment.runtime import Request, load

SAMPLING = {"temperature": 0.7, "top_p": 0.95}


def measure(decode: Callable[[], list[int]]) -> dict[str, float]:
    """Speed of one call, which returns the number of tokens of every answer."""
    wall, core = time.perf_counter(), time.process_time()
    lengths = decode()
    wall, core = time.perf_counter() - wall, time.process_time() - core
    return {
        "answers_per_second": round(len(lengths) / wall, 2),
        "tokens_per_second": round(sum(lengths) / wall, 1),
        "tokens_per_core_second": round(sum(lengths) / core, 1),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("problems", type=Path, help="problems, JSON Lines")
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--samples", type=int, default=4, help="answers to each question")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()

    compute = Compute(threads=torch.get_num_threads(), dtype=given.dtype, device="cpu")
    runtime = load(given.model, compute)
    lines = given.problems.read_text(encoding="utf-8").splitlines()[: given.answers // given.samples]
    prompts = [runtime.prompt(json.loads(line)["question"]) for line in lines for _ in range(given.samples)]

    def ours() -> list[int]:
        requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        batches = runtime.generate(requests, max_new_tokens=given.max_new_tokens, batch_size=len(prompts), **SAMPLING)
        return [answer.completion_tokens for batch in batches for _, answer in batch]

    def theirs() -> list[int]:
        batch = runtime.tokenizer(prompts, return_tensors="pt", padding=True)
        torch.manual_seed(0)
        tokens = model.generate(**batch, max_new_tokens=given.max_new_tokens, do_sample=True, top_k=0, **SAMPLING)[
            :, batch.input_ids.shape[1] :
        ]
        ended = tokens == runtime.tokenizer.eos_token_id
        # The end counts as a token; what follows it is padding.
        return (ended.cumsum(-1) - ended.int() == 0).sum(-1).tolist()

    measured = {"runtime": measure(ours)}
    model = runtime.engine.model
    model.set_attn_implementation("sdpa")
    measured["transformers"] = measure(theirs)
    speedup = {
        name: round(measured["runtime"][name] / measured["transformers"][name], 2)
        for name in ("tokens_per_second", "tokens_per_core_second")
    }
    settings = {"model": given.model.name, "answers": len(prompts), "samples": given.samples}
    settings |= {"max_new_tokens": given.max_new_tokens, **SAMPLING, **compute.model_dump()}
    print(json.dumps({"settings": settings, **measured, "speedup": speedup}))


if __name__ == "__main__":
    main()
