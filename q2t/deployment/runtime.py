"""One way to run a model, whatever it is stored as: batched, greedy or sampled, every row on its own random stream.

Teachers, evaluation and `q2t ask` decode here, so that a score says something of the model and not of the engine.
"""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from q2t.config import Compute
from q2t.sources import chat_prompt, load_model, load_tokenizer

ONNX_FILE = "model.onnx"
NUCLEUS = 256
"""Tokens among which a nucleus is looked for first; sorting a whole vocabulary takes longer than the model does."""


@dataclass(frozen=True)
class Request:
    """One answer to be decoded."""

    prompt: str
    """Already in the chat template."""
    seed: int = 0
    """Start of the row's random stream; unused when greedy."""
    shared: str = ""
    """How the prompt begins, where others begin alike: computed once for a batch. Its tokens begin the prompt's."""


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class TorchEngine:
    """A transformers model; its cache is written in place where its attention can be replaced."""

    occupancy = 0.75
    """Finished rows leave the cache when less than this share of its rows run: to copy it costs more than a few."""

    def __init__(self, folder: Path, compute: Compute) -> None:
        from transformers import DynamicCache

        from q2t.deployment.cache import GROUPED_QUERY, BlockCache

        self.device = torch.device(compute.device)
        self.model = load_model(folder, compute.dtype).to(self.device).eval()
        # Others have an attention of their own (OLMoE), which would attend to what is not written yet.
        replaceable = self.model._supports_attention_backend
        if replaceable:
            self.model.set_attn_implementation(GROUPED_QUERY)
        self.new_cache = BlockCache if replaceable else DynamicCache

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits [batch, vocabulary] of the last position in float32, on the model's device; the cache with `ids`."""
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=self.new_cache() if past is None else past,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [length, vocabulary] in float32 of one sequence [1, length]."""
        return self.model(input_ids=ids.to(self.device), use_cache=False).logits[0].float().cpu()

    def select(self, past: Any, rows: torch.Tensor) -> Any:
        past.batch_select_indices(rows.to(self.device))
        return past


class OnnxEngine:
    """An exported decoder in ONNX Runtime; the cache is a list of arrays, in the order of the graph's inputs."""

    occupancy = 1.0
    """Finished rows leave at once: the graph copies its cache in every step, and int8 scales are the whole batch's."""

    def __init__(self, folder: Path, compute: Compute) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = compute.threads
        self.session = onnxruntime.InferenceSession(
            str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"]
        )
        self.past_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.wants_positions = "position_ids" in {i.name for i in self.session.get_inputs()}

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, Any]:
        logits, present = self._run(ids, mask, positions, past)
        return torch.from_numpy(np.ascontiguousarray(logits[:, -1])), present

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits, _ = self._run(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], None)
        return torch.from_numpy(logits[0])

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: Any) -> tuple[Any, Any]:
        if past is None:
            past = [np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in self.past_inputs]
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        if self.wants_positions:
            feed["position_ids"] = positions.numpy()
        feed |= {i.name: array for i, array in zip(self.past_inputs, past, strict=True)}
        logits, *present = self.session.run(None, feed)
        return logits, present

    def select(self, past: Any, rows: torch.Tensor) -> Any:
        return [array[rows.numpy()] for array in past]


