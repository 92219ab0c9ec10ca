import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from q2t.compression.vocabulary import require_same_segmentation, slice_embeddings, trim

WORDS = st.sampled_from(
    "An LED Ω löten Kondensator current resistor limits <answer>20.3k exponents. <|im_end|>".split()
)
# Unicode at large, and words that the merges know, in new orders.
ANY = st.text() | st.lists(WORDS, max_size=8).map(" ".join)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="session")
def texts(corpus):
    return corpus[:2]


@pytest.fixture(scope="session")
def trimmed(teacher, texts):
    return trim(teacher, texts, 480)


@settings(max_examples=60, deadline=None)
@given(training=st.lists(ANY, max_size=4), spare=st.integers(0, 40))
def test_training_texts_keep_their_segmentation(teacher, training, spare):
    with pytest.raises(ValueError) as error:
        trim(teacher, training, 0)
    needed = int(str(error.value).split(" or more")[0].split()[-1])
    student = trim(teacher, training, needed + spare)  # exactly what is needed is enough
    assert needed <= len(student.kept) == len(student.tokenizer) <= needed + spare
    for text in training:
        assert [student.to_student[i] for i in ids(teacher, text)] == ids(student.tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=ANY)
def test_any_text_encodes_without_unknown_tokens_and_comes_back(trimmed, text):
    encoded = ids(trimmed.tokenizer, text)
    if "<|endoftext|>" not in text:
        assert trimmed.tokenizer.unk_token_id not in encoded
    assert trimmed.tokenizer.decode(encoded) == text


def test_maps_are_inverse_and_keep_order_names_and_special_ids(teacher, trimmed):
    assert trimmed.kept == sorted(set(trimmed.kept)) and len(trimmed.kept) == 480
    assert trimmed.kept[:3] == [0, 1, 2]
    assert len(trimmed.to_student) == len(teacher)
    for student, original in enumerate(trimmed.kept):
        assert trimmed.to_student[original] == student
        assert trimmed.tokenizer.convert_ids_to_tokens(student) == teacher.convert_ids_to_tokens(original)
    assert sum(student >= 0 for student in trimmed.to_student) == 480
    assert trimmed.tokenizer.convert_tokens_to_ids("<last>") == 479


def test_every_merge_among_kept_tokens_survives_and_no_other(teacher, trimmed):
    before = json.loads(teacher.backend_tokenizer.to_str())["model"]["merges"]
    model = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())["model"]
    expected = [pair for pair in before if all(token in model["vocab"] for token in (*pair, "".join(pair)))]
    assert model["merges"] == expected
    built = {"".join(pair) for pair in expected}
    single = [token for token in model["vocab"] if len(token) > 1 and token not in built]
    assert single == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # all else can be reached


def test_tokens_beyond_the_needed_are_the_first_by_rank(teacher):
    student = trim(teacher, [], 3 + 1 + 256 + 5)
    merges = json.loads(teacher.backend_tokenizer.to_str())["model"]["merges"]
    assert student.tokenizer.convert_ids_to_tokens(range(259, 264)) == ["".join(pair) for pair in merges[:5]]


def test_a_filler_is_skipped_if_the_tokens_on_its_way_do_not_fit():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "abc", "ab"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("ab", "c"), ("a", "b")]))  # "abc" ranks first
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    student = trim(PreTrainedTokenizerFast(tokenizer_object=backend), [], 257).tokenizer
    assert student.convert_ids_to_tokens(256) == "ab"  # "abc" needs both


def test_settings_are_kept_and_post_processor_renumbered(teacher, trimmed):
    student = trimmed.tokenizer
    assert student.special_tokens_map == teacher.special_tokens_map
    assert student.chat_template == teacher.chat_template
    assert (student.padding_side, student.model_max_length) == (
        teacher.padding_side,
        teacher.model_max_length,
    )
    assert student("ohm")["input_ids"][0] == 479  # the template adds <last>
    assert not student.clean_up_tokenization_spaces
    assert set(student("ohm")) == set(teacher("ohm")) == {"input_ids", "attention_mask"}  # what `generate` takes


def test_trimming_is_deterministic_and_ignores_what_the_last_call_left(teacher, trimmed, texts, tmp_path):
    teacher(texts, padding=True, truncation=True, max_length=8, pad_to_multiple_of=4)
    again = trim(teacher, iter(texts), 480)
    assert again.kept == trimmed.kept
    files = []
    for name, each in (("first", trimmed), ("again", again)):
        each.tokenizer("ohm")  # without padding
        each.tokenizer.save_pretrained(tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_the_full_size_is_the_identity(teacher, texts):
    student = trim(teacher, texts, len(teacher))
    assert student.kept == student.to_student == list(range(len(teacher)))
    before, after = (json.loads(each.backend_tokenizer.to_str()) for each in (teacher, student.tokenizer))
    assert after == before | {"padding": None, "truncation": None}


def test_too_small_a_size_names_what_is_needed(teacher, texts):
    with pytest.raises(ValueError, match=r"vocabulary: 300 tokens are too few; .* need (\d+): set it to \1 or more"):
        trim(teacher, texts, 300)


def test_a_token_without_a_row_of_the_model_is_left_out(teacher, texts):
    """As gemma-3-1b's <image_soft_token>."""
    more = copy.deepcopy(teacher)
    more.add_special_tokens({"additional_special_tokens": ["<image>"]})
    trimmed = trim(more, texts, 480, rows=len(teacher))
    assert max(trimmed.kept) < len(teacher) == len(trimmed.to_student)
    assert "<image>" not in trimmed.tokenizer.get_vocab() and len(trimmed.tokenizer) == len(trimmed.kept) == 480
    assert trim(more, texts, 480).kept[-1] == len(teacher)


def test_another_segmentation_is_found_and_its_text_named(teacher, trimmed, texts):
    require_same_segmentation(teacher, trimmed, texts)
    state = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][1:]
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ValueError, match=r"text 1: '<\|im_start\|>user.* is segmented otherwise from token"):
        require_same_segmentation(teacher, trimmed._replace(tokenizer=broken), ["x", texts[0]])


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="WordLevel is no byte-level BPE"):
        trim(words, ["a"], 10)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_unchanged(teacher, trimmed, make_model, tied, texts):
    model, original = make_model(tie_word_embeddings=tied), make_model(tie_word_embeddings=tied)
    model = slice_embeddings(model, trimmed.kept)
    with torch.no_grad():
        theirs = original(torch.tensor([ids(teacher, texts[0])])).logits[..., trimmed.kept]
        ours = model(torch.tensor([ids(trimmed.tokenizer, texts[0])])).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == model.config.vocab_size == 480
    labels = torch.tensor([[1, 2]])
    assert torch.isfinite(model(labels, labels=labels).loss)


def test_all_embeddings_kept_is_the_identity(make_model):
    original = make_model()
    model = slice_embeddings(make_model(), range(original.config.vocab_size))
    assert model.config.to_dict() == original.config.to_dict()
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_special_ids_are_rewritten_everywhere(make_model):
    model = make_model(bos_token_id=5, eos_token_id=[7, 9], pad_token_id=3)
    model.generation_config.eos_token_id = [9]
    model.generation_config.pad_token_id = 3
    slice_embeddings(model, [3, 5, 7, 9, 11])
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [2, 3], 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([3], 0)
    assert model.model.embed_tokens.padding_idx == 0


def test_a_special_token_that_is_not_kept_is_refused(make_model):
    with pytest.raises(ValueError, match="bos_token_id: token 1 is not kept"):
        slice_embeddings(make_model(), [0, 2, 3])
