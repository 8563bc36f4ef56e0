"""Arms with CUDA graphs: what they do is counted, a timed step is a repeated one, and an arm in which nothing was
captured is no result. In place of CUDA a capture is kept and made again whenever it is repeated.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import test_rounds
import torch
from test_rounds import Scripted
from test_speedup import MODEL, _undo_watching, run_arm, setting  # noqa: F401 (a fixture)

from elo_engine import graphs
from elo_engine.benchmarks import arm, evidence, rounds
from elo_engine.benchmarks.conductor import Conductor
from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.graph_arms import Watched
from elo_engine.benchmarks.models import BenchModel
from elo_engine.errors import FailedError
from elo_engine.measure.setting import GRAPHED, ArmName, Setting
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.presets import preset_config
from elo_engine.train.graphed import EAGER_STEPS, GraphedEngine
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.step_buffers import StepBuffers

pytest.importorskip("triton")  # which tells how a step's numbers lie on the device

from .test_graphed import Fake, make_graphed, on_meta, step, warm  # noqa: F401 (a fixture)
from .test_no_sync import LLAMA, launched, rows, sent  # noqa: F401 (fixtures)

# ruff: noqa: F811 (fixtures are parameters of their own name)

STEPS = EAGER_STEPS + 3
COMMANDS = "step\n" * STEPS + "finish\n"


class Kept:
    """`Captures` on a CPU: what is captured is not done then, and made again at each repetition, of what the buffers
    hold by then.
    """

    made: ClassVar[list[Kept]] = []

    def __init__(self, device: torch.device) -> None:
        self.captured, self.inside = 0, False
        self.made.append(self)

    def eager(self, body: Callable[[], Any]) -> Any:
        return body()

    def capture(self, body: Callable[[], None], state: AdamwState) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.inside = True
            body()
            self.inside = False

        return replay

    def let_go(self) -> None:
        """Nothing is held."""


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs without a card: the step's numbers are read out of the buffers, where AdamW's kernels would."""

    def step_given(self: MasterAdamW, given: torch.Tensor) -> Any:
        return self._update(float(given[:1].view(torch.float32)), 0)

    monkeypatch.setattr(Kept, "made", [])
    monkeypatch.setattr(graphs, "CudaCaptures", Kept)
    monkeypatch.setattr(graphs, "why_not", lambda *given: None)
    monkeypatch.setattr(graphs, "why_not_here", lambda *given: None)
    monkeypatch.setattr(MasterAdamW, "step_given", step_given)