class Runtime:
    """A tokenizer and an engine."""

    def __init__(self, folder: Path, compute: Compute) -> None:
        self.tokenizer = load_tokenizer(folder)
        pad = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if pad is None else pad  # what is masked may be any token
        config, generation = (_read(folder / name) for name in ("config.json", "generation_config.json"))
        # A sliding window would count the padding between what is shared and the rest.
        self.shares = config.get("sliding_window") is None
        declared = generation.get("eos_token_id")
        ends = declared if isinstance(declared, list) else [declared] if declared is not None else []
        self.ends = torch.tensor(sorted({self.tokenizer.eos_token_id, *ends} - {None}), dtype=torch.long)
        self.engine = (OnnxEngine if (folder / ONNX_FILE).exists() else TorchEngine)(folder, compute)

    def prompt(self, question: str, system: str = "") -> str:
        """The question in the model's chat template, up to where the answer begins."""
        return chat_prompt(self.tokenizer, question, system)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids. A template writes all special tokens itself: a tokenizer that adds <bos> would write it twice."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return ids

    def _text(self, tokens: list[int]) -> str:
        """What the tokens say, as it stands: cleaned up, as Llama 3's tokenizer would, " .5" has lost its space."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int,
        finished: Collection[int] = (),
        describe: str = "generate",
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Decode all requests in batches of prompts near in length.

        Which rows share a batch is a function of `requests` alone, so that a resumed run, which skips finished
        batches, computes the others to the same bits.

        Args:
            finished: places in `requests` that are answered already. A batch is skipped when all its rows are.

        Yields:
            For each batch, the rows' places in `requests` with their answers.
        """
        lengths = [len(ids) for ids in self._ids([r.prompt for r in requests])]
        order = sorted(range(len(requests)), key=lambda i: (-lengths[i], i))
        with tqdm(total=len(requests), desc=describe, unit="answer", dynamic_ncols=True) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                if not set(rows) <= set(finished):
                    answers = self._decode([requests[i] for i in rows], max_new_tokens, temperature, top_p)
                    yield list(zip(rows, answers, strict=True))
                bar.update(len(rows))

    @torch.inference_mode()
    def bits(self, prompt: str, text: str, *, stops: bool) -> float:
        """Bits that the model needs to write `text` after `prompt`, and to stop there if the text does."""
        before, text_ids = self._ids([prompt, text])
        written = text_ids + [self.tokenizer.eos_token_id] * stops
        logits = self.engine.logits(torch.tensor([before + written]))[len(before) - 1 : -1]
        targets = torch.tensor(written, dtype=torch.long)  # a text that was cut may be empty
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return float(nats) / math.log(2)

    def stream(self, question: str, *, max_new_tokens: int) -> Iterator[str]:
        """Greedy answer to one question, as pieces of text."""
        shown = ""
        tokens: list[int] = []
        for token in self._steps([Request(self.prompt(question))], max_new_tokens, 0.0, 1.0):
            tokens.append(int(token[0]))
            text = self._text(tokens)
            if not text.endswith("�"):  # half of a multi-byte character
                yield text[len(shown) :]
                shown = text

    def _decode(self, requests: list[Request], limit: int, temperature: float, top_p: float) -> list[Answer]:
        tokens: list[list[int]] = [[] for _ in requests]
        for step in self._steps(requests, limit, temperature, top_p):
            for row, token in step.items():
                tokens[row].append(token)
        ends = set(self.ends.tolist())
        prompts = self._ids([r.prompt for r in requests])
        return [
            Answer(
                text=self._text(row),
                finish_reason="stop" if row and row[-1] in ends else "length",
                prompt_tokens=len(prompt),
                completion_tokens=len(row),
            )
            for row, prompt in zip(tokens, prompts, strict=True)
        ]

    @torch.inference_mode()
    def _steps(self, requests: list[Request], limit: int, temperature: float, top_p: float) -> Iterator[dict[int, int]]:
        """One dictionary a step, row to token, of the rows that still run."""
        logits, mask, positions, past = self._prefill(requests)
        streams = [np.random.default_rng(r.seed) for r in requests]
        rows = torch.arange(len(requests))
        running = torch.ones(len(requests), dtype=torch.bool)
        for left in reversed(range(limit)):
            if temperature == 0:
                token = logits.argmax(-1).cpu()
            else:
                uniform = torch.tensor([streams[row].random() for row in rows.tolist()], dtype=torch.float64)
                token = sample(logits, uniform, temperature, top_p)
            yield dict(zip(rows[running].tolist(), token[running].tolist(), strict=True))
            running &= ~torch.isin(token, self.ends)
            alive = running.nonzero().flatten()
            if not left or not len(alive):
                return
            if len(alive) < self.engine.occupancy * len(rows):
                rows, running, token = rows[alive], running[alive], token[alive]
                mask, positions, past = mask[alive], positions[alive], self.engine.select(past, alive)
            mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
            positions = positions + 1
            logits, past = self.engine(token[:, None], mask, positions, past)

    def _prefill(self, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Logits of the first token, mask, last positions [batch, 1] and cache.

        What prompts share is computed once, and so are equal prompts.
        """
        distinct = list({r.prompt: r for r in requests}.values())
        begins_of = [r.shared if self.shares else "" for r in distinct]
        shared = list(dict.fromkeys(begins_of))
        heads = self._ids(shared)
        head = torch.tensor([shared.index(begin) for begin in begins_of])
        prompts = self._ids([r.prompt for r in distinct])
        begins = [heads[place] for place in head.tolist()]
        assert all(ids[: len(begin)] == begin for ids, begin in zip(prompts, begins, strict=True))
        rests = [ids[len(begin) :] for ids, begin in zip(prompts, begins, strict=True)]
        mask, past = torch.ones(len(distinct), 0, dtype=torch.long), None
        if any(heads):
            _, mask, _, past = self._extend(heads, torch.ones(len(heads), 0, dtype=torch.long), None)
            mask, past = mask[head], self.engine.select(past, head)
        logits, mask, positions, past = self._extend(rests, mask, past)
        if len(distinct) < len(requests):
            places = {r.prompt: place for place, r in enumerate(distinct)}
            rows = torch.tensor([places[r.prompt] for r in requests])
            logits = logits[rows.to(logits.device)]
            mask, positions, past = mask[rows], positions[rows], self.engine.select(past, rows)
        return logits, mask, positions, past

    def _extend(
        self, ids: list[list[int]], mask: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Append tokens to every row of a cache, padded on the left; as `_prefill`."""
        length = max(map(len, ids))
        room = [length - len(row) for row in ids]
        padded = torch.tensor([[self.pad] * n + row for n, row in zip(room, ids, strict=True)])
        written = torch.tensor([[0] * n + [1] * (length - n) for n in room])
        mask = torch.cat([mask, written], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, past = self.engine(padded, mask, positions[:, -length:], past)
        return logits, mask, positions[:, -1:], past


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Nucleus sampling (arXiv 1904.09751) by inverting the cumulative distribution, the likeliest tokens first.

    Args:
        logits: [batch, vocabulary], on any device. Only the likeliest leave it: CUDA has no cumulative sum that gives
            the same bits each time.
        uniform: [batch] in [0, 1), one number from each row's own stream.

    Returns:
        Token ids [batch], on the CPU.
    """
    everything = (logits / temperature).softmax(-1)
    probabilities, ids = (t.cpu() for t in everything.topk(min(NUCLEUS, everything.shape[-1])))
    mass = probabilities.double().sum(-1)
    token = _invert(probabilities, ids, uniform, top_p)
    # Without a nucleus the whole is 1, so that only the numbers beyond these tokens ask for the others.
    short = ((mass < top_p) & ((uniform >= mass) | (top_p < 1))).nonzero().flatten()
    if len(short):
        whole = everything[short.to(everything.device)].cpu()
        token[short] = _invert(*whole.sort(dim=-1, descending=True, stable=True), uniform[short], top_p)
    return token


def _invert(probabilities: torch.Tensor, ids: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """The token where the nucleus' cumulative distribution passes `uniform`; all [batch, tokens], likeliest first."""
    probabilities = probabilities.double()
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0).cumsum(-1)
    nucleus = kept[:, -1].clamp(min=top_p)  # more than top_p, but for rounding
    place = torch.searchsorted(kept, (uniform.double() * nucleus)[:, None], right=True)
    return ids.gather(-1, place.clamp(max=ids.shape[-1] - 1)).squeeze(-1)


def _read(path: Path) -> dict[str, Any]:
    """The settings in a model folder's JSON file; none where it isn't there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def load(folder: Path, compute: Compute) -> Runtime:
    """The model in `folder`, ready to answer; ONNX where there is a model.onnx, torch otherwise."""
    return Runtime(folder, compute)
