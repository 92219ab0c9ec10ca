"""SmolLM2's tokenizer: restored from a GGUF file, or trained anew for a random model.

Byte-level BPE that splits digits first, so that a number is read as its digits: " 4700" is "Ġ", "4", "7",
"0", "0". Source: llama.cpp's pre-tokenizer "smollm", which the GGUF file names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q2t.config import Scratch

END_OF_TEXT, START, END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0, 1 and 2."""

CONTEXT = 8192
"""Tokens."""

# ChatML. SmolLM2's own template begins every conversation without a system message with "You are a helpful AI
# assistant named SmolLM, trained by Hugging Face": twenty tokens in every row that is generated, labelled and
# trained on, for a sentence that a student of one capability does not need.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_from_gguf(path: Path) -> Any:
    """The tokenizer that a GGUF file describes.

    transformers reads it too, but as plain ByteLevel under a Llama class, with the wrong end token.

    Raises:
        ValueError: the file's pre-tokenizer is another than SmolLM2's.
    """
    from gguf import GGUFReader
    from gguf.constants import TokenType
    from tokenizers.models import BPE

    fields = GGUFReader(path).fields
    kind = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if kind != "smollm":
        raise ValueError(
            f"{path.name} has the pre-tokenizer {kind!r}; only 'smollm' can be restored. "
            "Take the model from `hub` or `path`, where its tokenizer.json comes along"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.CONTROL]
    # 21 bytes are not in SmolLM2's vocabulary (some control characters, rare or impossible in UTF-8). With an
    # unk_token they stay visible; without one they would vanish from the text.
    bpe = BPE({token: id_ for id_, token in enumerate(tokens)}, merges, unk_token=END_OF_TEXT)
    return _assemble(bpe, special)


def train_tokenizer(corpus: Sequence[str], vocabulary: int) -> Any:
    """A tokenizer of SmolLM2's kind with at most `vocabulary` tokens.

    Three are special and 256 are bytes; merges learnt from the corpus are the rest. Equal corpora give equal
    tokenizers.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    learner = Tokenizer(BPE(unk_token=END_OF_TEXT))
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return _assemble(learner.model, SPECIALS)


def random_model(shape: "Scratch", corpus: Sequence[str]) -> tuple[Any, Any]:
    """A random Llama in float32 and its tokenizer.

    The weights follow from the shape and the tokenizer's size, not from the global random state.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from q2t.records import content_id

    tokenizer = train_tokenizer(corpus, shape.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(content_id(shape.model_dump()), 16))
        model = LlamaForCausalLM(config)
    return model, tokenizer


def _pre_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    words = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    return Steps([Digits(individual_digits=True), words])


def _assemble(bpe: Any, special: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # The general class: a model's own, such as GPT2TokenizerFast, may put its own pre-tokenizer back.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END_OF_TEXT,  # never eos, or the loss would not see where an answer ends
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # it would decode "4 .7" as "4.7"
    )
