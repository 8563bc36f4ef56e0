"""Out of memory although the plan fitted: what was predicted against what was measured, and the biggest levers.

A GPU's allocator says so by torch.OutOfMemoryError, a CPU's by a RuntimeError of DefaultCPUAllocator, numpy and Python
by MemoryError, the system by ENOMEM. On CUDA the allocator's state goes to a file for pytorch.org/memory_viz.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from elo_engine.detach import Source
from elo_engine.errors import EloError, OutOfMemory
from elo_engine.levers import SHOWN, StageName, advise
from elo_engine.measure.expected import StageMemory
from elo_engine.measure.meter import human_bytes, peak_memory
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import Setting
from elo_engine.plan import Planning, Target
from elo_engine.run_dir import RunDir

RECORD = "out-of-memory.json"
SNAPSHOT = "out-of-memory.pickle"  # torch's own format; this package never reads it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def explained(
    run: RunDir, source: Source, stage: StageName, memory: StageMemory, setting: Setting
) -> Iterator[None]:
    """Loading and running a stage inside this block ends with what a person needs where memory runs out.

    Args:
        memory: what was predicted, taken before anything was loaded. setting: what it was predicted for.

    Raises:
        OutOfMemory: with the plan, the measurement and levers; `RUN/out-of-memory.json` has the plan by component.
    """
    with peak_memory(source.device) as peak:
        try:
            yield
        except EloError:
            raise
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            failed, snapshot = error, _allocator_state(run, source.device)
            traceback.clear_frames(error.__traceback__)  # they hold the stage's tensors, and what follows needs room
        else:
            return
    told = memory.against(peak.bytes)
    levers = _levers(run, source, stage, setting)
    first = str(failed).split("\n")[0] or type(failed).__name__
    record = {"stage": stage, "error": first, "peak_what": peak.what, "memory": told, "levers": levers}
    run.write_json(RECORD, record | {"snapshot": None if snapshot is None else str(snapshot)})
    run.metric({"event": "out of memory", "stage": stage, "memory": told})
    biggest = "; ".join(f"{lever['override']} saves {human_bytes(lever['saves_bytes'])}" for lever in levers[:SHOWN])
    raise OutOfMemory(
        f"{stage} ran out of memory: {first}. The plan said {human_bytes(told['predicted_bytes'])} "
        f"({told['predicted_moment']}); {human_bytes(told['measured_bytes'])} were measured when there was no more "
        f"({peak.what}, less what the process held before), so something else took the rest, or the plan is too low. "
        + (f"The biggest levers: {biggest}. " if biggest else "")
        + (f"The allocator's state is in {snapshot}, for pytorch.org/memory_viz. " if snapshot else "")
        + f"By component: {run.path / RECORD}. Snapshots of earlier steps stand; end what else uses the memory, or "
        "start a new run with one of the levers"
    ) from failed


def _allocator_state(run: RunDir, device: torch.device) -> Path | None:
    """What a GPU's allocator held at the error, in a file; None on a CPU, or where it cannot be written."""
    if device.type != "cuda":
        return None
    path = run.path / SNAPSHOT
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (RuntimeError, OSError) as error:
        run.say(f"{path}: the allocator's state could not be written ({error})")
        return None
    return path


def _levers(run: RunDir, source: Source, stage: StageName, setting: Setting) -> list[dict[str, Any]]:
    """What would make the stage's predicted peak smaller, the biggest first, for the engine that it ran with."""
    config = run.config
    if stage == "align":
        section: dict[str, Any] = {"engine": "auto" if setting.sharded else "resident"}
        if setting.arm == STREAMED:
            section = {"engine": "streamed", "stream": config.align.stream.model_copy(update=asdict(setting.streaming))}
        config = config.model_copy(update={"align": config.align.model_copy(update=section)})
    auto_dtype = "bf16" if setting.dtype == "bf16" else "fp32"
    planning = Planning(source.spec, Target(source.device.type, auto_dtype, processes=setting.processes))

    def need(changed: Any) -> int:
        return int(planning.needs_of(planning.setting(changed, stage)).device)

    # no room is asked for: it is not known how much would have been enough
    found: list[dict[str, Any]] = advise(config, stage, setting, need, 0, combine=False).to_json()["levers"]
    return found
