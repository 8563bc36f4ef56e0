"""One arm of the comparison, in a process of its own: `python -m elo_engine.benchmarks.arm SPEC.json`.

SPEC: `model` (name or folder), `arm`, `layers`, `sequence_length`, `micro_batch`, `micro_batches`, `dtype`, `state`,
`recompute`, `streaming`, `device`, `fp8`, `graph`, `lr`, and `cap_bytes` (memory beyond it is refused). The first line
printed describes the arm, then commands are served as `conductor` says, and the last line holds the evidence. An arm
that runs out of memory prints `{"failed": "out of memory: ..."}`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from elo_engine.benchmarks import evidence as seen
from elo_engine.benchmarks.conductor import Conductor, status_bytes
from elo_engine.benchmarks.models import BenchModel, engine_model, fill_store, open_model, random_rows
from elo_engine.config import OptimizerConfig, ScheduleConfig, StageConfig
from elo_engine.measure.environment import choose_device
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import ENGINE, SHALLOW, Setting, Streaming

FOREVER = 1_000_000_000


def setting_of(spec: dict[str, Any], model: BenchModel) -> Setting:
    """The setting that a SPEC describes."""
    keys = ("arm", "sequence_length", "micro_batch", "micro_batches", "dtype", "state", "recompute", "device", "fp8",
            "graph")  # fmt: skip
    given = {key: spec[key] for key in keys} | {"streaming": Streaming(**spec["streaming"])}
    return Setting(spec=model.spec, layers=tuple(spec["layers"]), **given)


def resident_engine(
    setting: Setting, model: BenchModel, section: StageConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model and its optimizer on the device -> engine, all its weights."""
    from elo_engine.train.optim import MasterAdamW
    from elo_engine.train.resident import ResidentEngine

    decoder = engine_model(
        model, setting.layers, shallow=setting.arm in SHALLOW, recompute=setting.recompute, device=device, dtype=dtype
    )
    decoder.use_fp8(setting.fp8)
    return ResidentEngine(decoder, MasterAdamW(decoder, section.optimizer), section.rows_at_once), (
        decoder.trainable() | decoder.frozen()
    )


def streamed_engine(
    setting: Setting, model: BenchModel, section: StageConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same with a few layers on the device -> engine, the weights on the host."""
    from elo_engine.stream.engine import open_streamed

    engine = open_streamed(model.spec, dtype, section, device, setting.streaming, setting.sequence_length)
    fill_store(model, engine.store)
    return engine, engine.trainable()


def run_engine(setting: Setting, model: BenchModel, lr: float, device: torch.device, conductor: Conductor) -> None:
    """This engine's own training loop, as `elo pretrain` and `elo align` run it."""
    import numpy as np

    from elo_engine.data import RowBatch
    from elo_engine.model import ops
    from elo_engine.train.loop import Hooks, Progress, train

    how = ops.configure("auto", device)
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    streamed = setting.arm == STREAMED
    section = StageConfig(
        tokens=FOREVER, tokens_per_step=setting.tokens_per_step, micro_batch=setting.micro_batch,
        optimizer=OptimizerConfig(lr=lr, state=setting.state), schedule=ScheduleConfig(warmup=0.0, decay="constant"),
    )  # fmt: skip
    make = streamed_engine if streamed else resident_engine
    engine, tensors = make(setting, model, section, device, dtype)
    watched = None
    if setting.graph:
        from elo_engine.benchmarks.graph_arms import with_graphs

        engine, watched = with_graphs(engine, setting, section, conductor.evidence)
    ids_RT, labels_RT = random_rows(setting)

    class Rows:
        """Stands where the loop expects a mixture: the drawn rows, round and round."""

        def rows(self, first: int, count: int) -> RowBatch:
            at = np.arange(first, first + count) % len(ids_RT)
            T = setting.sequence_length
            return RowBatch(
                ids_BT=ids_RT.numpy()[at],
                labels_BT=labels_RT.numpy()[at],
                positions_BT=np.tile(np.arange(T), (count, 1)),
                segment_starts=np.arange(count + 1) * T,
                languages=("random",) * count,
            )

    if streamed:
        seen.watch_streamed(engine, conductor.evidence)
    else:
        seen.watch_engine(engine.model, conductor.evidence)
    conductor.evidence.photograph(tensors, device)
    conductor.say({"kernels": how, "attention": "", "optimizer": f"AdamW, {setting.state} state", "versions": {}})
    conductor.wait()

    def on_step(progress: Progress, metrics: dict[str, Any]) -> None:
        conductor.stepped()
        conductor.evidence.read_padded()
        if not conductor.evidence.held:  # a resident engine drops its gradients when the next step begins
            conductor.evidence.held = engine.held()
        conductor.answer(metrics["loss_nats"], metrics["gradient_norm"], "" if watched is None else watched.way)
        conductor.wait()

    if not conductor.finished:
        train(
            engine, Rows(), section,  # type: ignore[arg-type]
            steps=FOREVER, sequence_length=setting.sequence_length, progress=Progress(),
            # something is due after every step, so that a GPU's is told before the next one is launched: it is one
            # command's, and after `finish` there is none
            hooks=Hooks(on_step=on_step, every={1: [lambda progress: None]}, should_stop=lambda: conductor.finished),
        )  # fmt: skip
    if streamed:
        engine.flush()  # the last step's updates
    if watched is not None:
        watched.compare()
    conductor.evidence.compare(tensors, device)


OUT_OF_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short; an illegal access does not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def main() -> None:
    """Build the arm, serve steps, report."""
    # Libraries print; what the harness reads goes to a descriptor of its own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = choose_device(spec["device"])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        if spec.get("cap_bytes"):
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap_bytes"] / total), device)
    elif spec.get("cap_bytes"):
        limit = spec["cap_bytes"] + (status_bytes("VmData") or 0)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model = open_model(spec["model"])
    setting = setting_of(spec, model)
    conductor = Conductor(device, seen.Evidence(), replies)
    try:
        if setting.arm in ENGINE:
            run_engine(setting, model, spec["lr"], device, conductor)
        else:
            from elo_engine.benchmarks.trainer_arms import run_trainer

            run_trainer(setting, model, spec["lr"], device, conductor)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        conductor.say({"failed": f"out of memory: {str(error).splitlines()[0]}"[:300], "out_of_memory": True})
        return
    conductor.say({"evidence": conductor.evidence.to_json(), "clocks": conductor.clocks} | conductor.peaks)


if __name__ == "__main__":
    main()
