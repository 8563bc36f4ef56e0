"""Whether pretraining's steps are graphs: what is chosen, what is refused by name, and what the plan counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from elo_engine import graphs
from elo_engine.config import changed_keys, load_config
from elo_engine.errors import RefusedError, UsageError
from elo_engine.levers import stage_setting
from elo_engine.measure.cards import find_card
from elo_engine.measure.memory_shapes import FEWEST_DOCUMENTS, padded_documents, step_buffer_bytes
from elo_engine.measure.planner import predict_memory
from elo_engine.model.ops import attention, choice, why_not_padded
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec, RopeSpec
from elo_engine.plan import Subject, Target, make_plan
from elo_engine.train import step_buffers
from elo_engine.train.graphed import GraphedEngine
from elo_engine.train.resident import ResidentEngine

Tree = dict[str, Any]
SPEC = preset_spec("llama-3.1-8b")


@pytest.fixture
def config(run_tree: Tree, write_config: Callable[..., Path]) -> Path:
    run_tree["data"]["sequence_length"] = 8192
    for stage in ("pretrain", "align"):
        run_tree[stage] |= {"tokens": 2**19, "tokens_per_step": 2**18, "micro_batch": 1}
    run_tree |= {"device": "auto", "dtype": "auto"}
    run_tree["pretrain"] |= {"optimizer": {"state": "8bit"}}
    return write_config(run_tree)


def longrope(short: int = 4096) -> ModelSpec:
    return replace(SPEC, ropes=(RopeSpec(1e4, "longrope", {"original_max_position_embeddings": short}),))


@pytest.mark.parametrize(
    ("overrides", "spec", "device", "dtype", "told"),
    [
        ((), SPEC, "cpu", "fp32", "CUDA graphs are of GPUs, and this is for cpu"),
        ((), SPEC, "cuda", "fp32", "flash attention takes bf16"),
        (("dtype=fp32",), SPEC, "cuda", "bf16", "flash attention takes bf16"),
        (("align.when=interleaved",), SPEC, "cuda", "bf16", "align.when: interleaved takes turns"),
        (("pretrain.embedding=host",), SPEC, "cuda", "bf16", "pretrain.embedding: host would need the rows"),
        (("pretrain.optimizer.master=24",), SPEC, "cuda", "bf16", "optimizer.master: 24 draws"),
        ((), longrope(), "cuda", "bf16", "longrope chooses its angles"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(
    overrides: tuple[str, ...], spec: ModelSpec, device: str, dtype: str, told: str, config: Path
) -> None:
    same = ["align.optimizer.state=8bit"] if "interleaved" in "".join(overrides) else []
    auto, on, off = (load_config(config, [*overrides, *same, f"pretrain.graph={how}"]) for how in ("auto", "on", "off"))
    assert told in (graphs.why_not(auto, spec, device, dtype) or "")
    assert not stage_setting(auto, "pretrain", spec, device, dtype).graph
    assert not stage_setting(off, "pretrain", spec, device, dtype).graph
    with pytest.raises(UsageError, match=f"pretrain.graph: on, but {told}.*; set pretrain.graph: off, or auto"):
        stage_setting(on, "pretrain", spec, device, dtype)


def test_what_can_be_captured_is(config: Path) -> None:
    for how, graph in (("auto", True), ("on", True), ("off", False)):
        loaded = load_config(config, [f"pretrain.graph={how}"])
        assert stage_setting(loaded, "pretrain", SPEC, "cuda", "bf16").graph is graph
        assert not stage_setting(loaded, "align", SPEC, "cuda", "bf16").graph
    assert graphs.why_not(load_config(config), longrope(8192), "cuda", "bf16") is None, "no document is longer"


def test_it_may_change_between_a_run_and_its_continuation(config: Path) -> None:
    """The numbers are the same."""
    assert changed_keys(load_config(config), load_config(config, ["pretrain.graph=auto"])) == []


def test_the_plan_counts_the_buffers_of_a_step(config: Path) -> None:
    """Ids, labels, positions of 2^18 tokens are 6 MiB; what a micro-batch had of its own is not there any more."""
    with_graph, without = (
        stage_setting(load_config(config, [f"pretrain.graph={how}"]), "pretrain", SPEC, "cuda", "bf16")
        for how in ("on", "off")
    )
    offsets = 4 * 32 * (FEWEST_DOCUMENTS + 1)
    assert step_buffer_bytes(with_graph) == 3 * 8 * 2**18 + offsets + 16 and step_buffer_bytes(without) == 0
    more = predict_memory(with_graph).components["activations"] - predict_memory(without).components["activations"]
    buffers, own = step_buffer_bytes(with_graph), 3 * 8 * 8192
    # at the highest moment of this step, the loss, the last micro-batch's ids and positions are alive beside its own
    assert buffers - 2 * own <= more <= buffers + 4 * 128 * (FEWEST_DOCUMENTS - 1) * SPEC.H * SPEC.E, (more, buffers)
    subject, card, wanted = Subject.preset("llama-3.1-8b"), Target.card(find_card("h200")), ["pretrain.graph=auto"]
    planned = make_plan(load_config(config, wanted), subject, card)
    assert planned["pretrain"]["graph"] == {"used": True, "buffer_bytes": buffers, "why_not": None}
    planned = make_plan(load_config(config, wanted), subject, Target("cpu", "fp32"))
    assert "CUDA graphs are of GPUs" in planned["pretrain"]["graph"]["why_not"]
    assert make_plan(load_config(config), subject, card)["pretrain"]["graph"]["used"] is False, "not unless asked for"


@pytest.mark.parametrize(("rows", "documents"), [(1, 16), (16, 16), (17, 32), (40, 64)])
def test_room_for_documents_is_what_the_buffers_make(rows: int, documents: int, config: Path) -> None:
    assert FEWEST_DOCUMENTS == step_buffers.FEWEST_DOCUMENTS
    setting = stage_setting(load_config(config, ["pretrain.graph=auto"]), "pretrain", SPEC, "cuda", "bf16")
    assert padded_documents(replace(setting, micro_batch=rows)) == documents
    assert padded_documents(replace(setting, micro_batch=rows, graph=False)) == rows


class Model:
    """What the choice looks at."""

    spec, device, dtype = SPEC, torch.device("cuda"), torch.bfloat16
    embedding_VD = torch.zeros(1)
    observers = MappingProxyType[int, Any]({})
    host_embedding_VD = None


def engine(config: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(graphs, "CudaCaptures", lambda device: None)
    monkeypatch.setattr(graphs, "GraphedEngine", lambda *args, must: SimpleNamespace(graphed=True, must=must))
    made = graphs.pretrain_engine(load_config(config, [f"pretrain.graph={how}"]), Model(), None, said.append)  # type: ignore[arg-type]
    return made, said


def test_the_engine_follows_the_choice(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: None)
    for how, must in (("auto", False), ("on", True)):
        made, said = engine(config, how, monkeypatch)
        assert made.graphed and made.must is must and said == []
    made, said = engine(config, "off", monkeypatch)
    assert type(made) is ResidentEngine and said == []


def test_what_this_machine_lacks_is_told_or_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: "it lacks something")
    made, said = engine(config, "auto", monkeypatch)
    told = "steps are launched kernel by kernel: it lacks something"
    assert type(made) is ResidentEngine and said == [f"pretrain: {told}"]
    with pytest.raises(RefusedError, match=r"pretrain.graph: on, but it lacks something; set"):
        engine(config, "on", monkeypatch)


def test_what_a_machine_can_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Model()
    # as where torch has variable-length attention and flash-attn is not installed
    monkeypatch.setattr(attention_module(), "_flash_attn_parameters", lambda: frozenset())
    monkeypatch.setattr(attention_module(), "_varlen_parameters", lambda: frozenset({"window_size", "scale"}))
    monkeypatch.setattr(choice, "_HAS_TRITON", True)
    assert graphs.why_not_here(model) is None
    monkeypatch.setattr(graphs.world, "size", lambda: 2)
    assert "several processes" in (graphs.why_not_here(model) or "")
    assert "capped at 50" in (why_not_padded(torch.bfloat16, 128, 50.0) or "")
    assert "heads of 512" in (why_not_padded(torch.bfloat16, 512, None) or "")
    assert "in float32" in (why_not_padded(torch.float32, 128, None) or "")
    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    assert "triton is not installed" in (why_not_padded(torch.bfloat16, 128, None) or "")
    monkeypatch.setattr(choice, "_mode", "reference")
    assert "kernels: reference" in (why_not_padded(torch.bfloat16, 128, None) or "")


def attention_module() -> Any:
    import importlib

    return importlib.import_module("elo_engine.model.ops.attention")


def test_on_a_cpu_auto_says_nothing_and_on_is_refused(
    elo: Callable[..., tuple[int, str]], run_tree: Tree, write_config: Callable[..., Path]
) -> None:
    run_tree["pretrain"]["tokens"] = 256
    config = write_config(run_tree)
    status, shown = elo("pretrain", config)
    assert status == 0 and "graph" not in shown
    status, shown = elo("pretrain", config, "pretrain.graph=on", f"output={run_tree['output']}-2")
    assert status == 2 and "pretrain.graph: on, but CUDA graphs are of GPUs, and this is for cpu" in shown
    assert not Path(f"{run_tree['output']}-2", "pretrain").exists(), "nothing was trained"


class Counted(GraphedEngine):
    """Steps as without graphs, which the CPU can make; how often room was made."""

    made = 0

    def step(self, *args: Any, **rest: Any) -> Any:
        return ResidentEngine.step(self, *args, **rest)

    def let_go(self) -> None:
        Counted.made += 1


def test_room_is_made_before_every_evaluation(
    elo: Callable[..., tuple[int, str]], run_tree: Tree, write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from elo_engine import pretrain

    def make(config: Any, model: Any, optimizer: Any, say: Any) -> Counted:
        return Counted(model, optimizer, config.pretrain.micro_batch, None, say)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "pretrain_engine", make)
    status, shown = elo("pretrain", write_config(run_tree))  # six steps, an evaluation after three
    assert status == 0, shown
    assert Counted.made == 1


def test_it_is_the_same_class(config: Path) -> None:
    """Whatever looks at a stage's engine finds a resident one: what is held, the snapshot, the scorer."""
    assert issubclass(GraphedEngine, ResidentEngine) and attention.__name__ == "attention"
