"""The runtime against transformers' own generate, and its promises: streams of their own, batches that resume."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    OlmoeConfig,
)

from q2t.config import Compute, Scratch, Source
from q2t.deployment.runtime import NUCLEUS, Request, TorchEngine, load, sample
from q2t.sources import fetch, load_model, load_tokenizer, save_model

COMPUTE = Compute(threads=1, dtype="float32", device="cpu")
SHAPE = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
QUESTIONS = ["What is a fox?", "Name three rivers in Europe and say where they end.", "Hi", "Count to five."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("model") / "tiny"
    fetch("tiny", Source(scratch=SHAPE), target, corpus=QUESTIONS * 4)
    return target


def answers(runtime, requests, **settings):
    settings = {"max_new_tokens": 12, "batch_size": 3} | settings
    found = dict(pair for batch in runtime.generate(requests, **settings) for pair in batch)
    return [found.get(place) for place in range(len(requests))]


def test_greedy_is_what_transformers_generates(folder):
    runtime = load(folder, COMPUTE)
    requests = [Request(runtime.prompt(question)) for question in QUESTIONS]
    model = load_model(folder)
    for request, answer in zip(requests, answers(runtime, requests), strict=True):
        ids = runtime.tokenizer(request.prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer.text == runtime.tokenizer.decode(whole, skip_special_tokens=True)
        assert answer.completion_tokens == len(whole)
        assert answer.prompt_tokens == ids.shape[1]


def test_stream_is_the_greedy_answer_in_pieces(folder):
    runtime = load(folder, COMPUTE)
    (whole,) = answers(runtime, [Request(runtime.prompt(QUESTIONS[0]))])
    assert "".join(runtime.stream(QUESTIONS[0], max_new_tokens=12)).rstrip("\N{REPLACEMENT CHARACTER}") == (
        whole.text.rstrip("\N{REPLACEMENT CHARACTER}")
    )


def test_a_text_is_not_cleaned_up(folder):
    """Llama 3's tokenizer would: there " .5" loses its space, and a stream that takes it back a character."""
    runtime = load(folder, COMPUTE)
    runtime.tokenizer.clean_up_tokenization_spaces = True
    said = "R1 , a 4.7 ohm , takes .5 A ."
    tokens = [*runtime.tokenizer(said).input_ids, runtime.tokenizer.eos_token_id]
    assert runtime.tokenizer.decode(tokens, skip_special_tokens=True) != said
    runtime._steps = lambda requests, *_: ({0: token} for token in tokens)
    assert "".join(runtime.stream("?", max_new_tokens=50)) == said
    assert answers(runtime, [Request("?")])[0].text == said


def test_attention_with_a_cap_on_its_scores_is_refused(folder, tmp_path):
    """transformers' fused kernel leaves gemma-2's out, and says nothing."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = Gemma2Config(vocab_size=300, num_key_value_heads=2, attn_logit_softcapping=0.5, **sizes)
    save_model(Gemma2ForCausalLM(config), load_tokenizer(folder), tmp_path / "gemma2")
    with pytest.raises(ValueError, match="attention has a softcap, which is not computed here"):
        answers(load(tmp_path / "gemma2", COMPUTE), [Request("?")])


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2", "mistral"])
def test_other_architectures_answer_as_in_transformers(folder, tmp_path, kind):
    """An attention that can't be replaced, values of another width than keys, and a sliding window."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    config = {
        "olmoe": lambda: OlmoeConfig(num_experts=4, num_experts_per_tok=2, **sizes),
        "deepseek_v2": lambda: DeepseekV2Config(
            q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            first_k_dense_replace=2, n_routed_experts=None, **sizes,
        ),
        "mistral": lambda: MistralConfig(sliding_window=24, head_dim=8, **sizes),
    }[kind]()  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    save_model(model, tokenizer, tmp_path / kind)
    runtime = load(tmp_path / kind, COMPUTE)
    shared = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[1]}], tokenize=False)
    requests = [Request(shared + runtime.prompt(question), shared=shared) for question in QUESTIONS]
    given = answers(runtime, requests, max_new_tokens=40, batch_size=4)
    assert given == answers(runtime, [Request(r.prompt) for r in requests], max_new_tokens=40, batch_size=1)
    for request, answer in zip(requests, given, strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False).input_ids
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert answer.text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_declared_end_ends_an_answer(folder, tmp_path):
    runtime = load(folder, COMPUTE)
    (whole,) = answers(runtime, [Request("Hi")])
    shutil.copytree(folder, tmp_path / "two")
    said = runtime.tokenizer(whole.text, add_special_tokens=False).input_ids
    stop = said[4]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], stop]
    (tmp_path / "two/generation_config.json").write_text(json.dumps(settings))
    (cut,) = answers(load(tmp_path / "two", COMPUTE), [Request("Hi")])
    assert (cut.finish_reason, cut.completion_tokens) == ("stop", said.index(stop) + 1)
    assert cut.completion_tokens < whole.completion_tokens


