"""The peers of `elo bench quality` that this engine does not train: LoRA (peft), and the detached layers unfrozen
inside the whole model, in transformers with a plain torch loop.

Rows, document masks, positions, loss, clipping, schedule and AdamW (fp32 weights and moments) are those of the engine's
runs; where those compute in bf16, these do under autocast. What is scored is what would be written: every tensor in the
checkpoint's dtype, adapters added to their weights, by this engine's evaluation.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine import console
from elo_engine.benchmarks.quality_methods import bits_per_nat
from elo_engine.config import RunConfig
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.data import RowBatch
from elo_engine.detach import Source
from elo_engine.errors import FailedError, Interrupted
from elo_engine.evaluate import Stopped, evaluate_all
from elo_engine.model import names
from elo_engine.model.decoder import Decoder
from elo_engine.train.guards import NON_FINITE_LIMIT
from elo_engine.train.loop import StopSignal, micro_batches
from elo_engine.train.schedule import learning_rate

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peer_model(kind: str, source: Source, rank: int, seed: int, recompute: bool = False) -> Any:
    """transformers' model in fp32 on the device, with what trains in it; adapters are drawn from `seed`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, attn_implementation="sdpa")
    made.config.use_cache = False
    made = made.to(source.device)
    if recompute:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.requires_grad_(False)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        shape = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        made = get_peft_model(made, shape)
    else:
        for index in source.layers:
            made.model.layers[index].requires_grad_(True)
    return made.train()


def loss_sum(model: Any, rows: RowBatch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As `Decoder.loss_sum`: sum of the cross-entropies in nats, documents kept apart by their mask and positions."""
    B, T = rows.ids_BT.shape
    document_BT = np.searchsorted(rows.segment_starts, np.arange(B * T), side="right").reshape(B, T)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    mask_B1TT = torch.from_numpy(same_BTT & np.tri(T, dtype=bool))[:, None].to(device)
    ids_BT, labels_BT, positions_BT = (
        torch.from_numpy(array_BT).to(device) for array_BT in (rows.ids_BT, rows.labels_BT, rows.positions_BT)
    )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = model(input_ids=ids_BT, attention_mask=mask_B1TT, position_ids=positions_BT, use_cache=False)
    return F.cross_entropy(made.logits.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def written_weights(model: Any, source: Source) -> dict[str, Tensor]:
    """The whole model's tensors by checkpoint name, rounded to the checkpoint's dtype as writing them would."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: dict[str, Tensor] = {}
    for name, parameter in inner.named_parameters():
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = parameter.detach()
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[f"{name}.weight"] = found[f"{name}.weight"] + module.get_delta_weight("default")
    wanted = names.expected_shapes(source.spec)
    entries = source.index.entries
    return {name: found[name].to(entries[name].torch_dtype).to(source.dtype) for name in wanted}


def scorer(model: Any, source: Source) -> Decoder:
    """This engine's model of a peer's weights as they are now."""
    layers = tuple(range(source.spec.layers))
    return Decoder(source.spec, written_weights(model, source), layers, train_outer=False, train_layers=False)


def train_peer(kind: str, config: RunConfig, source: Source, base: dict[str, Any], rank: int) -> dict[str, Any]:
    """All steps of the alignment's section; the fields of an `Outcome`.

    Raises:
        Interrupted: a signal came; nothing is kept, the next start begins again. FailedError: gradients that are not
            finite several times in a row.
    """
    section, missed = config.align, 0
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V)
    per_byte = bits_per_nat(base)
    model = peer_model(kind, source, rank, config.seed, section.runs_again == "layer")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=section.optimizer.lr, betas=section.optimizer.betas, eps=section.optimizer.eps,
        weight_decay=section.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    steps, rows_per_step = config.steps("align"), section.tokens_per_step // config.data.sequence_length
    times: list[float] = []
    stop = StopSignal()
    points = [_point("base", 0, 0.0, {language: one["loss_nats"] for language, one in base.items()}, per_byte)]

    def score(moment: str, step: int) -> None:
        found = {name: one.loss_nats for name, one in evaluate_all(scorer(model, source), heldout, stop).items()}
        points.append(_point(moment, step * section.tokens_per_step, sum(times), found, per_byte))

    with stop.installed(), console.progress_bar(kind, steps) as bar:
        try:
            for step in range(steps):
                began = time.perf_counter()
                rows = mixture.rows(step * rows_per_step, rows_per_step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, section.optimizer.lr, section.schedule)
                total, norm = _step(model, parameters, rows, section, source, stop)
                finite = bool(np.isfinite(norm))
                if finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if source.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
                missed = 0 if finite else missed + 1
                if missed >= NON_FINITE_LIMIT:
                    raise FailedError(
                        f"{kind} step {step + 1}: the gradient was not finite {missed} times in a row; try a lower "
                        f"learning rate than {section.optimizer.lr:g}"
                    )
                bar(step + 1, f"loss {total:.3f}")
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0 and step + 1 < steps:
                    score("training", step + 1)
            score("end", steps)
        except Stopped:
            raise Interrupted(f"{kind} interrupted; it begins again when the comparison is resumed") from None
    tokens = steps * section.tokens_per_step
    return {
        "points": points, "steps": {"shallow": 0, "whole": steps},
        "tokens": {"shallow": 0, "whole": tokens, "fit": 0}, "seconds": sum(times), "fit_seconds": 0.0,
        "step_s": {"shallow": [], "whole": times},
    }  # fmt: skip


def _step(
    model: Any, parameters: list[Tensor], rows: RowBatch, section: Any, source: Source, stop: StopSignal
) -> tuple[float, float]:
    """Forward, backward and clipping for the rows of a step -> its loss in nats a token, its norm before clipping."""
    tokens_loss = max(1, int((rows.labels_BT >= 0).sum()))
    total = torch.zeros((), device=source.device)
    for piece in micro_batches(rows, section.rows_at_once):
        if stop():
            raise Stopped
        loss = loss_sum(model, piece, source.device, source.dtype) / tokens_loss
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, section.optimizer.clip or float("inf"))
    return float(total), float(norm)


def _point(moment: str, whole: int, seconds: float, losses: dict[str, float], per_byte: dict[str, float]) -> Any:
    bits = {language: loss * per_byte[language] for language, loss in losses.items()}
    return {
        "moment": moment, "shallow": 0, "whole": whole, "seconds": seconds, "loss_nats": losses, "bits_per_byte": bits,
    }  # fmt: skip
