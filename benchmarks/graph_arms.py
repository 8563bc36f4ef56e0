"""Arms of this engine whose steps are CUDA graphs (`elo bench speedup --graph on`): what is refused before anything
runs, the engine, how many steps warm up, and what a graph does, seen from outside.

Python runs a captured step once. Runs of layers and gradients are counted then, and entered for each repetition, which
launches the same; documents and labels are read after each step, its clock stopped, in the memory where the captured
step found them. So nothing is launched in a timed step but the engine's own; one that is launched kernel by kernel has
two small ones for each micro-batch beside it, which count its labels. The launched steps have changed every tensor
before the first graph does, so of what graphs change a sample is kept from when one is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from elo_engine import graphs
from elo_engine.benchmarks.evidence import Evidence
from elo_engine.config import RunConfig, StageConfig, make_config
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import GRAPHED, SHALLOW, Setting
from elo_engine.model import ops
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.train.graphed import EAGER_STEPS, Captures, GraphedEngine, first_cause
from elo_engine.train.resident import ResidentEngine

T = TypeVar("T")
Way = Literal["launched", "captured", "repeated"]
SAMPLE = 1 << 16  # elements of a tensor, over all of it; a step of 1e-4 changes most of them in bf16


def warmup_steps(setting: Setting, usual: int) -> int:
    """Untimed steps of a process: of an arm with graphs the ones that are launched, too, and that it captures in. Rows
    of the arms are one document each, so there is one graph (`StepBuffers.room`), captured in the first step after
    those.
    """
    return usual + EAGER_STEPS if setting.graph else usual


def stage_of(setting: Setting) -> graphs.Stage:
    """Whose `graph` an arm's is; full continual pretraining is `elo align` of the source model."""
    return "pretrain" if setting.arm in SHALLOW else "align"


def config_of(setting: Setting) -> RunConfig:
    """The configuration of a run with such steps, as far as graphs depend on it."""
    section: dict[str, Any] = {
        "tokens": setting.tokens_per_step, "tokens_per_step": setting.tokens_per_step,
        "micro_batch": setting.micro_batch, "recompute": setting.recompute, "optimizer": {"state": setting.state},
    }  # fmt: skip
    tree = {
        "model": "of the arm", "output": "none", "dtype": setting.dtype,
        "data": {"shards": {"random": "random"}, "sequence_length": setting.sequence_length},
        "pretrain": section, "align": section | {"engine": "resident"},
    }  # fmt: skip
    stage = stage_of(setting)
    tree[stage] = tree[stage] | {"graph": "on"}  # type: ignore[operator]
    return make_config(tree, "--graph on")


def require(settings: Sequence[Setting]) -> None:
    """What keeps an arm's steps from being graphs is said before any process is started.

    Raises:
        UsageError: no arm is one of GRAPHED. RefusedError: one cannot be, in the engine's own words (graphs.py).
    """
    wanted = [setting for setting in settings if setting.graph]
    if not wanted:
        named = ", ".join(setting.arm for setting in settings)
        streamed = f"; of {STREAMED}, {graphs.LAYER_BY_LAYER}" if STREAMED in named else ""
        raise UsageError(f"--graph on: {named}: of the arms, {', '.join(sorted(GRAPHED))} have such steps{streamed}")
    for setting in wanted:
        stage, config, spec = stage_of(setting), config_of(setting), setting.spec
        dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
        reason = graphs.why_not(config, stage, spec, setting.device, setting.dtype)
        reason = reason or ops.why_not_padded(dtype, spec.E, spec.softcap)
        if reason is not None:
            raise RefusedError(f"--graph on, arm {setting.arm}: {reason}; --graph off measures without")


def with_graphs(
    engine: ResidentEngine, setting: Setting, section: StageConfig, evidence: Evidence
) -> tuple[GraphedEngine, Watched]:
    """An engine of the same model and optimizer whose steps become graphs, and what watches them. A capture that fails
    is an error: an arm that says graphs has them.

    Raises:
        RefusedError: this machine cannot.
    """
    how = graphs.graphing(config_of(setting), stage_of(setting), engine.model, print)
    assert how is not None and how.must
    watched = Watched(how.captures, evidence, engine.model.trainable())
    optimizer: Any = engine.optimizer
    made = GraphedEngine(engine.model, optimizer, section.rows_at_once, replace(how, captures=watched))
    return made, watched


@dataclass
class _Once:
    """What one run of a captured step does, as the hooks of evidence.py saw it."""

    layer_runs: int = 0
    padded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradients: dict[str, int] = field(default_factory=dict)
    repeated: int = 0


def sample_of(tensor: Tensor) -> Tensor:
    """Elements of a tensor at even distances, SAMPLE or up to twice as many, or all; a copy on the host."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone().cpu()


class Watched:
    """`Captures` that are entered into the evidence.

    Args:
        tensors: what learns, by name.

    Attributes:
        way: how the last step was made: launched kernel by kernel, captured and then repeated for the first time, or
            repeated.
    """

    def __init__(self, captures: Captures, evidence: Evidence, tensors: dict[str, Tensor]) -> None:
        self._captures, self._evidence, self._tensors = captures, evidence, tensors
        self._sampled: dict[str, Tensor] = {}
        self.way: Way = "launched"

    def eager(self, body: Callable[[], T]) -> T:
        """See `Captures`."""
        self.way = "launched"
        return self._captures.eager(body)

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        """See `Captures`.

        Raises:
            FailedError: it cannot be captured, in one line that ends with what to do.
        """
        once, evidence = _Once(), self._evidence
        self._sampled = self._sampled or {name: sample_of(tensor) for name, tensor in self._tensors.items()}

        def counted() -> None:
            """The step, counted apart: that it is captured is no step of the training."""
            before = evidence.layer_runs, evidence.padded, evidence.gradients
            evidence.layer_runs, evidence.padded, evidence.gradients = 0, [], {}
            try:
                body()
            finally:
                once.layer_runs, once.padded, once.gradients = evidence.layer_runs, evidence.padded, evidence.gradients
                evidence.layer_runs, evidence.padded, evidence.gradients = before

        try:
            replay = self._captures.capture(counted, states)
        except RuntimeError as error:
            cause = first_cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise  # the engine's own
            said = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise FailedError(
                f"--graph on: the step cannot be captured: {said[:200]}; --graph off measures without"
            ) from error
        evidence.captured += 1

        def repeat() -> None:
            replay()
            evidence.layer_runs += once.layer_runs
            evidence.padded += once.padded
            evidence.gradients = dict(once.gradients)  # of what is timed, not of the steps before it
            evidence.repeated += 1
            self.way = "repeated" if once.repeated else "captured"
            once.repeated += 1

        return repeat

    def let_go(self) -> None:
        """See `Captures`."""
        self._captures.let_go()

    def compare(self) -> None:
        """After the last step: what is as it was when the first graph was captured."""
        self._evidence.still = [
            name for name, sample in self._sampled.items() if torch.equal(sample, sample_of(self._tensors[name]))
        ]
