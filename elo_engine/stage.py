"""What ELO pretraining and alignment share around the loop: data, snapshots, evaluation, metrics, the progress bar,
signals.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch

from elo_engine import __version__, console
from elo_engine.checkpoint import CheckpointIndex, preflight_space
from elo_engine.config import RunConfig, StageConfig, digest
from elo_engine.corpora import Heldout
from elo_engine.data import Mixture, RowBatch
from elo_engine.errors import Interrupted, RefusedError
from elo_engine.evaluate import GroupScorer, Scorer, Stopped, evaluate_all
from elo_engine.measure.expected import StageMemory
from elo_engine.measure.meter import human_bytes, peak_memory
from elo_engine.measure.setting import Setting
from elo_engine.model import cpu, ops
from elo_engine.run_dir import RunDir
from elo_engine.stream.engine import StreamedEngine
from elo_engine.stream.interleaved import StreamedInterleaving
from elo_engine.summary import stage_summary
from elo_engine.train import state, world
from elo_engine.train.graphed import GraphedEngine
from elo_engine.train.interleaved import InterleavedEngine
from elo_engine.train.loop import Hooks, Progress, StepOutcome, StopSignal, Straight, Turns, train_turns
from elo_engine.train.resident import ResidentEngine

StageName = Literal["pretrain", "align"]


@runtime_checkable
class SpreadEngine(Protocol):
    """`train.sharded.ShardedEngine`, known by what it does: its module is loaded where there are several processes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def scorer(self) -> GroupScorer: ...

    @property
    def optimizer(self) -> state.Saved: ...

    def held(self) -> dict[str, int]: ...

    def collected(self) -> state.Saved: ...

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None: ...


StageEngine = ResidentEngine | StreamedEngine | InterleavedEngine | StreamedInterleaving | SpreadEngine


def log_model(run: RunDir, trains: set[str], frozen: set[str], index: CheckpointIndex) -> None:
    """Say what trains, what is frozen and what is absent, in tensors and bytes of the checkpoint."""
    absent = set(index.entries) - trains - frozen
    total = index.total_bytes
    for title, group in (("trains", trains), ("frozen", frozen), ("absent", absent)):
        size = index.bytes_of([name for name in group if name in index.entries])
        run.say(f"  {title}: {len(group)} tensors, {human_bytes(size)} ({100 * size / total:.1f} % of the checkpoint)")


def snapshot_identity(run: RunDir, stage: StageName, index: CheckpointIndex, config: RunConfig) -> dict[str, Any]:
    """What must be the same for a snapshot to continue: run, stage, data, and the source checkpoint as its headers show
    it (names, shapes, sizes; values are not hashed)."""
    shards = {
        language: hashlib.sha256((Path(folder) / "manifest.json").read_bytes()).hexdigest()
        for language, folder in sorted(config.data.shards.items())
    }
    return {"run_id": run.run_id, "stage": stage, "checkpoint": index.identity(), "data": shards, "seed": config.seed}


_VERSIONS = ("elo_engine", "torch")


def _numerics(engine: StageEngine, config: RunConfig) -> dict[str, Any]:
    """What may change between two starts but then costs bit-for-bit equality, so it is recorded; `_VERSIONS` and the
    configuration only where a run is told to go on with others.
    """
    whole = engine.whole if isinstance(engine, StreamedInterleaving) else engine
    streamed = isinstance(whole, StreamedEngine)
    return {
        "elo_engine": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else cpu.instruction_set(),
        "kernels": ops.describe(engine.device),
        "dtype": str(engine.dtype),
        # in fp32 both engines are the same to the last bit
        "gradients": "wait in bf16" if engine.dtype != torch.float32 and streamed else "stay",
        "vocabulary": "sliced" if isinstance(whole, StreamedEngine) and whole.store.sliced else "whole",
        "configuration": digest(config),
        "processes": world.size(),
        "fp8": "none" if config.pretrain.fp8 == "none" else ops.describe_fp8(engine.device),
    }


def _saved(engine: StageEngine) -> state.Restored:
    return cast(state.Restored, engine.optimizer)  # a ResidentEngine that is a stage of its own has a MasterAdamW


