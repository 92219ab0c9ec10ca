"""Vocabulary: a BPE tokenizer cut to what the training texts use, and the embeddings to match.

Byte-level ones (SmolLM2, Qwen, Llama 3) and those with byte fallback (gemma): both can write any text by its bytes.

Why segmentation survives: BPE always applies the applicable merge of lowest rank. The student's merges are a
subset of the teacher's that holds every merge the training texts make, so at each step the teacher's choice
is open to the student and nothing new competes with it. Dropping one merge on the way to a kept token would
break this, hence the closure.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from q2t.compression import select

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Merge = tuple[str, str]


class Trimmed(NamedTuple):
    """A smaller tokenizer and how its ids relate to the teacher's."""

    tokenizer: "PreTrainedTokenizerFast"
    kept: list[int]
    """Student id to teacher id, ascending."""
    to_student: list[int]
    """Teacher id to student id, or -1 for a token that is gone; up to the teacher's last token that has a row (its
    tokenizer may have more, and its model more rows)."""


def trim(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], size: int, rows: int | None = None) -> Trimmed:
    """Cut a BPE tokenizer to at most `size` tokens without re-segmenting the texts.

    Kept are all added tokens that have a row, all byte tokens, every token that the texts use, and every token on
    the way to these by the merges; then, in the order of the merges, further tokens with theirs as long as they fit.
    Ids keep their relative order. Whatever text the teacher encodes without unknown tokens, the student does too.

    Args:
        texts: complete training texts, chat template included; encoded without adding special tokens.
        rows: of the model's embeddings. A token without one, as gemma-3-1b's of images, is left out.

    Raises:
        ValueError: the tokenizer is no BPE over bytes, more than `size` tokens are needed, or a text came out
            segmented in another way.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    every_byte = _bytes(state)
    texts = list(texts)
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if rows is None or i < rows}
    names = {index: token for token, index in vocabulary.items()}
    ranks: dict[Merge, int] = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}

    used = {names[index] for ids in _encode(tokenizer, texts) for index in ids}
    tokens = {added["content"] for added in state["added_tokens"]} & vocabulary.keys()
    tokens |= {token for token in [*every_byte, state["model"]["unk_token"]] if token in vocabulary}
    for token in used - tokens:
        tokens |= _derivation(token, ranks)
    if len(tokens) > size:
        raise ValueError(
            f"vocabulary: {size} tokens are too few; special tokens, bytes and the training texts need "
            f"{len(tokens)}: set it to {len(tokens)} or more, or train on fewer texts"
        )
    by_rank = [left + right for left, right in ranks]
    for token in [*by_rank, *sorted(vocabulary, key=vocabulary.__getitem__)]:
        if len(tokens) == size:
            break
        missing = set() if token in tokens else _derivation(token, ranks) - tokens
        if len(tokens) + len(missing) <= size:
            tokens |= missing

    kept = sorted(vocabulary[token] for token in tokens)
    to_student = [-1] * (max(names) + 1)
    for student, teacher in enumerate(kept):
        to_student[teacher] = student
    trimmed = Trimmed(_rebuild(tokenizer, state, to_student), kept, to_student)
    require_same_segmentation(tokenizer, trimmed, texts)
    return trimmed


def require_same_segmentation(teacher: "PreTrainedTokenizerFast", student: Trimmed, texts: Sequence[str]) -> None:
    """Check that the teacher's ids, mapped, are the student's: else labels would sit beside the wrong tokens.

    Raises:
        ValueError: names the first text that differs, and where.
    """
    pairs = zip(_encode(teacher, texts), _encode(student.tokenizer, texts), strict=True)
    for number, (text, (theirs, ours)) in enumerate(zip(texts, pairs, strict=True)):
        mapped = [student.to_student[index] for index in theirs]
        if mapped != ours:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(mapped, ours, strict=False))
            raise ValueError(
                f"text {number}: {text[:80]!r} is segmented otherwise from token {len(list(same))} on; "
                "add it to the texts that the vocabulary is trimmed with"
            )


def slice_embeddings(model: "LlamaForCausalLM", kept: Sequence[int]) -> "LlamaForCausalLM":
    """Keep these rows of the embeddings, in this order, and rewrite the configs to the new ids.

    Works in place; tied embeddings stay tied.

    Args:
        kept: student id to teacher id, from `trim`.

    Raises:
        ValueError: a special token of the config is not among them.
    """
    to_student = {teacher: student for student, teacher in enumerate(kept)}
    for config in (model.config, model.generation_config):
        for field, value in list(vars(config).items()):
            if field.endswith("_token_id") and value is not None:
                setattr(config, field, _renumber(field, value, to_student))

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    tied = head.weight is embedding.weight
    embedding.weight = select(embedding.weight, kept, dim=0)
    head.weight = embedding.weight if tied else select(head.weight, kept, dim=0)
    embedding.num_embeddings = head.out_features = len(kept)
    embedding.padding_idx = model.config.pad_token_id  # as a reload would set it
    model.config.vocab_size = model.vocab_size = model.model.vocab_size = len(kept)
    return model


def _bytes(state: dict[str, Any]) -> list[str]:
    """The tokens that stand for bytes, by the tokenizer's JSON."""
    from tokenizers.pre_tokenizers import ByteLevel

    model = state["model"]
    if model["type"] == "BPE" and model["byte_fallback"]:
        return [f"<0x{byte:02X}>" for byte in range(256)]
    if model["type"] == "BPE" and '"ByteLevel"' in json.dumps(state["pre_tokenizer"]):
        return ByteLevel.alphabet()
    kind = model["type"]
    raise ValueError(
        f"tokenizer: {kind} is no byte-level BPE, nor BPE with byte fallback; choose a model that has one of these"
    )


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _derivation(token: str, ranks: dict[Merge, int]) -> set[str]:
    """The token and every token that arises while BPE builds it alone, its characters first.

    Inside a text it is built in the same way, since no merge reaches over the edge of a final token. A token
    that the merges don't build (possible where whole words are looked up first, `ignore_merges`) needs only
    itself.
    """
    parts, made = list(token), {token, *token}
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return {token}
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        made.add(parts[place])
    return made