def made_of(name: ArmName, **changes: Any) -> Setting:
    return setting(name, **({"recompute": "none"} if name == "elo_align" else {}), **changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: steps are captured")
@pytest.mark.parametrize("name", sorted(GRAPHED))
def test_on_a_card_an_arm_with_graphs_is_what_it_claims(name: ArmName) -> None:
    """The same by CUDA's own captures."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = BenchModel("small", preset_config("smollm2-135m") | {"num_hidden_layers": 4})
    made = setting(
        name, spec=model.spec, sequence_length=512, dtype="bf16", state="8bit", device="cuda", graph=True,
    )  # fmt: skip
    replies, seen = io.StringIO(), evidence.Evidence()
    conductor = Conductor(device, seen, replies, io.StringIO(COMMANDS))
    arm.run_engine(made, model, 1e-3, device, conductor)
    evidence.require_engagement(made, seen.to_json())
    ways = [json.loads(line)["way"] for line in replies.getvalue().splitlines()[1:]]
    assert ways == ["launched"] * EAGER_STEPS + ["captured"] + ["repeated"] * 2


@pytest.mark.parametrize("name", sorted(GRAPHED))
def test_an_arm_with_graphs_is_what_it_claims(name: ArmName, on_cpu: None) -> None:
    """Launched, captured, repeated; the same losses as without, and all of it counted though Python ran it once."""
    launched, right = run_arm(made_of(name), COMMANDS)
    found, answers = run_arm(made_of(name, graph=True), COMMANDS)
    evidence.require_engagement(made_of(name, graph=True), found)
    ways = [answer["way"] for answer in answers]
    assert ways == ["launched"] * EAGER_STEPS + ["captured"] + ["repeated"] * 2
    assert [one["loss"] for one in answers] == pytest.approx([one["loss"] for one in right], rel=1e-6)
    assert (found["captured"], found["repeated"], Kept.made[0].captured) == (1, 3, 1)
    same = ("steps", "tokens", "labelled", "longest_row", "shortest_row", "layer_runs", "gradients", "changed")
    assert {key: found[key] for key in same} == {key: launched[key] for key in same}
    assert launched["captured"] == 0 and not any("way" in answer for answer in right)


def test_an_arm_in_which_nothing_was_captured_fails(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of("elo_pretrain", graph=True)
    monkeypatch.setattr(GraphedEngine, "_graph", lambda self, room: None)
    found, answers = run_arm(made, COMMANDS)
    assert {answer["way"] for answer in answers} == {"launched"}
    with pytest.raises(FailedError, match="no step was captured: all were launched kernel by kernel"):
        evidence.require_engagement(made, found)
    with pytest.raises(FailedError, match=f"0 of {STEPS} steps were graphs, not 3"):
        evidence.require_engagement(made, found | {"captured": 1})


def half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph leaves the last micro-batch out."""
    right = StepBuffers.batches

    def fewer(self: StepBuffers, room: Any) -> Any:
        batches = [*right(self, room)]
        return batches[:-1] if Kept.made[-1].inside else batches

    monkeypatch.setattr(StepBuffers, "batches", fewer)


def a_layer_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph has the last layer once more, and the first one not at all: as many runs, and a gradient less."""
    from elo_engine.model.decoder import Decoder

    right = Decoder.loss_sum

    def wrong(self: Decoder, batch: Any) -> Any:
        layers = [*self.layers]
        if Kept.made[-1].inside:
            self.layers[0] = self.layers[-1]
        found = right(self, batch)
        self.layers[:] = layers
        return found

    monkeypatch.setattr(Decoder, "loss_sum", wrong)


def no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph makes every gradient, and its update changes nothing."""
    right = MasterAdamW.step_given

    def still(self: MasterAdamW, given: torch.Tensor) -> Any:
        return right(self, torch.zeros_like(given) if Kept.made[-1].inside else given)  # at a learning rate of 0

    monkeypatch.setattr(MasterAdamW, "step_given", still)


def no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of which half the tokens carry no loss."""
    right = arm.random_rows

    def fewer(made: Setting) -> Any:
        ids, labels = right(made)
        labels[:, ::2] = -100
        return ids, labels

    monkeypatch.setattr(arm, "random_rows", fewer)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (half_a_step, f"{64 * STEPS - 3 * 32} tokens passed in {STEPS} steps"),
        (a_layer_less, "parameters got a gradient"),
        (no_update, "learns, and the graphs did not change it"),
        (no_labels, f"{32 * STEPS} tokens carried a loss"),
    ],
)
def test_a_graph_that_does_less_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], said: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every launched step before it was right."""
    made = made_of("elo_pretrain", graph=True, micro_batch=1, micro_batches=2)
    plant(monkeypatch)
    found, _ = run_arm(made, COMMANDS)
    with pytest.raises(FailedError, match=said):
        evidence.require_engagement(made, found)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("CUDA error: not permitted\nCompile with"), FailedError,
         "^--graph on: the step cannot be captured: CUDA error: not permitted; --graph off measures without$"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
)  # fmt: skip
def test_a_capture_that_fails_is_told_in_one_line(
    error: RuntimeError, kind: type[Exception], said: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of a process that died is all that a row has of it; short memory is an arm's own answer."""

    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(Kept, "capture", fail)
    with pytest.raises(kind, match=said):
        run_arm(made_of("elo_pretrain", graph=True), COMMANDS)


def test_a_capture_is_no_step() -> None:
    """As CUDA's: the body runs while it is captured, does nothing then, and never runs again."""
    seen = evidence.Evidence()
    bounds, labels = torch.tensor([0, 2, 3, 3]), torch.tensor([1, -100, 2])

    class AtOnce(Kept):
        def capture(self, body: Callable[[], None], state: Any) -> Callable[[], None]:
            body()
            return lambda: None

    def body() -> None:
        seen.layer_runs += 2
        seen.saw_gradient("a", 7)
        seen.padded.append((bounds, labels))

    watched = Watched(AtOnce(torch.device("cpu")), seen, {})
    seen.saw_gradient("b", 9)
    watched.eager(body)
    replay = watched.capture(body, None)  # type: ignore[arg-type]
    assert (seen.layer_runs, len(seen.padded), seen.gradients) == (2, 1, {"a": 7, "b": 9})
    for way in ("captured", "repeated", "repeated"):
        replay()
        assert watched.way == way
    assert (seen.layer_runs, seen.captured, seen.repeated, seen.gradients) == (8, 1, 3, {"a": 7})
    labels[1] = 5  # what is there when the step is over counts, not what was there when it was captured
    seen.read_padded()
    assert (seen.tokens, seen.labelled, seen.shortest_row, seen.longest_row, seen.padded) == (12, 12, 1, 2, [])


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_captured_is_the_same_watched_or_not(whole: bool, on_meta: list[int]) -> None:
    """Every operation and launch, on the same places; and one more of the hooks' own would be seen."""

    def captured(watch: bool, plant: bool = False) -> list[Any]:
        fake, seen = Fake(), evidence.Evidence()
        engine = make_graphed(fake, config=LLAMA, whole=whole)
        if watch:
            evidence.watch_engine(engine.model, seen)
            engine._captures = Watched(fake, seen, {})
        if plant:
            states = engine.model.hidden_states
            engine.model.hidden_states = lambda batch: (batch.labels_N >= 0, states(batch))[1]  # type: ignore
        warm(engine)
        assert step(engine, rows(30)) and fake.traces[0].of_the_host == []
        assert not watch or seen.captured == seen.repeated == 1
        return fake.traces[0].seen

    right = captured(watch=False)
    assert len(right) > 100 and captured(watch=True) == right
    assert captured(watch=True, plant=True) != right


class Graphs(Scripted):
    """An arm's process whose steps are launched, captured and repeated; `again`: a step that captures once more."""

    again = 0

    def step(self, command: str = "step") -> dict[str, Any]:
        found = super().step(command)
        if self.contestant.setting.graph:
            captures = self.steps in (EAGER_STEPS + 1, self.again)
            found["way"] = "launched" if self.steps <= EAGER_STEPS else "captured" if captures else "repeated"
        return found

    def finish(self) -> dict[str, Any]:
        found = super().finish()
        graph = self.contestant.setting.graph
        found["evidence"] |= {"captured": int(graph), "repeated": (self.steps - EAGER_STEPS) * graph, "still": []}
        return found


def turns(monkeypatch: pytest.MonkeyPatch, together: bool, again: int = 0, warmup: int = 2) -> rounds.Run:
    for cls in (Scripted, Graphs):
        monkeypatch.setattr(cls, "made", made := [])
        monkeypatch.setattr(cls, "said", [])
        monkeypatch.setattr(cls, "fails", ("", 0))
    monkeypatch.setattr(Graphs, "again", again)
    monkeypatch.setattr(rounds, "ArmProcess", Graphs)
    arms: tuple[ArmName, ...] = ("transformers_full", "elo_pretrain", "elo_align")
    present = [Contestant(replace(test_rounds.setting(arm), graph=arm == "elo_pretrain")) for arm in arms]
    schedule = rounds.Schedule(rounds=2, seconds=60.0, warmup=warmup, steps=2)
    run = rounds.run(present, "tiny", 1e-4, schedule, together=together, scratch=Path(), say=lambda line: None)
    assert all(process.ended for process in made)
    return run


@pytest.mark.parametrize("together", [True, False])
def test_launched_steps_and_captures_are_not_timed(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = turns(monkeypatch, together)
    assert not run.refused and [sorted(turn) for turn in run.rounds] == [["elo_align", "elo_pretrain",
                                                                         "transformers_full"]] * 2  # fmt: skip
    steps = {process.contestant.name: process.steps for process in Graphs.made}
    timed = 2  # a step of each round, or two of a visit
    assert steps == {"elo_pretrain": 2 + EAGER_STEPS + timed, "transformers_full": 2 + timed, "elo_align": 2 + timed}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("change", "way"), [({"again": EAGER_STEPS + 4}, "captured"), ({"warmup": 0}, "captured")])
def test_an_arm_that_captures_in_a_timed_step_fails_and_the_others_go_on(
    change: dict[str, int], way: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text asks for another graph, or too few steps warm up."""
    run = turns(monkeypatch, together, **change)
    assert run.taken["elo_pretrain"].failed == f"a timed step was {way}, where all should repeat a graph"
    assert not run.refused and [sorted(turn) for turn in run.rounds][-1] == ["elo_align", "transformers_full"]
