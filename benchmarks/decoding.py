"""Ways to have a model answer in batches: `python benchmarks/decoding.py models/teacher data/prompts/questions.jsonl`

writes benchmarks/results/decoding.json, and the README's table from it. Every way samples from the same prompts and
stops at the same token; what they draw differs, so that tokens a second is the figure to compare. Core seconds count
what this process computed; they hold where others use the machine too.

    q2t, torch              the runtime that `generate` and `evaluate` use
    q2t, ONNX Runtime       the same with the model's float32 ONNX graph, which it takes for exported models
    transformers            its own generate, with fused attention
    optimum, ONNX Runtime   transformers' generate on the same ONNX graph
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from q2t.config import Compute
from q2t.deployment.onnx import export
from q2t.deployment.runtime import Request, Runtime, load
from q2t.determinism import seed_everything
from q2t.evaluation.cost import machine
from q2t.readme import fill
from q2t.records import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/decoding.json"
SAMPLING = {"temperature": 0.7, "top_p": 0.95}
OURS = "q2t, torch"


def measure(decode: Callable[[], list[int]]) -> dict[str, float]:
    """Speed of one call, which returns the number of tokens of every answer."""
    wall, core = time.perf_counter(), time.process_time()
    lengths = decode()
    wall, core = time.perf_counter() - wall, time.process_time() - core
    return {
        "tokens_per_second": round(sum(lengths) / wall, 1),
        "tokens_per_core_second": round(sum(lengths) / core, 1),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
    }


def with_runtime(runtime: Runtime, prompts: list[str], most: int) -> list[int]:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    batches = runtime.generate(requests, max_new_tokens=most, batch_size=len(prompts), **SAMPLING)
    return [answer.completion_tokens for batch in batches for _, answer in batch]


def with_generate(model: Any, tokenizer: Any, prompts: list[str], most: int) -> list[int]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    tokens = model.generate(**batch, max_new_tokens=most, do_sample=True, top_k=0, **SAMPLING)
    ended = tokens[:, batch.input_ids.shape[1] :] == tokenizer.eos_token_id
    # The end counts as a token; what follows it is padding.
    return (ended.cumsum(-1) - ended.int() == 0).sum(-1).tolist()


def table(found: dict[str, Any]) -> str:
    settings, ways = found["settings"], found["ways"]
    lines = [
        f"{settings['answers']} answers of `{settings['model']}` in one batch, {settings['samples']} to each question, "
        f"{settings['threads']} threads, {settings['dtype']}, on {settings['machine']}:",
        "",
        "| Engine | Tokens a second | Against q2t's |",
        "|:--|--:|--:|",
    ]
    for name in (OURS, "transformers", "q2t, ONNX Runtime", "optimum, ONNX Runtime"):
        speed = ways[name]["tokens_per_second"]
        lines.append(f"| {name} | {speed:.0f} | {speed / ways[OURS]['tokens_per_second']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("problems", type=Path, help="problems, JSON Lines")
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--samples", type=int, default=2, help="answers to each question")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the ways in torch; ONNX has float32")
    given = parser.parse_args()

    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    compute = Compute(threads=given.threads, dtype=given.dtype, device="cpu")
    seed_everything(0, compute)  # as `generate` does
    runtime = load(given.model, compute)
    tokenizer = runtime.tokenizer
    tokenizer.padding_side = "left"
    lines = given.problems.read_text(encoding="utf-8").splitlines()[: given.answers // given.samples]
    prompts = [runtime.prompt(json.loads(line)["question"]) for line in lines for _ in range(given.samples)]
    most = given.max_new_tokens

    ways = {OURS: measure(lambda: with_runtime(runtime, prompts, most))}
    model = runtime.engine.model
    model.set_attn_implementation("sdpa")
    ways["transformers"] = measure(lambda: with_generate(model, tokenizer, prompts, most))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "onnx"
        export(given.model, exported)
        graph = load(exported, compute)
        ways["q2t, ONNX Runtime"] = measure(lambda: with_runtime(graph, prompts, most))
        options = SessionOptions()
        options.intra_op_num_threads = given.threads
        theirs = ORTModelForCausalLM.from_pretrained(exported, session_options=options, use_cache=True)
        ways["optimum, ONNX Runtime"] = measure(lambda: with_generate(theirs, tokenizer, prompts, most))
    settings = {"model": str(given.model), "answers": len(prompts), "samples": given.samples}
    settings |= {"machine": machine(), "max_new_tokens": most, **SAMPLING, **compute.model_dump()}
    found = {"settings": settings, "ways": ways}
    write_json(RESULTS, found)
    fill(ROOT / "README.md", "decoding", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
