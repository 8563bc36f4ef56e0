"""Which arms have CUDA graphs, what is predicted of them, what is refused by name, and what a record says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_compare import ENVIRONMENT, SETTINGS, speedup
from test_speedup import MODEL, setting

from elo_engine.benchmarks import arm, contestants, graph_arms, processes, rounds, waiting
from elo_engine.benchmarks import speedup as measuring
from elo_engine.benchmarks.compare import compare
from elo_engine.benchmarks.contestants import Contestant, Size, choose
from elo_engine.benchmarks.graph_arms import warmup_steps
from elo_engine.benchmarks.recording import write_record
from elo_engine.benchmarks.schemas import check_result
from elo_engine.benchmarks.tables import conditions
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.planner import fits, least_recompute, predict_memory
from elo_engine.measure.setting import GRAPHED
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import RopeSpec
from elo_engine.train.graphed import EAGER_STEPS

pytest.importorskip("triton")  # without it another reason comes first

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
        config = graph_arms.config_of(setting(name, state="8bit", dtype="bf16"))  # type: ignore[arg-type]
        assert getattr(config, stage).graph == "on" and getattr(config, other).graph == "off"
        assert getattr(config, stage).optimizer.state == "8bit" and config.dtype == "bf16"


LONG = replace(MODEL.spec, ropes=(RopeSpec(1e4, "longrope", {"original_max_position_embeddings": 16}),))
WIDE = replace(MODEL.spec, E=512)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cpu"}, "elo_pretrain: CUDA graphs are of GPUs, and this is for cpu"),
        ({"device": "cuda"}, "flash attention takes bf16"),
        ({"device": "cuda", "dtype": "bf16", "spec": LONG}, "longrope chooses its angles"),
        ({"device": "cuda", "dtype": "bf16", "spec": WIDE}, "no fused attention here"),
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
    made = setting("elo_pretrain", graph=True)
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
    assert "NOT THE SAME SETTING" in said and "\n  elo_pretrain, graph: on in A, off in B\n" in said
    assert "NOT THE SAME" not in "\n".join(compare(kept["with"], kept["with"]))


def test_the_presets_can_be_graphs_where_a_card_has_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_arms.ops, "why_not_padded", lambda dtype, E, softcap: None)
    for name in ("smollm2-135m", "llama-3.2-1b"):
        spec = preset_spec(name)
        made = setting("elo_pretrain", device="cuda", dtype="bf16", spec=spec, graph=True)
        others = replace(made, arm="engine_full"), replace(made, arm="transformers_full", graph=False)
        graph_arms.require([made, *others])
