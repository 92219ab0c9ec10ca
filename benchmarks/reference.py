"""What profile r1-gemma needs at full size: memory, time and cost, computed and not run.

    python benchmarks/reference.py --gpus 8 --price 3.0

writes the table of docs/distillation.md in seconds, on any machine. Parameters are counted on the real shapes, without
memory. Operations follow from them and from the profile's questions, samples, epochs and cuts; what the teacher makes
of the questions is not known before it is asked, so the length of an answer and the share that is kept are arguments.
Time is operations by the peak of the device, or bytes by its bandwidth where that takes longer (decoding), times the
share of its peak that training on gemma's shape reached in benchmarks/results/gpu.json. No decoding of such a model was
measured.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from q2t import profile
from q2t.config import Params, load
from q2t.distillation.losses import LOGITS
from q2t.distillation.phases import MICRO_BATCH
from q2t.readme import fill

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks/results/gpu.json").read_text(encoding="utf-8"))
PEAK, BANDWIDTH = MEASURED["runs"]["matmul"]["peak"] * 1e12, 3.35e12
"""Of an H100: bf16 operations a second, measured, and bytes a second, as its data sheet says."""
STATE = 16
"""Bytes a parameter: weight, gradient and two moments in float32."""
PROMPT = 128
"""Tokens of a question, system prompt included."""


class Model(NamedTuple):
    inner: int
    """Parameters that every token is multiplied by."""
    head: int
    embeddings: int
    """Apart from a head that is the same."""
    layers: int
    hidden: int
    cache: int
    """Bytes of keys and values a token, in bf16."""

    @property
    def parameters(self) -> int:
        return self.inner + self.head + self.embeddings


def counted(model: Any) -> Model:
    config = model.config
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    other = 0 if config.tie_word_embeddings else embeddings.numel()
    inner = sum(p.numel() for p in model.parameters()) - head.numel() - other
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Model(inner, head.numel(), other, config.num_hidden_layers, config.hidden_size, cache)


def r1() -> Model:
    """DeepSeek-R1-0528-Qwen3-8B, by its config.json."""
    shape = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    return counted(Qwen3ForCausalLM(shape))


def gemma(layers: int = 34, intermediate: int = 10_240, vocabulary: int = 262_208) -> Model:
    """The language model of gemma-3-4b-it by its config.json, or a cut one."""
    shape = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=2560,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    return counted(Gemma3ForCausalLM(shape))


class Lengths(NamedTuple):
    """Of answers, in tokens."""

    mean: int
    longest: int


class Step(NamedTuple):
    name: str
    gigabytes: float
    """Of a device."""
    hours: float
    """Of one device that does all."""
    devices: int = 1


def generation(name: str, model: Model, answers: int, lengths: Lengths, batch: int, share: float) -> Step:
    """Answers in batches, each as many steps as its longest takes: reads all weights, and the cache of half a text."""
    steps = answers / batch * lengths.longest
    compute = 2 * (model.inner + model.head) * answers * (PROMPT + lengths.mean) / PEAK
    read = steps * (2 * model.parameters + batch * (PROMPT + lengths.longest / 2) * model.cache) / BANDWIDTH
    gigabytes = (2 * model.parameters + batch * (PROMPT + lengths.longest) * model.cache) / 1e9
    return Step(name, gigabytes, (max(compute, read) / share) / 3600)


def training(
    name: str, student: Model, teacher: Model, rows: int, lengths: Lengths, epochs: int, gpus: int, share: float
) -> Step:
    """Forward, backward, and the teacher's forward beside it; that activations are computed twice is in the share.

    The head runs for the words and for the spans, where it and the teacher's run again for the gradient.
    """
    tokens, completions = rows * epochs * (PROMPT + lengths.mean), rows * epochs * lengths.mean
    learnt = 6 * student.inner * tokens + 14 * student.head * completions
    taught = 2 * teacher.inner * tokens + 4 * teacher.head * completions
    kept = MICRO_BATCH * (PROMPT + lengths.longest) * student.layers * student.hidden * 4
    # Weights and gradient of the head and of a layer are whole, and the head in bfloat16 too.
    gathered = 4 * (2.5 * student.head + 2 * student.inner / student.layers)
    memory = STATE * student.parameters / gpus + gathered + 2 * teacher.parameters + kept + 4 * 4 * LOGITS["cuda"]
    return Step(name, memory / 1e9, (learnt + taught) / PEAK / share / 3600, gpus)


def steps(params: Params, length: int, kept: float, gpus: int, share: float) -> list[Step]:
    teacher = r1()
    cut = params.initialize.layers, params.prune.intermediate, params.initialize.vocabulary
    student = gemma(cut[0], vocabulary=cut[2])
    pruned = gemma(*cut)
    expert = params.teachers["expert"]
    problems = len(params.capability.families) * params.capability.questions
    answers = problems * expert.samples
    rows = round(answers * kept)
    asked = len(params.capability.families) * params.capability.test
    twice = asked * (1 + ("teacher" in params.evaluate.lenient))
    size = expert.batch_size
    lengths = Lengths(length, expert.max_new_tokens)
    return [
        generation(f"generate: {answers:,} answers", teacher, answers, lengths, size, share),
        training("distill", student, teacher, rows, lengths, params.distill.epochs, gpus, share),
        training("prune, heal", pruned, teacher, rows, lengths, params.prune.epochs, gpus, share),
        generation(f"evaluate: teacher, {twice:,} answers", teacher, twice, lengths, size, share),
        generation(f"evaluate: pruned student, {asked:,} answers", pruned, asked, lengths, size, share),
    ]


def table(rows: list[Step], price: float) -> str:
    lines = ["| Step | GB a device | GPU hours | Hours | Cost |", "|:--|--:|--:|--:|--:|"]
    total = 0.0
    for row in rows:
        cost = row.hours * price
        total += cost
        lines.append(
            f"| {row.name} | {row.gigabytes:.0f} | {row.hours:.2f} | {row.hours / row.devices:.2f} | {cost:,.0f} $ |"
        )
    return "\n".join([*lines, f"| together | | {sum(r.hours for r in rows):.2f} | | {total:,.0f} $ |"])


def section(length: int = 1024, kept: float = 0.5, gpus: int = 8, price: float = 3.0) -> str:
    """What docs/distillation.md says of it."""
    share = MEASURED["share_of_peak_gemma3_4b"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_bytes((ROOT / "params.yaml").read_bytes())
        profile.apply("r1-gemma", path)
        params = load(path)
    with torch.device("meta"):
        rows = steps(params, length, kept, gpus, share)
        sizes = [f"{model.parameters / 1e9:.2f}" for model in (r1(), gemma())]
        pruned = gemma(params.initialize.layers, params.prune.intermediate, params.initialize.vocabulary).parameters
    said = (
        f"The teacher has {sizes[0]} billion parameters, gemma {sizes[1]}. Answers of {length:,} tokens, "
        f"{kept:.0%} of them kept, {gpus} devices for distill and prune and one for the rest, "
        f"{price:.2f} $ an hour, {share:.0%} of the peak. A batch lasts as long as its longest answer, taken as "
        "max_new_tokens; the general prompts, `label` and the other models of `evaluate` come on top. So does "
        f"`export`, on the host: it writes {4 * pruned / 1e9:.1f} GB in float32, and little more than a quarter of it "
        "in int8:"
    )
    return f"{said}\n\n{table(rows, price)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024, help="tokens of an answer")
    parser.add_argument("--kept", type=float, default=0.5, help="share of the answers that are learnt from")
    parser.add_argument("--gpus", type=int, default=8, help="that share distill and prune")
    parser.add_argument("--price", type=float, default=3.0, help="dollars a GPU hour")
    fill(ROOT / "docs/distillation.md", "reference", section(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
