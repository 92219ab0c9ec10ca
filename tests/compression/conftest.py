"""A tiny teacher: a byte-level BPE tokenizer with ChatML tokens first, and a random Llama."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    f"<|im_start|>user\nAn LED of {v}.{d} V hangs on {2 * v + 5} V; which resistor for {n} mA?<|im_end|>\n"
    f"<|im_start|>assistant\n<think>The resistor drops the rest: R = U / I, in ohm.</think>"
    f"<answer>{n}.{d}k ohm</answer><|im_end|>"
    for v, d, n in [(2, 1, 15), (3, 3, 20), (1, 8, 5), (2, 7, 10), (4, 2, 12)]
] + [
    "Wir löten den Kondensator (4,7 µF) an Ω. The quick brown fox jumps over the lazy dog, again and again.",
    "Voltage regulators, operational amplifiers and transistors dissipate power; heatsinks cool them.",
    "Choose between candidates: compare ratings, then copy the name. Multiply mantissas, add the exponents.",
    "A divider of equal resistances halves its supply; impedance rises with frequency when inductors follow.",
]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """What the teacher's tokenizer learned from; the first two are the tests' training texts."""
    return CORPUS


@pytest.fixture(scope="session")
def teacher() -> PreTrainedTokenizerFast:
    """521 tokens, 3 of them special and first, one added token last; templated with a bos token."""
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        min_frequency=1,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<last>"])
    assert backend.get_vocab_size() == 521
    last = backend.token_to_id("<last>")
    backend.post_processor = processors.TemplateProcessing(single="<last> $A", special_tokens=[("<last>", last)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<last>"],
        chat_template="{{ messages[0]['content'] }}",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def make_model(teacher: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A random model of the teacher's vocabulary, equal at every call."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings = dict(
            vocab_size=len(teacher),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()

    return make


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches, padded left and right."""
    ids = torch.randint(3, 500, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    mask[2, :1] = 0
    return [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
