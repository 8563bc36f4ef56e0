"""The arms of a transformers user: the Trainer as its documentation has it, fused attention, gradient checkpointing,
8-bit AdamW on a GPU (bitsandbytes, else torchao), torch's fused AdamW on a CPU. With Liger's kernels, with peft's LoRA,
with only the outer layers unfrozen, or with the shallow model in place of the whole.

The Trainer runs its own loop; a callback answers the harness's commands around its steps.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import tempfile
from typing import Any

import torch

from elo_engine.benchmarks import evidence as seen
from elo_engine.benchmarks.conductor import Conductor
from elo_engine.benchmarks.models import BenchModel, attention_of, random_rows, transformers_model
from elo_engine.errors import RefusedError
from elo_engine.measure.setting import SHALLOW, Setting


def optimizer_name(setting: Setting) -> str:
    """The Trainer's `optim`.

    Raises:
        RefusedError: 8-bit state is asked for and neither library that has it is installed.
    """
    if setting.state == "fp32":
        return "adamw_torch_fused"
    if importlib.util.find_spec("bitsandbytes") is not None:
        return "adamw_bnb_8bit"
    if importlib.util.find_spec("torchao") is not None:
        return "adamw_torch_8bit"
    raise RefusedError("8-bit AdamW for transformers needs bitsandbytes or torchao: pip install bitsandbytes")


def versions() -> dict[str, str]:
    """Of the libraries that make these arms."""
    found = {}
    for name in ("transformers", "accelerate", "peft", "liger-kernel", "bitsandbytes", "torchao", "flash-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build(setting: Setting, model: BenchModel, device: torch.device) -> Any:
    """The model of an arm, with what trains in it."""
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    made = transformers_model(model, setting.layers, shallow=setting.arm in SHALLOW, device=device, dtype=dtype)
    if setting.arm == "outer_unfrozen":
        made.requires_grad_(False)
        for index in setting.layers:
            made.model.layers[index].requires_grad_(True)
    if setting.arm == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = setting.lora_rank
        made = get_peft_model(
            made, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        )
    return made


def arguments(setting: Setting, lr: float, folder: str) -> Any:
    """TrainingArguments; what differs from the defaults is the setting, and that nothing is saved or reported."""
    from transformers import TrainingArguments

    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.micro_batches,
        "max_steps": 1_000_000,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": optimizer_name(setting),
        "bf16": setting.dtype == "bf16" and setting.device == "cuda",
        "use_cpu": setting.device == "cpu",
        "use_liger_kernel": setting.arm == "liger_full",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    known = inspect.signature(TrainingArguments).parameters
    if "train_sampling_strategy" in known:
        options["train_sampling_strategy"] = "sequential"
    if setting.recompute != "none":  # its old name in transformers 5.17 and before
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        options |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(**options)


def run_trainer(setting: Setting, model: BenchModel, lr: float, device: torch.device, conductor: Conductor) -> None:
    """Train until the harness says `finish`."""
    from transformers import Trainer, TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()
    made = build(setting, model, device)
    ids_RT, labels_RT = random_rows(setting)
    # labels_RT hold the next token already; shift_labels hands them over as they are
    rows = [
        {"input_ids": ids_T, "labels": ids_T, "shift_labels": labels_T}
        for ids_T, labels_T in zip(ids_RT, labels_RT, strict=True)
    ]

    class Commands(TrainerCallback):
        """The harness's commands around the Trainer's steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.watch_transformers(made, conductor.evidence)
            conductor.evidence.photograph(dict(made.named_parameters()), device)
            conductor.say(
                {"kernels": "Liger" if setting.arm == "liger_full" else "transformers", "versions": versions(),
                 "attention": attention_of(device), "optimizer": optimizer_name(setting)}
            )  # fmt: skip
            conductor.wait()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = list(made.parameters())
            gradients = [parameter.grad for parameter in parameters]
            conductor.evidence.saw_held(parameters, gradients, kwargs["optimizer"].state, device)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            conductor.stepped()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:
                return  # the summary after the last step
            conductor.answer(float(logs["loss"]), float(logs["grad_norm"]))
            conductor.wait()
            control.should_training_stop = conductor.finished

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=made, args=arguments(setting, lr, folder), train_dataset=rows, callbacks=[Commands()]
        )
        if "train_sampling_strategy" not in inspect.signature(type(trainer.args)).parameters:
            from torch.utils.data import SequentialSampler

            trainer._get_train_sampler = lambda *args: SequentialSampler(rows)  # type: ignore[method-assign]
        trainer.train()
    conductor.evidence.compare(dict(made.named_parameters()), device)
