"""Making an expert where none can be downloaded: supervised fine-tuning on worked solutions."""

import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

from q2t.config import Compute, Specialize
from q2t.records import Problem
from q2t.sources import chat_prompt

MICRO_BATCH = 4
"""Rows that go through the model at once. A step adds up several such groups, each of rows near in length, so that
little is padding and yet a step sees several families."""
CURVE = ("step", "loss", "learning_rate", "gradient_norm")
LOG_EVERY = 5
"""Steps that a row of the loss curve is the average of; the last row is of those left over."""


def specialize(
    model: Any,
    tokenizer: Any,
    lessons: list[Problem],
    settings: Specialize,
    *,
    seed: int,
    compute: Compute,
    checkpoints: Path,
    save_every: int = 100,
) -> tuple[Any, list[dict[str, float]]]:
    """Fine-tune all weights on the lessons' solutions with TRL. The loss is on the solution and its end token only.

    Killed and called again with the same arguments, it goes on from the last checkpoint and gives the bytes of an
    uninterrupted run. Started by `accelerate launch`, each process holds all weights and takes its share of every
    step's rows; every one returns the same, and the first alone writes checkpoints.

    Args:
        checkpoints: a folder of this run alone, its name depending on all that shapes the result; safe to delete
            once the model is published and recorded.
        save_every: steps between checkpoints.

    Returns:
        The model, and the loss curve as rows of CURVE.

    Raises:
        ValueError: the model caps, scales or shifts its logits, batch_size is no multiple of the processes, or the loss
            or a gradient in the curve is not finite.
    """
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from datasets import Dataset
    from torch.nn.functional import cross_entropy
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from q2t.distillation import batches

    class Completing(TrainerCallback):
        """The trainer fills a folder checkpoint-N in place, so that one may be half-written. Once it is whole, it gets
        another name, and only then older ones go. Nothing but these renamed ones is ever resumed from."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            everyone.wait_for_everyone()  # each adds its random state
            if everyone.is_main_process:
                older = list(checkpoints.glob("step-*"))
                os.replace(checkpoints / f"checkpoint-{state.global_step}", checkpoints / f"step-{state.global_step}")
                for path in older:
                    shutil.rmtree(path)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """The steps left over are a row of the curve too, in a short run the only one."""
            if state.global_step == state.max_steps:
                control.should_log = True

    def summed_loss(self: Any, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        """The model's forward. TRL projects every position on the vocabulary, and back in float32; here only solutions'
        positions are, in the compute dtype. Same loss."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        learnt = labels[:, 1:] != -100
        logits = self.get_output_embeddings()(hidden[:, :-1][learnt]).float()
        return cross_entropy(logits, labels[:, 1:][learnt], reduction="sum")

    def not_finite(what: str, value: float, step: int) -> ValueError:
        return ValueError(f"specialize: the {what} is {value} at step {step}: lower specialize.learning_rate")

    class CompletionTrainer(SFTTrainer):
        """Rows come in the order that `plan` gave them."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            total = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
            if not torch.isfinite(total):  # the trainer would go on, and show it as 0 in the curve
                raise not_finite("loss", total.item(), self.state.global_step + 1)
            return everyone.num_processes * total / num_items_in_batch  # of all, whose gradients' mean is taken

    # Whatever the launcher's configuration says: weights are whole in each process, and compute.dtype is the precision.
    os.environ.update(ACCELERATE_USE_FSDP="false", ACCELERATE_MIXED_PRECISION="no")
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training in this process
    everyone = PartialState(cpu=compute.device == "cpu", timeout=timedelta(days=1))
    if compute.device == "cpu":
        everyone.device = torch.device("cpu")  # accelerate numbers CPUs, and torch.load takes no cpu:0
    own, uneven = divmod(settings.batch_size, everyone.num_processes)
    if uneven:
        raise ValueError(
            f"specialize.batch_size: {settings.batch_size} rows can't be dealt out evenly to {everyone.num_processes} "
            "processes; make it a multiple of them"
        )
    model.get_input_embeddings().padding_idx = None  # its row has no gradient, and where pad == eos it is no padding
    prompts = [chat_prompt(tokenizer, lesson.question) for lesson in lessons]
    # Not by the trainer: a tokenizer that begins every text with <bos> would write a second one behind the template's.
    asked = tokenizer(prompts, add_special_tokens=False).input_ids
    solved = tokenizer([lesson.solution for lesson in lessons], add_special_tokens=False).input_ids
    rows = [
        {
            "input_ids": [*prompt, *solution, tokenizer.eos_token_id],
            "completion_mask": [0] * len(prompt) + [1] * (len(solution) + 1),
        }
        for prompt, solution in zip(asked, solved, strict=True)
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    micro = max(n for n in range(1, MICRO_BATCH + 1) if settings.batch_size % n == 0)
    # One pass over this order is all epochs: in each, micro-batches of rows near in length, in steps that mix them.
    groups = [
        group
        for epoch in range(settings.epochs)
        for step in batches.plan(lengths, settings.batch_size, micro, seed=seed, epoch=epoch)
        for group in step
    ]
    # The trainer cuts it again: an epoch's short micro-batch goes to the end, or all after it would be torn. A GPU
    # takes several micro-batches in one pass, and each of several processes its share of a step: no step changes.
    order = [row for group in sorted(groups, key=len, reverse=True) for row in group]
    parts = settings.batch_size // micro
    held = batches.held(model)
    logits = 3 * 4 * len(batches.output_head(model))  # the backward has three copies in float32
    together = micro * batches.at_once(parts, micro * max(lengths), model.config, compute.device, held, logits=logits)
    at_once = max(n for n in range(1, min(own, together) + 1) if own % n == 0)
    # The trainer forgets its running loss at a resume: there must be none at a checkpoint but the last.
    assert save_every % LOG_EVERY == 0
    if everyone.is_main_process:
        for half_written in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(half_written)
    everyone.wait_for_everyone()  # the first one may have taken its folder back only now
    last = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=own // at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_ratio=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        bf16=compute.dtype == "bfloat16",
        use_cpu=compute.device == "cpu",
        # Few different shapes: oneDNN keeps a primitive for each.
        pad_to_multiple_of=32,
        max_length=None,
        completion_only_loss=True,
        gradient_checkpointing=False,
        seed=seed,
        data_seed=seed,
        logging_steps=LOG_EVERY,
        save_strategy="steps",
        save_steps=save_every,
        report_to="none",
        dataloader_num_workers=0,
        accelerator_config={"use_configured_state": True},
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # TRL has no nn.DataParallel, which transformers takes for several GPUs
    nothing = {"input_ids": [tokenizer.eos_token_id], "completion_mask": [0]}  # so that the processes end together
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(
            [rows[place] for place in order] + [nothing] * (-len(order) % (everyone.num_processes * at_once))
        ),
        processing_class=tokenizer,
        callbacks=[Completing()],
    )
    model.forward = MethodType(summed_loss, model)  # not before: the trainer asks the model's own what it can
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    curve = [
        dict(zip(CURVE, (entry[key] for key in ("step", "loss", "learning_rate", "grad_norm")), strict=True))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    # A NaN is in the weights and so in the next loss, but for the last one. A norm that overflows over finite gradients
    # makes a step of nothing, which no loss shows; the curve has the norm of one step in LOG_EVERY.
    for row in curve:
        if not math.isfinite(row["gradient_norm"]):
            raise not_finite("gradient", row["gradient_norm"], int(row["step"]))
    del model.forward
    return model, curve
