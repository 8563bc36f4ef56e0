"""Arms with CUDA graphs: what they do is counted, a timed step is a repeated one, an arm in which nothing was captured
is no result, and what cannot be is refused. In place of CUDA a capture is kept and made again whenever it is repeated.
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
from test_compare import ENVIRONMENT, SETTINGS, speedup
from test_rounds import Scripted
from test_speedup import MODEL, _undo_watching, run_arm, setting  # noqa: F401 (a fixture)

from elo_engine import graphs
from elo_engine.benchmarks import arm, contestants, evidence, graph_arms, processes, rounds, waiting
from elo_engine.benchmarks import speedup as measuring
from elo_engine.benchmarks.compare import compare
from elo_engine.benchmarks.conductor import Conductor
from elo_engine.benchmarks.contestants import Contestant, Size, choose
from elo_engine.benchmarks.graph_arms import Watched, warmup_steps
from elo_engine.benchmarks.models import BenchModel
from elo_engine.benchmarks.recording import write_record
from elo_engine.benchmarks.schemas import check_result
from elo_engine.benchmarks.tables import conditions
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.planner import fits, least_recompute, predict_memory
from elo_engine.measure.setting import GRAPHED, ArmName, Setting
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.presets import preset_config, preset_spec
from elo_engine.model.spec import RopeSpec
from elo_engine.train.graphed import EAGER_STEPS, GraphedEngine
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.step_buffers import StepBuffers

pytest.importorskip("triton")  # which tells how a step's numbers lie on the device

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

    watched = Watched(AtOnce(torch.device("cpu")), seen)
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
        found["evidence"] |= {"captured": int(graph), "repeated": (self.steps - EAGER_STEPS) * graph}
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


SIZE = Size("cuda", "bf16", 64, memory_bytes=2**40, graph="on")


def test_which_arms_have_graphs_and_what_is_predicted_of_them() -> None:
    letters = contestants.parse_arms("a,c,f,g,s")
    chosen = {one.name: one.setting for one in choose(MODEL, (0, 3), SIZE, letters)}
    assert {name for name, made in chosen.items() if made.graph} == GRAPHED & set(letters) == set(GRAPHED)
    assert not any(one.setting.graph for one in choose(MODEL, (0, 3), replace(SIZE, graph="off"), letters))
    with pytest.raises(UsageError, match="--graph 'auto': it is one of off, on"):
        choose(MODEL, (0, 3), replace(SIZE, graph="auto"), letters)
    for name in sorted(GRAPHED):
        plan, launched = (predict_memory(replace(chosen[name], graph=graph)) for graph in (True, False))
        assert plan.peak_bytes > launched.peak_bytes, "a step's buffers and padded documents"
        assert measuring.arm_memory(chosen[name], rounds.Taken())["predicted_bytes"] == plan.peak_bytes
        again = arm.setting_of(processes.spec_of(Contestant(chosen[name]), "tiny", 1e-4), MODEL)
        assert again.graph and warmup_steps(again, 2) == 2 + EAGER_STEPS
    assert warmup_steps(chosen["transformers_full"], 2) == 2


def test_what_is_made_again_is_chosen_with_the_graphs_memory() -> None:
    made = setting("elo_pretrain", device="cuda", dtype="bf16", state="8bit")
    room = predict_memory(made).peak_bytes
    assert least_recompute(made, lambda one: fits(one, room)).recompute == "none"
    size = replace(SIZE, sequence_length=32, rows=2, elo_micro_batch=2, memory_bytes=room)
    for graph, again in (("off", "none"), ("on", "layer")):
        (one,) = choose(MODEL, (0, 3), replace(size, graph=graph), ("elo_pretrain",))
        assert one.setting.recompute == again


def test_the_configuration_is_the_one_that_runs_such_steps() -> None:
    for name, stage, other in (("elo_pretrain", "pretrain", "align"), ("engine_full", "align", "pretrain")):
        config = graph_arms.config_of(made_of(name, state="8bit", dtype="bf16"))  # type: ignore[arg-type]
        assert getattr(config, stage).graph == "on" and getattr(config, other).graph == "off"
        assert getattr(config, stage).optimizer.state == "8bit" and config.dtype == "bf16"


LONG = replace(MODEL.spec, ropes=(RopeSpec(1e4, "longrope", {"original_max_position_embeddings": 16}),))
WIDE = replace(MODEL.spec, E=512)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cpu"}, "elo_pretrain: pretrain.graph: on, but CUDA graphs are of GPUs, and this is for cpu"),
        ({"device": "cuda"}, "pretrain.graph: on, but flash attention takes bf16"),
        ({"device": "cuda", "dtype": "bf16", "spec": LONG}, "pretrain.graph: on, but longrope chooses its angles"),
        ({"device": "cuda", "dtype": "bf16", "spec": WIDE}, "pretrain.graph: on, but no fused attention here"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_the_engines_words(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=f"--graph on, arm .*{said}.*; --graph off measures without"):
        graph_arms.require([setting("elo_pretrain", graph=True, **change)])


def test_arms_that_can_have_none_are_named() -> None:
    with pytest.raises(UsageError, match=r"full: of the arms, .*; of elo_align_streamed, the streamed engine"):
        graph_arms.require([setting("elo_align_streamed"), setting("transformers_full")])
    with pytest.raises(UsageError, match="--graph on: transformers_full: of the arms, elo_align, elo_pretrain, engine"):
        graph_arms.require([setting("transformers_full")])


def test_it_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ceilings_of", lambda *given: pytest.fail("the ceilings were measured"))
    options = measuring.Options("llama-3.1-8b-mini", "cpu", sequence_length=32, arms=("elo_pretrain",), graph="on")
    with pytest.raises(RefusedError, match="CUDA graphs are of GPUs"):
        measuring.measure(options, print)


def test_from_the_command_line_it_exits_3(elo: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, said = elo(
        "bench", "speedup", "--model", "llama-3.1-8b-mini", "--device", "cpu", "--graph", "on", "--arms", "f",
        "--records", str(tmp_path / "records"),
    )  # fmt: skip
    assert status == 3 and "CUDA graphs are of GPUs" in said and not (tmp_path / "records").exists()


def test_a_process_that_waits_has_imported_what_its_graphs_need() -> None:
    spec = processes.spec_of(Contestant(setting("elo_pretrain", graph=True)), "tiny", 1e-4)
    assert "elo_engine.benchmarks.graph_arms" in waiting.modules(spec)
    assert not any("graph" in name for name in waiting.modules(spec | {"graph": False}))


def with_graphs(**options: Any) -> dict[str, Any]:
    """A result whose ELO pretraining is said to be graphs."""
    result, _ = speedup(device="cuda")
    ours = result["arms"]["elo_pretrain"]
    options = {"graph": "on", "graphs": 1, "warmup_steps": 5} | options
    return result | {"arms": result["arms"] | {"elo_pretrain": ours | {"options": ours["options"] | options}}}


def test_a_record_says_graphs_where_they_are_and_nothing_where_not() -> None:
    config = {"git": None, "created": "2026-11-30", "settings": SETTINGS}
    plain, _ = speedup(device="cuda")
    for result, said in ((with_graphs(), True), (with_graphs(graph="off"), False), (plain, False)):
        check_result(result, "planted")
        text = conditions(result, config, ENVIRONMENT)
        assert ("(f) with its steps as CUDA graphs (5 warm-up steps)" in text) is said and ("graph" in text) is said
    check_result(with_graphs(graphs=None), "interrupted before the arm told")
    with pytest.raises(FailedError, match=r"options\.graph is 'on', and none was captured"):
        check_result(with_graphs(graphs=0), "planted")
    with pytest.raises(FailedError, match=r"and options\.warmup_steps no number"):
        check_result(with_graphs(warmup_steps=None), "planted")
    other = plain | {"arms": plain["arms"] | {"lora": plain["arms"]["lora"] | {"options": {"graph": "on"}}}}
    with pytest.raises(FailedError, match=r"arms\.lora: it has no steps that are graphs"):
        check_result(other, "planted")


def test_the_arms_row_has_what_was_captured() -> None:
    made = made_of("elo_pretrain", graph=True)
    last = {"evidence": {"captured": 1, "gradients": {}}}
    taken = rounds.Taken(losses=[5.0, 4.0], norms=[1.0], last=last)
    run = rounds.Run({"elo_pretrain": taken}, [{"elo_pretrain": {"seconds": [1.0], "losses": [5.0]}}], 2, True)
    row = measuring.arm_result(Contestant(made), run, {"matmul_flop_per_s": 1e11}, None)
    assert {key: row["options"][key] for key in ("graph", "graphs", "warmup_steps")} == {
        "graph": "on", "graphs": 1, "warmup_steps": 5
    }  # fmt: skip
    without = measuring.arm_result(Contestant(replace(made, graph=False)), run, {"matmul_flop_per_s": 1e11}, None)
    assert "graph" not in without["options"]


def test_records_with_and_without_graphs_are_not_of_the_same_setting(tmp_path: Path) -> None:
    kept = {}
    _, raw = speedup(device="cuda")
    for name, result in (("with", with_graphs()), ("without", speedup(device="cuda")[0])):
        kept[name] = write_record(
            tmp_path, card="imaginary", result=result, raw=raw, environment=ENVIRONMENT, settings=SETTINGS,
            command=["elo"], name=name,
        )  # fmt: skip
    said = "\n".join(compare(kept["with"], kept["without"]))
    assert "NOT THE SAME SETTING" in said and "CUDA graphs: elo_pretrain in A, none in B" in said
    assert "CUDA graphs" not in "\n".join(compare(kept["with"], kept["with"]))


def test_the_presets_can_be_graphs_where_a_card_has_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_arms.ops, "why_not_padded", lambda dtype, E, softcap: None)
    for name in ("smollm2-135m", "llama-3.2-1b"):
        spec = preset_spec(name)
        made = setting("elo_pretrain", device="cuda", dtype="bf16", spec=spec, graph=True)
        others = replace(made, arm="engine_full"), replace(made, arm="transformers_full", graph=False)
        graph_arms.require([made, *others])