def _to_save(engine: StageEngine, step: int) -> state.Saved:
    """What a snapshot is made of, on rank 0. FailedError: processes that should hold the same weights do not."""
    if isinstance(engine, SpreadEngine):
        return engine.collected()
    saved = _saved(engine)
    if world.size() > 1:
        world.require_equal(list(saved.weights().values()), f"the weights after step {step}")
    return saved


def _resume(run: RunDir, name: StageName, engine: StageEngine, identity: dict[str, Any]) -> Progress:
    def newest() -> str | None:
        state.clear_leftovers(run.folder(name))
        found = state.latest_snapshot(run.folder(name), run.say)
        return None if found is None else found.name

    told = world.first(newest)
    if told is None:
        return Progress()
    folder = run.folder(name) / told
    progress, before, changed = state.read_progress(folder, identity, state.MAY_DIFFER if run.anyway else ())
    now = _numerics(engine, run.config)
    # written before there was another way, or before it was recorded
    older = {"gradients": "stay", "vocabulary": "whole", "configuration": now["configuration"], "processes": 1}
    older["fp8"] = now["fp8"]
    before = older | before
    changed |= {key: [before.get(key), now[key]] for key in now if before.get(key) != now[key]}
    versions = [f"{key} {before.get(key)} (now {now[key]})" for key in _VERSIONS if key in changed]
    if versions and not run.anyway:
        raise RefusedError(
            f"{folder}: was made with {' and '.join(versions)}; go on with that version, or with --resume anyway, "
            "which is recorded as not exact"
        )
    state.restore(folder, _saved(engine))
    if changed:
        run.say(f"{name}: continues, but not bit for bit, because these changed: {changed}")
    run.say(f"{name}: resumed at step {progress.step} from {folder.name}")
    run.metric(
        {
            "event": "resumed",
            "stage": name,
            "step": progress.step,
            "bit_exact": not changed and engine.device.type == "cpu",
            "changed": changed,
        }
    )
    return progress


