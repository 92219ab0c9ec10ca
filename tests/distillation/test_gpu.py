"""What a CUDA device must not change. Run by `pytest -m gpu`; torch's deterministic kernels are on, as in a stage."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from q2t.config import Compute, Scratch, Source
from q2t.deployment.runtime import Request, load
from q2t.determinism import seed_everything
from q2t.distillation import batches
from q2t.distillation.labels import label
from q2t.distillation.objective import Objective
from q2t.distillation.online import OnlineTeacher
from q2t.distillation.rows import encode
from q2t.evaluation import cost
from q2t.sources import fetch, load_model, load_tokenizer, save_model

pytestmark = pytest.mark.gpu

CPU = Compute(threads=1, dtype="float32", device="cpu")
QUESTIONS = ["What is a fox?", "Name three rivers in Europe and say where they end.", "Hi", "Count to five."]
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "curriculum": {"curriculum": 1.0, "balance": True},
    "lora": {"adapter": {"kind": "lora", "modules": ["q_proj", "v_proj"]}},
    "checkpointing": {"gradient_checkpointing": True},
}
BESIDE: dict[str, dict[str, Any]] = {
    "logits": {"logits": True},
    "features": {"hidden": [[0, 0], [2, 2]], "attention": [[1, 1], [2, 2]]},
    "spans": {"spans": "matched"},
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    seed_everything(3, CPU)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(dtype: Any) -> Compute:
    return Compute(threads=1, dtype=dtype, device="cuda")


def curve(text: bytes) -> np.ndarray:
    return np.array([[float(cell) for cell in line.split(b",")] for line in text.splitlines()[1:]])


@pytest.fixture
def changed(settings: Any) -> Callable[..., Any]:
    return lambda changes: type(settings).model_validate(settings.model_dump() | changes)


@pytest.fixture
def taught(run: Any, model: Any, tokenizer: Any, examples: Any, changed: Any, tmp_path: Path) -> Callable[..., Any]:
    """A run with a teacher beside; for spans one whose special tokens have other ids."""

    def start(asked: dict[str, Any], compute: Compute, folder: Path) -> Any:
        specials = [("<|im_start|>", "<|endoftext|>", "<|im_end|>")] if "spans" in asked else []
        save_model(model(5, 259), tokenizer(*specials), tmp_path / "teacher")
        settings = changed({"online": asked | {"teacher": str(tmp_path / "teacher")}})
        given = examples(22)
        rows = encode(tokenizer(), given)
        teacher = OnlineTeacher(settings.online, model(0, 259), tokenizer(), rows, given, seed=3, compute=compute)
        return run(lambda: model(0, 259), lambda *_, **__: rows, settings, compute, folder, teacher=teacher)

    return start


@pytest.mark.parametrize("asked", BESIDE.values(), ids=BESIDE)
def test_a_teacher_beside_says_what_it_says_on_the_cpu(taught: Any, asked: Any, tmp_path: Path) -> None:
    _, there = taught(asked, on_gpu("float32"), tmp_path / "gpu")
    _, here = taught(asked, CPU, tmp_path / "cpu")
    np.testing.assert_allclose(curve(there), curve(here), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", BESIDE.values(), ids=BESIDE)
def test_a_killed_run_with_a_teacher_beside_ends_with_the_same_bytes(
    taught: Any, asked: Any, dtype: str, kill_at: Any, tmp_path: Path
) -> None:
    whole = taught(asked, on_gpu(dtype), tmp_path / "first")
    kill_at(7)
    with pytest.raises(KeyboardInterrupt):
        taught(asked, on_gpu(dtype), tmp_path / "killed")
    kill_at(-1)
    assert taught(asked, on_gpu(dtype), tmp_path / "killed") == whole


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_its_curve_is_that_of_the_cpu(
    run: Any, model: Any, rows: Any, changed: Any, changes: Any, tmp_path: Path
) -> None:
    settings = changed(changes)
    _, there = run(model, rows, settings, on_gpu("float32"), tmp_path / "gpu")
    _, here = run(model, rows, settings, CPU, tmp_path / "cpu")
    np.testing.assert_allclose(curve(there), curve(here), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_two_runs_and_a_killed_one_give_the_same_bytes(
    run: Any, model: Any, rows: Any, changed: Any, changes: Any, dtype: str, kill_at: Any, tmp_path: Path
) -> None:
    settings = changed(changes)
    whole = run(model, rows, settings, on_gpu(dtype), tmp_path / "first")
    kill_at(7)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, settings, on_gpu(dtype), tmp_path / "killed")
    kill_at(-1)
    assert run(model, rows, settings, on_gpu(dtype), tmp_path / "killed") == whole


def test_micro_batches_that_go_through_at_once_give_the_same_curve(
    run: Any, model: Any, rows: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, passes = settings.model_copy(update={"batch_size": 8}), []
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda *given: passes.append(len(given[1])) or forward(*given))
    _, together = run(model, rows, settings, on_gpu("float32"), tmp_path / "together")
    assert passes == 2 * [8, 8, 6]
    monkeypatch.setattr(batches, "room", lambda device, held: 1)
    _, one_by_one = run(model, rows, settings, on_gpu("float32"), tmp_path / "one by one")
    assert passes[6:] == 2 * [4, 4, 4, 4, 4, 2]
    np.testing.assert_allclose(curve(together), curve(one_by_one), rtol=1e-3, atol=1e-5)


def test_its_answers_are_those_of_the_cpu(tmp_path: Path) -> None:
    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), tmp_path / "tiny", corpus=QUESTIONS * 4)
    found = []
    for compute in (CPU, on_gpu("float32"), on_gpu("float32")):
        runtime = load(tmp_path / "tiny", compute)
        requests = [Request(runtime.prompt(QUESTIONS[i % 4]), seed=i) for i in range(16)]
        for temperature in (0.0, 0.8):
            settings = {"max_new_tokens": 24, "batch_size": 8, "temperature": temperature, "top_p": 0.95}
            found.append(dict(pair for batch in runtime.generate(requests, **settings) for pair in batch))
        found.append(runtime.bits(requests[0].prompt, "A fox is an animal.", stops=True))
        assert min(cost._ask(runtime, "What is a fox?")) > 0
    assert found[0] == found[3] == found[6] and found[1] == found[4] == found[7]
    assert len({answer.text for answer in found[1].values()}) > 8
    assert found[2] == pytest.approx(found[5], rel=1e-4)


def test_its_labels_are_those_of_the_cpu(model: Any, tokenizer: Any, examples: Any) -> None:
    rows = {
        device: label(
            model().to(device),
            tokenizer(),
            examples(6),
            top_k=8,
            batch_size=2,
            to_student=None,
            student_tokenizer=tokenizer(),
        )
        for device in ("cpu", "cuda")
    }
    for here, there in zip(rows["cpu"], rows["cuda"], strict=True):
        np.testing.assert_allclose(there.top_logprobs, here.top_logprobs, atol=5e-3)
        np.testing.assert_allclose(there.tail_logprob, here.tail_logprob, atol=1e-3)


def test_a_long_row_of_a_model_with_windows_trains(rows: Any, settings: Any, run: Any, tmp_path: Path) -> None:
    """gemma's layers that see a window of the text need a mask, and with it another kernel."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma() -> Any:
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
        return Gemma3ForCausalLM(config)

    whole = run(gemma, rows, settings, on_gpu("bfloat16"), tmp_path / "first")
    assert run(gemma, rows, settings, on_gpu("bfloat16"), tmp_path / "second") == whole