def test_a_row_samples_from_its_own_stream_whatever_shares_its_batch(folder):
    runtime = load(folder, COMPUTE)
    requests = [Request(runtime.prompt(QUESTIONS[i % 4]), seed=i) for i in range(8)]
    hot = {"temperature": 1.0, "top_p": 0.95}
    together = answers(runtime, requests, **hot, batch_size=8)
    alone = answers(runtime, requests, **hot, batch_size=1)
    assert together == alone
    assert len({answer.text for answer in together}) > 4


def test_finished_batches_are_skipped_and_the_others_are_the_same(folder):
    runtime = load(folder, COMPUTE)
    requests = [Request(runtime.prompt(question), seed=i) for i, question in enumerate(QUESTIONS)]
    whole = answers(runtime, requests, temperature=1.0, batch_size=2)
    batches = list(runtime.generate(requests, temperature=1.0, batch_size=2, max_new_tokens=12))
    first = {place for place, _ in batches[0]}
    resumed = answers(runtime, requests, temperature=1.0, batch_size=2, finished=first)
    assert [a for i, a in enumerate(resumed) if i not in first] == [a for i, a in enumerate(whole) if i not in first]
    assert all(resumed[i] is None for i in first)


@pytest.fixture
def rows(monkeypatch):
    """The rows of each call of the engine, as they come."""
    call, found = TorchEngine.__call__, []
    monkeypatch.setattr(
        TorchEngine, "__call__", lambda self, ids, *rest: found.append(len(ids)) or call(self, ids, *rest)
    )
    return found


def first_steps(steps, token):
    """The steps in which a row comes to the token for the first time."""
    found = {}
    for place, step in enumerate(steps):
        for row in step:
            if step[row] == token:
                found.setdefault(row, place)
    return set(found.values())


def test_answers_do_not_depend_on_when_finished_rows_leave_the_cache(folder, rows, monkeypatch):
    runtime = load(folder, COMPUTE)
    requests = [Request(runtime.prompt(QUESTIONS[i % 4]), seed=i) for i in range(12)]
    hot = {"temperature": 1.0, "batch_size": 12, "max_new_tokens": 24}
    steps = list(runtime._steps(requests, 24, 1.0, 1.0))
    # The token that ends the rows at the most different steps.
    end = max(range(len(runtime.tokenizer)), key=lambda token: len(first_steps(steps, token)))
    runtime.ends = torch.tensor([end])
    found, batches = [], []
    for occupancy in (0.0, 0.75, 1.0):
        rows.clear()
        monkeypatch.setattr(runtime.engine, "occupancy", occupancy)
        found.append(answers(runtime, requests, **hot))
        batches.append(rows[1:])
    assert found[0] == found[1] == found[2]
    assert len({answer.completion_tokens for answer in found[0]}) > 3
    never, lazily, at_once = batches
    assert set(never) == {12}
    assert sum(at_once) < sum(lazily) < sum(never)
    assert sum(at_once) == sum(answer.completion_tokens - 1 for answer in found[0])


