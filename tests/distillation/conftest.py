"""A tokenizer of single bytes, random models and rows, all tiny."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from q2t.config import Compute, Distill, Online
from q2t.distillation import loop, weighting
from q2t.distillation.objective import Objective
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import Row, encode
from q2t.records import Example

VOCABULARY, BYTES = 300, 259
"""Tokens of the random rows, and of the tokenizer."""


def tiny_model(seed: int = 0, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def byte_tokenizer(specials: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")) -> Any:
    """One token per byte, after the special tokens: another order of these gives other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def make_examples(count: int) -> list[Example]:
    return [
        Example(
            id=f"e{i}",
            problem_id=f"p{i}",
            family="divider",
            domain="general" if i % 5 == 4 else "target",
            teacher="t",
            question="R" * (1 + 7 * i % 23),
            text="<think>" + "x" * (3 + 11 * i % 41) + f"</think><answer>{i}k ohm</answer>",
            weight=0.5 + i % 3,
        )
        for i in range(count)
    ]


def teacher_beside(folder: Path, asked: dict[str, Any], settings: Distill, compute: Compute) -> tuple[Any, ...]:
    """Settings that ask for the teacher in `folder`, a student and rows that fit it, and the teacher itself."""
    given, ours, student = make_examples(20), byte_tokenizer(), tiny_model(0, BYTES)
    online, rows = Online(teacher=str(folder), **asked), encode(ours, given)
    teacher = OnlineTeacher(online, student, ours, rows, given, seed=3, compute=compute)
    return settings.model_copy(update={"online": online}), student, rows, teacher


def make_rows(count: int, k: int = 4, seed: int = 0, unlabelled_every: int = 0) -> list[Row]:
    """Random rows of unequal lengths, eos (1) inside and at the end, with random but valid labels. The first quarter or
    half of most completions is reasoning."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt, completion = int(rng.integers(1, 30)), int(rng.integers(1, 60))
        ids = rng.integers(1, VOCABULARY, prompt + completion).astype(np.int32)
        ids[-1] = 1
        labels = {}
        if not (unlabelled_every and i % unlabelled_every == 0):
            probabilities = rng.dirichlet(np.ones(k + 1), completion)
            top = [rng.choice(VOCABULARY, k, replace=False) for _ in range(completion)]
            labels = {
                "top_ids": np.array(top, np.uint16),
                "top_logprobs": np.log(probabilities[:, :k]).astype(np.float16),
                "tail_logprob": np.log(probabilities[:, k]).astype(np.float32),
            }
        reasoning = i % 3 * completion // 4
        rows.append(Row(f"r{i}", "target", "divider", 0.5 + i % 2, ids, prompt, answer_start=reasoning, **labels))
    return rows


SETTINGS = Distill(
    seed=3,
    epochs=2,
    learning_rate=0.01,
    batch_size=4,
    warmup=0.2,
    weight_decay=0.01,
    alpha=0.6,
    temperature=2.0,
    divergence="forward_kl",
    beta=0.5,
    schedule="linear",
    spike_factor=None,
    domains=["target", "general"],
    share=1.0,
    teacher_only=[],
    balance=False,
    curriculum=0.0,
    reasoning=1.0,
    sparsity=0.0,
    gradient_checkpointing=False,
    adapter=None,
    freeze=[],
    online=None,
    on_policy=None,
    phases=[],
)


@pytest.fixture
def compute() -> Compute:
    return Compute(threads=1, dtype="float32", device="cpu")


@pytest.fixture
def model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture
def tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


@pytest.fixture
def examples() -> Callable[[int], list[Example]]:
    return make_examples


@pytest.fixture
def rows() -> Callable[..., list[Row]]:
    return make_rows


@pytest.fixture
def settings() -> Distill:
    return SETTINGS


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="no")  # or what a Trainer of this process left in the environment


def weights(model: Any, path: Path) -> bytes:
    save_model(model, str(path))
    return path.read_bytes()


def step_gradient(model: Any, micro_batches: list[Any], settings: Any, accelerator: Any) -> Any:
    model.zero_grad()
    scales = weighting.Scales(distillation=2.5) if settings.balance else weighting.EVEN  # as after some steps
    losses = loop.accumulate(Objective(model), micro_batches, settings, accelerator, scales)
    return losses, [p.grad.clone() for p in model.parameters()]


def train_run(
    model: Any, rows: Any, settings: Any, compute: Any, folder: Path, every: int = 5, **more: Any
) -> tuple[bytes, bytes]:
    """The model's bytes, and the curve's, of a run in `folder`."""
    folder.mkdir(exist_ok=True)
    trained = loop.train(
        model(),
        rows(22, unlabelled_every=every),
        settings,
        seed=3,
        compute=compute,
        checkpoints=folder / "checkpoints",
        curve=folder / "curve.csv",
        **{"save_every": 3, **more},
    )
    return weights(trained, folder / "model"), (folder / "curve.csv").read_bytes()


@pytest.fixture
def gradient() -> Any:
    return step_gradient


@pytest.fixture
def run() -> Any:
    return train_run


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupts the step of this number."""
    accumulate = loop.accumulate

    def kill(at: int) -> None:
        def killed(*arguments: Any) -> Any:
            if arguments[-1] == at:
                raise KeyboardInterrupt
            return accumulate(*arguments)

        monkeypatch.setattr(loop, "accumulate", killed)

    return kill