def run_stage(
    run: RunDir,
    name: StageName,
    engine: StageEngine,
    index: CheckpointIndex,
    mixture: Mixture,
    scorers: dict[str, Scorer],
    heldout: Heldout | None,
    *,
    memory: StageMemory | None,
    setting: Setting,
    first_row: int = 0,
) -> dict[str, Any]:
    """Train a stage to its end, from the newest snapshot if there is one; returns its summary and leaves a final
    snapshot. What was predicted of its memory is recorded against what it took.

    scorers: whose held-out losses are logged at every `evaluate.every` steps, by what they are: `shallow` or `whole`.
    setting: what the prediction was made for.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a snapshot of the last completed step was saved first.
    """
    config = run.config
    section: StageConfig = config.pretrain if name == "pretrain" else config.align
    steps = config.last_step(name)
    turns: Turns
    if isinstance(engine, InterleavedEngine | StreamedInterleaving):
        turns = engine.turns
    else:
        turns = Straight(engine, section, steps, config.data.sequence_length, first_row)
    optimizer = _saved(engine)
    identity = snapshot_identity(run, name, index, config)
    progress = _resume(run, name, engine, identity)
    began_at = progress.step
    stop = StopSignal()
    saves = min(config.snapshot.keep + 1, 1 + (steps - began_at) // config.snapshot.every)
    preflight_space(run.folder(name), saves * optimizer.snapshot_bytes)  # said now, not after hours of work

    def save(at: Progress) -> Path:
        run.beat("saving")
        numerics = _numerics(engine, config)
        saved = _to_save(engine, at.step)

        def write() -> str:
            return state.save_snapshot(run.folder(name), saved, at, identity, numerics, config.snapshot.keep).name

        return run.folder(name) / world.first(write)

    def polled() -> bool:
        run.beat()
        return world.agreed(stop())

    def beaten() -> bool:
        run.beat()
        return stop()

    # Shares of a model are scored by all processes together; a model that each has, by rank 0 while the others wait.
    together = isinstance(engine, SpreadEngine)

    def evaluate(at: Progress) -> None:
        if heldout is None or (world.rank() and not together):
            return
        if isinstance(engine, GraphedEngine | InterleavedEngine):
            engine.let_go()
        for what, scorer in scorers.items():
            run.beat("evaluating")
            try:
                with peak.without():  # the plan is of training
                    found = evaluate_all(scorer, heldout, polled if together else beaten)
            except Stopped:
                return  # the loop sees the signal next
            for language, result in found.items():
                loss = result.loss_nats
                run.metric(
                    {
                        "stage": name,
                        "step": at.step,
                        "at": at.step,
                        "model": what,
                        "language": language,
                        "heldout_loss_nats": loss,
                    }
                )
                run.say(f"{name} step {at.step}: held-out {language} loss of the {what} model {loss:.4f} nats/token")

    counted: dict[str, int] = {}  # bytes by component, once the optimizer has made its state
    warm: set[str] = set()  # kinds of steps of which this process has made one
    run.status(state="running", stage=name, step=progress.step, steps=steps)
    with (
        stop.installed(),
        peak_memory(engine.device) as peak,
        console.progress_bar(f"{name}", steps, progress.step) as bar,
    ):

        def on_step(at: Progress, metrics: dict[str, Any]) -> None:
            kind = metrics.pop("kind", name)
            if kind == name and kind not in warm:  # the step's gradients are still there
                counted.update(engine.held())
            record = {"stage": kind, "step": at.step, **metrics, "warm": kind in warm}
            record |= {"tokens_total": at.tokens_total, "tokens_loss": at.tokens_loss}
            if "number" in metrics:  # interleaved: each kind is recorded as the stage that it is, counted by itself
                record |= {"step": record.pop("number"), "at": at.step}
                record |= {key: record.pop(f"kind_{key}") for key in ("tokens_total", "tokens_loss")}
            warm.add(kind)
            run.metric(record)
            if not metrics["updated"]:
                run.say(
                    f"{name} step {at.step}: not finite (loss {metrics['loss_nats']}, gradient norm "
                    f"{metrics['gradient_norm']}); the step changed nothing"
                )
            if metrics["spike"]:
                run.say(
                    f"{name} step {at.step}: loss {metrics['loss_nats']:.3f} nats/token is far above the usual "
                    f"{metrics['usual_loss_nats']:.3f} +- {metrics['usual_deviation_nats']:.3f}; the step was made"
                )
            bar(at.step, f"loss {metrics['loss_nats']:.3f}  {metrics['tokens_per_s']:.0f} tokens/s")
            run.status(state="running", stage=name, step=at.step, steps=steps, doing="stepping")

        every: dict[int, list[Callable[[Progress], Any]]] = {}
        every.setdefault(config.evaluate.every, []).append(evaluate)
        every.setdefault(config.snapshot.every, []).append(save)
        hooks = Hooks(on_step=on_step, every=every, should_stop=polled)
        train_turns(turns, mixture, progress, hooks)
        snapshot = save(progress) if progress.step else None
    run.metric(
        {
            "event": "stage ran",
            "stage": name,
            "step": progress.step,
            "peak_bytes": peak.bytes,
            "peak_what": peak.what,
            "memory": None if memory is None else memory.against(peak.bytes, setting, counted),
        }
    )
    if world.agreed(stop()):  # also when it came during the last step: the next stage must not start
        where = snapshot.name if snapshot else "the start"
        raise Interrupted(
            f"{name} interrupted by {stop.received.name if stop.received else 'a signal'} after step {progress.step}; "
            f"continue from {where} with --resume auto"
        )
    summary = stage_summary(run.path, name) if world.rank() == 0 else {}
    if summary:
        times, taken = summary["step_s"], summary["memory"]
        held = (
            f", {human_bytes(taken['measured_bytes'])} of it this stage's for "
            f"{human_bytes(taken['predicted_bytes'])} predicted"
            if taken
            else ""  # the largest part of this stage was run by a version that did not record it
        )
        run.say(
            f"{name}: {summary['steps']} steps, {summary['tokens_per_s']:.0f} tokens/s (median step "
            f"{times['median']:.3f} s, p10 {times['p10']:.3f}, p90 {times['p90']:.3f}), {summary['peak_what']} "
            f"{human_bytes(summary['peak_bytes'])}{held}"
        )
    return summary