def test_the_specialist_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    from q2t.config import Specialize
    from q2t.records import Problem
    from q2t.teachers.specialist import specialize

    shape = Scratch(vocabulary=300, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    fetch("tiny", Source(scratch=shape), tmp_path / "tiny", corpus=QUESTIONS * 4)
    settings = Specialize(source="tiny", epochs=2, learning_rate=0.01, batch_size=8, warmup=0.1, weight_decay=0.01)
    fields: dict[str, Any] = {"family": "bands", "domain": "target", "split": "lessons", "check": {}}
    lessons = [
        Problem(id=f"{i:016x}", inputs={"i": i}, question=f"Say {'so ' * (i % 7)}{i}.", solution=f"so {i}", **fields)
        for i in range(54)
    ]

    def once(name: str, dtype: str = "bfloat16") -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        arguments = load_model(tmp_path / "tiny"), load_tokenizer(tmp_path / "tiny"), lessons, settings
        places = {"checkpoints": tmp_path / name, "save_every": 5}
        network, losses = specialize(*arguments, seed=3, compute=on_gpu(dtype), **places)
        return {key: tensor.cpu().numpy().tobytes() for key, tensor in network.state_dict().items()}, losses

    whole, step = once("whole"), Trainer.training_step

    def mortal(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", mortal)
        with pytest.raises(KeyboardInterrupt):
            once("killed")
    assert once("killed") == whole != once("float32", "float32")
    assert losses_fall(whole[1])


def losses_fall(losses: list[dict[str, float]]) -> bool:
    return losses[-1]["loss"] < losses[0]["loss"]