def _rebuild(
    tokenizer: "PreTrainedTokenizerFast", state: dict[str, Any], to_student: Sequence[int]
) -> "PreTrainedTokenizerFast":
    """The same tokenizer with fewer tokens, by way of its JSON; every setting else is copied."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = state["model"]
    student_ids = {teacher: student for teacher, student in enumerate(to_student) if student >= 0}
    vocabulary = {token: student_ids[i] for token, i in model["vocab"].items() if i in student_ids}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    added = [{**token, "id": student_ids[token["id"]]} for token in state["added_tokens"] if token["id"] in student_ids]
    state = {
        **state,
        "model": {**model, "vocab": vocabulary, "merges": merges},
        "added_tokens": added,
        "post_processor": _renumber_post_processor(state["post_processor"], to_student),
        "padding": None,  # what the last call of the teacher's tokenizer left there is no setting
        "truncation": None,
    }
    kept = {token["content"] for token in added}
    special = {
        role: [token for token in named if token in kept] if isinstance(named, list) else named
        for role, named in tokenizer.special_tokens_map.items()
        if isinstance(named, list) or named in kept
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **special,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
    )


def _renumber_post_processor(processor: Any, to_student: Sequence[int]) -> Any:
    """Template processors, alone or in a sequence, name their special tokens by id."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        inner = [_renumber_post_processor(each, to_student) for each in processor["processors"]]
        return {**processor, "processors": inner}
    if processor["type"] == "TemplateProcessing":
        special = {
            name: {**token, "ids": [to_student[index] for index in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    return processor


def _renumber(field: str, value: Any, to_student: dict[int, int]) -> Any:
    """A special token id, or a list of them, in student ids."""
    if isinstance(value, list):
        return [_renumber(field, index, to_student) for index in value]
    if value not in to_student:
        raise ValueError(f"{field}: token {value} is not kept; correct it in the model's config first")
    return to_student[value]