def test_equal_prompts_are_prefilled_once(folder, rows):
    runtime = load(folder, COMPUTE)
    requests = [Request(runtime.prompt(question), seed=i) for i in range(3) for question in QUESTIONS[:2]]
    together = answers(runtime, requests, temperature=1.0, batch_size=6)
    assert rows[:2] == [2, 6]
    assert together == answers(runtime, requests, temperature=1.0, batch_size=1)


def test_a_shared_beginning_is_prefilled_once_and_changes_no_answer(folder, rows):
    runtime = load(folder, COMPUTE)
    asked = [(QUESTIONS[i % 2], QUESTIONS[2 + i // 2 % 2] + " " * i) for i in range(6)]
    shared = [runtime.tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False) for q, _ in asked]
    prompts = [before + runtime.prompt(question) for before, (_, question) in zip(shared, asked, strict=True)]
    plain = answers(runtime, [Request(p, i) for i, p in enumerate(prompts)], temperature=1.0, batch_size=7)
    rows.clear()
    requests = [Request(p, i, before) for i, (p, before) in enumerate(zip(prompts, shared, strict=True))]
    assert answers(runtime, requests, temperature=1.0, batch_size=7) == plain
    assert rows[:2] == [2, 6]
    mixed = [*requests, Request(runtime.prompt("Hi"))]
    assert answers(runtime, mixed, temperature=1.0, batch_size=7)[:6] == plain


@pytest.mark.parametrize(("stops", "end"), [(True, "<|im_end|>"), (False, "")])
def test_bits_are_the_cross_entropy_of_the_text_and_of_its_end_if_it_has_one(folder, stops, end):
    runtime = load(folder, COMPUTE)
    prompt, text = runtime.prompt("Hi"), "A fox."
    ids = runtime.tokenizer(prompt + text + end, return_tensors="pt").input_ids
    start = len(runtime.tokenizer(prompt).input_ids)
    logprobs = load_model(folder)(ids).logits.log_softmax(-1)
    expected = -sum(logprobs[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
    assert runtime.bits(prompt, text, stops=stops) == pytest.approx(expected / 0.6931471805599453, rel=1e-4)


def test_an_empty_text_that_was_cut_takes_no_bits(folder):
    runtime = load(folder, COMPUTE)
    assert runtime.bits(runtime.prompt("Hi"), "", stops=False) == 0


def test_sampling_follows_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    uniform = torch.linspace(0, 0.9999, 2000)
    counts = sample(logits, uniform, 1.0, 0.9).bincount(minlength=4) / 2000
    assert counts.tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=2e-3)
    cold = sample(logits, uniform, 0.01, 1.0)
    assert cold.eq(0).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_sampling_a_large_vocabulary_is_sampling_all_of_it_in_order(top_p):
    torch.manual_seed(0)
    logits, uniform = 2 * torch.randn(300, 4 * NUCLEUS), torch.rand(300, dtype=torch.float64)
    probabilities, ids = (logits.double() / 0.7).softmax(-1).sort(dim=-1, descending=True)
    nucleus = (probabilities.cumsum(-1) - probabilities) < top_p
    distribution = (probabilities * nucleus).cumsum(-1)
    passed = distribution / distribution[:, -1:] > uniform[:, None]
    expected = ids.gather(-1, passed.int().argmax(-1, keepdim=True)).squeeze(-1)
    found = sample(logits, uniform, 0.7, top_p)
    # By their logits, since two tokens of nearly one probability may change places.
    torch.testing.assert_close(*(logits.gather(-1, t[:, None]) for t in (found, expected)), rtol=1e-5, atol=0)
    assert top_p < 1 or not passed[:, :NUCLEUS].any(-1).all()  # some lie beyond the first


def test_a_tokenizer_without_a_padding_token_answers_the_same(folder, tmp_path):
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    tokenizer.pad_token = None
    save_model(model, tokenizer, tmp_path / "bare")
    bare, whole = load(tmp_path / "bare", COMPUTE), load(folder, COMPUTE)
    assert bare.tokenizer.pad_token_id is None
    requests = [Request(whole.prompt(question)) for question in QUESTIONS]  # of unequal lengths
    assert answers(bare, requests) == answers(whole, requests)
