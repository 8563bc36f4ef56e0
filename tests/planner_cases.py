"""One optimizer step of an arm on the CPU, built as the benchmarks build it, for the planner's tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig, ScheduleConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.measure.setting import ENGINE, SHALLOW, ArmName, Setting
from elo_engine.model import names, ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.shallow import shallow_names
from elo_engine.model.spec import ModelSpec, RopeSpec
from elo_engine.train.loop import Hooks, Progress, train
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

CPU = torch.device("cpu")


def llama(layers: int, V: int, D: int, F: int, H: int, K: int, *, tied: bool) -> ModelSpec:
    """A small Llama; heads are D / H wide."""
    return ModelSpec(
        family="llama", layers=layers, V=V, D=D, F=F, H=H, K=K, E=D // H, norm_eps=1e-5, ropes=(RopeSpec(10000.0),),
        tied=tied, max_positions=8192,
    )  # fmt: skip


def case(arm: ArmName, spec: ModelSpec, T: int, B: int, **fields: Any) -> Setting:
    """A setting on the CPU in fp32 with the first and the last layer, unless said otherwise."""
    made = Setting(arm, spec, (0, spec.layers - 1), T, B, dtype="fp32", state="fp32", device="cpu")
    return replace(made, **fields)


class Rows:
    """Stands where the loop expects a mixture: rows of one document each, drawn at random, all with labels."""

    def __init__(self, setting: Setting) -> None:
        self._V, self._T = setting.spec.V, setting.sequence_length

    def rows(self, first: int, count: int) -> RowBatch:
        drawn = np.random.default_rng(first).integers(self._V, size=(count, self._T + 1))
        return RowBatch(
            ids_BT=drawn[:, :-1], labels_BT=drawn[:, 1:], positions_BT=np.tile(np.arange(self._T), (count, 1)),
            segment_starts=np.arange(count + 1) * self._T, languages=("random",) * count,
        )  # fmt: skip


def resident_engine(setting: Setting, config: OptimizerConfig) -> ResidentEngine:
    """The whole model in this process, or its detached layers."""
    spec, dtype = setting.spec, torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    shallow = setting.arm in SHALLOW
    shapes, wanted = names.expected_shapes(spec), names.expected_shapes(spec).keys()
    present = setting.layers if shallow else tuple(range(spec.layers))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shapes[name], generator=generator).mul_(0.02).to(dtype)
        for name in (shallow_names(spec, setting.layers) if shallow else wanted)
    }
    decoder = Decoder(spec, tensors, present, train_outer=not shallow, recompute=setting.recompute)
    return ResidentEngine(decoder, MasterAdamW(decoder, config), setting.micro_batch)


def sharded_engine(setting: Setting, config: OptimizerConfig) -> Any:
    """This process's share of the whole model."""
    from elo_engine.model.sharded import ShardedModel
    from elo_engine.train.sharded import ShardedAdamW, ShardedEngine

    dtype, shapes = torch.bfloat16 if setting.dtype == "bf16" else torch.float32, names.expected_shapes(setting.spec)
    generator = torch.Generator().manual_seed(0)

    def read(part: list[str]) -> dict[str, Tensor]:
        return {name: torch.randn(shapes[name], generator=generator).mul_(0.02) for name in part}

    model = ShardedModel(setting.spec, read, device=CPU, dtype=dtype, recompute=setting.recompute)
    return ShardedEngine(model, ShardedAdamW(model, config), setting.micro_batch)


def engine_step(setting: Setting) -> Callable[[], None]:
    """This engine's own loop, one optimizer step a call, of this process."""
    ops.configure("auto", CPU)
    tokens = setting.tokens_per_step * setting.processes.count
    section = StageConfig(
        tokens=10**9, tokens_per_step=tokens, micro_batch=setting.micro_batch,
        optimizer=OptimizerConfig(lr=1e-4, state=setting.state, master=setting.master),
        schedule=ScheduleConfig(warmup=0.0, decay="constant"),
    )  # fmt: skip
    engine = (sharded_engine if setting.sharded else resident_engine)(setting, section.optimizer)
    progress, rows = Progress(), Rows(setting)

    def step() -> None:
        train(
            engine, rows, section, steps=progress.step + 1,  # type: ignore[arg-type]
            sequence_length=setting.sequence_length, progress=progress, hooks=Hooks(),
        )  # fmt: skip
        engine.optimizer.zero_grad()  # as the loop does first of all in the next step

    return step


def transformers_model(setting: Setting) -> Any:
    """transformers' Llama with what trains in this arm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = setting.spec
    config = LlamaConfig(
        vocab_size=spec.V, hidden_size=spec.D, intermediate_size=spec.F, num_attention_heads=spec.H,
        num_key_value_heads=spec.K, head_dim=spec.E, max_position_embeddings=spec.max_positions,
        num_hidden_layers=len(setting.layers) if setting.arm in SHALLOW else spec.layers,
        tie_word_embeddings=spec.tied, attn_implementation="sdpa", use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if setting.dtype == "bf16" else torch.float32)
    model.train()
    if setting.arm in ("outer_unfrozen", "transformers_shallow"):
        model.requires_grad_(False)
        trained = range(len(model.model.layers)) if setting.arm in SHALLOW else setting.layers
        for index in trained:
            model.model.layers[index].requires_grad_(True)
    if setting.arm == "lora":
        from peft import LoraConfig, get_peft_model

        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = setting.lora_rank
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, task_type="CAUSAL_LM")
        )
    if setting.recompute == "layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def transformers_step(setting: Setting) -> Callable[[], None]:
    """Forward, backward, clip and AdamW in the order of the Trainer's `training_step`."""
    model = transformers_model(setting)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    source = Rows(setting)

    def compute_loss(ids_BT: Tensor, labels_BT: Tensor, tokens: Tensor) -> Tensor:
        outputs = model(input_ids=ids_BT, labels=ids_BT, shift_labels=labels_BT, num_items_in_batch=tokens)
        return outputs["loss"]  # type: ignore[no-any-return]

    def training_step(ids_BT: Tensor, labels_BT: Tensor, tokens: Tensor) -> None:
        loss = compute_loss(ids_BT, labels_BT, tokens)
        del ids_BT, labels_BT
        loss.backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        for number in range(setting.micro_batches):
            rows = source.rows(number, setting.micro_batch)
            ids_BT, labels_BT = (torch.from_numpy(x.copy()) for x in (rows.ids_BT, rows.labels_BT))
            training_step(ids_BT, labels_BT, torch.tensor(setting.tokens_per_step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(setting: Setting) -> Callable[[], None]:
    """A function that makes one optimizer step of the arm, as often as it is called."""
    return engine_step(setting) if setting.arm in ENGINE else transformers_step(setting)


@contextmanager
def only_what_is_made_here() -> Iterator[None]:
    """Whatever lives already is left out of the traces inside, and out of the collector's and their searches for
    tensors: in a test process those are hundreds of thousands of objects and half a second a trace.
    """
    before = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not before:  # conftest.py has frozen what is there for good
            gc.unfreeze()


def measured_peak(setting: Setting) -> int:
    """Bytes of tensors at the highest moment of the second step."""
    from elo_engine.measure.tensor_trace import traced_tensor_bytes

    step = step_of(setting)
    step()
    with traced_tensor_bytes() as trace:
        step()
    return trace.peak_bytes
