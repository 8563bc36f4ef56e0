"""Whether a stage's steps are graphs: what is chosen, what is refused by name, and what the plan counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from elo_engine import graphs
from elo_engine.config import changed_keys, load_config
from elo_engine.errors import RefusedError, UsageError
from elo_engine.levers import stage_setting
from elo_engine.measure.cards import find_card
from elo_engine.measure.memory_shapes import FEWEST_DOCUMENTS, outer_rows, padded_documents, step_buffer_bytes
from elo_engine.measure.planner import predict_memory
from elo_engine.model.ops import attention, choice, why_not_padded
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec, RopeSpec
from elo_engine.plan import Subject, Target, make_plan
from elo_engine.plan_refusals import refusals
from elo_engine.plan_text import describe_plan
from elo_engine.train import step_buffers
from elo_engine.train.graphed import GraphedEngine, Graphing
from elo_engine.train.resident import ResidentEngine

Tree = dict[str, Any]
STAGES = pytest.mark.parametrize("stage", ["pretrain", "align"])
EIGHT = ["pretrain.optimizer.state=8bit", "align.optimizer.state=8bit"]
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


BOTH, PRETRAIN, ALIGN = ("pretrain", "align"), ("pretrain",), ("align",)


@pytest.mark.parametrize(
    ("stages", "overrides", "spec", "device", "dtype", "told"),
    [
        (BOTH, (), SPEC, "cpu", "fp32", "CUDA graphs are of GPUs, and this is for cpu"),
        (BOTH, (), SPEC, "cuda", "fp32", "flash attention takes bf16"),
        (BOTH, ("dtype=fp32",), SPEC, "cuda", "bf16", "flash attention takes bf16"),
        (PRETRAIN, ("pretrain.embedding=host",), SPEC, "cuda", "bf16", "pretrain.embedding: host would need the rows"),
        (PRETRAIN, ("pretrain.optimizer.master=24",), SPEC, "cuda", "bf16", "optimizer.master: 24 draws"),
        (ALIGN, ("align.optimizer.master=24",), SPEC, "cuda", "bf16", "optimizer.master: 24 draws"),
        (ALIGN, ("align.engine=streamed",), SPEC, "cuda", "bf16", "the streamed engine brings layer after layer"),
        (BOTH, (), longrope(), "cuda", "bf16", "longrope chooses its angles"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(
    stages: tuple[graphs.Stage, ...], overrides: tuple[str, ...], spec: ModelSpec, device: str, dtype: str, told: str,
    config: Path,
) -> None:  # fmt: skip
    for stage in ("pretrain", "align"):
        auto, on, off = (
            load_config(config, [*EIGHT, *overrides, f"{stage}.graph={how}"]) for how in ("auto", "on", "off")
        )
        assert not stage_setting(off, stage, spec, device, dtype).graph
        if stage not in stages:  # what keeps one stage from it does not keep the other
            assert stage_setting(on, stage, spec, device, dtype).graph
            continue
        assert told in (graphs.why_not(auto, stage, spec, device, dtype) or "")
        assert not stage_setting(auto, stage, spec, device, dtype).graph
        with pytest.raises(UsageError, match=f"{stage}.graph: on, but {told}.*; set {stage}.graph: off, or auto"):
            stage_setting(on, stage, spec, device, dtype)


@STAGES
def test_what_can_be_captured_is(stage: graphs.Stage, config: Path) -> None:
    other: graphs.Stage = "align" if stage == "pretrain" else "pretrain"
    for how, graph in (("auto", True), ("on", True), ("off", False)):
        loaded = load_config(config, [f"{stage}.graph={how}"])
        assert stage_setting(loaded, stage, SPEC, "cuda", "bf16").graph is graph
        assert not stage_setting(loaded, other, SPEC, "cuda", "bf16").graph
    assert graphs.why_not(load_config(config), stage, longrope(8192), "cuda", "bf16") is None, "no document is longer"


def test_it_may_change_between_a_run_and_its_continuation(config: Path) -> None:
    """The numbers are the same."""
    both = ["pretrain.graph=auto", "align.graph=on"]
    assert changed_keys(load_config(config), load_config(config, both)) == []


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
    assert planned["pretrain"]["graph"] == {"used": True, "buffer_bytes": buffers, "why_not": None, "refusal": None}
    planned = make_plan(load_config(config, wanted), subject, Target("cpu", "fp32"))
    assert "CUDA graphs are of GPUs" in planned["pretrain"]["graph"]["why_not"]
    assert make_plan(load_config(config), subject, card)["pretrain"]["graph"]["used"] is False, "not unless asked for"


def test_the_plan_counts_the_buffers_of_a_whole_models_step(config: Path) -> None:
    """Beside those of pretraining 8 bytes for each row of the embedding's gradient: 128256 are less than 2^18 tokens.
    The rows themselves were counted as an upper bound, and now are that many.
    """
    with_graph, without = (
        stage_setting(load_config(config, [*EIGHT, f"align.graph={how}"]), "align", SPEC, "cuda", "bf16")
        for how in ("on", "off")
    )
    assert outer_rows(with_graph) == outer_rows(without) == SPEC.V
    shallow = stage_setting(load_config(config, ["pretrain.graph=on"]), "pretrain", SPEC, "cuda", "bf16")
    assert step_buffer_bytes(with_graph) - step_buffer_bytes(shallow) == 8 * SPEC.V and step_buffer_bytes(without) == 0
    short = replace(with_graph, micro_batches=1)
    assert step_buffer_bytes(short) - step_buffer_bytes(replace(short, arm="elo_pretrain")) == 8 * 8192
    made = step_buffers.StepBuffers(32, 64, 1, torch.device("meta"), 304).distinct_U
    assert made is not None and len(made) == outer_rows(replace(with_graph, spec=replace(SPEC, V=304))) == 304
    one, other = predict_memory(with_graph), predict_memory(without)
    assert one.components["gradients"] == other.components["gradients"]
    more, buffers = one.components["activations"] - other.components["activations"], step_buffer_bytes(with_graph)
    # what a micro-batch had of its own, and the rows' ids, are there already
    own, sums = 2 * 3 * 8 * 8192 + 8 * SPEC.V, 4 * 128 * (FEWEST_DOCUMENTS - 1) * SPEC.H * SPEC.E
    assert buffers - own <= more <= buffers + sums


def planned(config: Path, card: str, *overrides: str) -> dict[str, Any]:
    subject, target = Subject.preset("llama-3.1-8b"), Target.card(find_card(card))
    return make_plan(load_config(config, [*EIGHT, *overrides]), subject, target)


def test_an_alignment_that_does_not_fit_resident_has_no_graphs(config: Path) -> None:
    """The engine is chosen by the memory: `auto` tells why not, `on` is refused as what does not fit is."""
    large = planned(config, "h200", "align.graph=on")
    assert large["align"]["graph"]["used"] and large["align"]["graph"]["refusal"] is None and not large["refusals"]
    assert large["align"]["engine"]["name"] == "resident"
    told = planned(config, "rtx4090", "align.graph=auto")
    assert told["align"]["engine"]["name"] == "streamed" and not told["align"]["graph"]["used"]
    assert told["align"]["graph"]["why_not"] == graphs.LAYER_BY_LAYER and told["align"]["graph"]["refusal"] is None
    refused = planned(config, "rtx4090", "align.graph=on")
    (text,) = refusals(refused, "align")
    assert text in refused["refusals"] and "align.graph: on, but the streamed engine" in text and "does not fit" in text
    assert not refusals(planned(config, "rtx4090"), "align")
    lines = "\n".join(describe_plan(large))
    assert "align's steps are CUDA graphs, fed from 7." in lines and "pretrain.graph: off" in lines


def test_engines_that_have_no_graphs_say_so_or_refuse(config: Path) -> None:
    for stage in ("pretrain", "align"):
        for how, device, expected in (("auto", "cuda", 1), ("auto", "cpu", 0), ("off", "cuda", 0)):
            said: list[str] = []
            loaded = load_config(config, [f"{stage}.graph={how}"])
            graphs.launched(loaded, stage, graphs.SEVERAL, torch.device(device), said.append)
            assert len(said) == expected and all(f"{stage}: steps are launched" in text for text in said)
        with pytest.raises(RefusedError, match=rf"{stage}.graph: on, but several processes.*; set {stage}.graph"):
            loaded = load_config(config, [f"{stage}.graph=on"])
            graphs.launched(loaded, stage, graphs.SEVERAL, torch.device("cuda"), said.append)


@pytest.mark.parametrize(("choice", "told"), [("sharded", "several processes"), ("streamed", "the streamed engine")])
def test_alignment_asks_before_it_loads(choice: str, told: str, config: Path) -> None:
    from elo_engine import align

    run = SimpleNamespace(
        config=load_config(config, ["align.graph=on"]), say=lambda text: None, beating=lambda *rest: None
    )
    source: Any = SimpleNamespace(spec=SPEC, device=torch.device("cuda"))
    chosen: Any = SimpleNamespace(engine=choice, streaming=choice)
    with pytest.raises(RefusedError, match=f"align.graph: on, but {told}"):
        align._load(run, source, None, chosen, None)  # type: ignore[arg-type]


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


def engine(
    config: Path, how: str, monkeypatch: pytest.MonkeyPatch, stage: graphs.Stage = "pretrain"
) -> tuple[Any, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(graphs, "CudaCaptures", lambda device: None)
    monkeypatch.setattr(graphs, "GraphedEngine", lambda *args: SimpleNamespace(graphed=True, how=args[-1]))
    loaded = load_config(config, [f"{stage}.graph={how}", *EIGHT])
    made = graphs.resident_engine(loaded, stage, Model(), None, said.append)  # type: ignore[arg-type]
    return made, said


@STAGES
def test_the_engine_follows_the_choice(stage: graphs.Stage, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: None)
    for how, must in (("auto", False), ("on", True)):
        made, said = engine(config, how, monkeypatch, stage)
        assert made.graphed and made.how.must is must and made.how.key == f"{stage}.graph" and said == []
    made, said = engine(config, "off", monkeypatch, stage)
    assert type(made) is ResidentEngine and said == []


@STAGES
def test_what_this_machine_lacks_is_told_or_refused(
    stage: graphs.Stage, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: "it lacks something")
    made, said = engine(config, "auto", monkeypatch, stage)
    told = "steps are launched kernel by kernel: it lacks something"
    assert type(made) is ResidentEngine and said == [f"{stage}: {told}"]
    with pytest.raises(RefusedError, match=rf"{stage}.graph: on, but it lacks something; set {stage}.graph: off"):
        engine(config, "on", monkeypatch, stage)


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

    made: ClassVar[dict[str, int]] = {}

    def step(self, *args: Any, **rest: Any) -> Any:
        return ResidentEngine.step(self, *args, **rest)

    def let_go(self) -> None:
        Counted.made[self._key] = Counted.made.get(self._key, 0) + 1


def test_room_is_made_before_every_evaluation(
    elo: Callable[..., tuple[int, str]], run_tree: Tree, write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from elo_engine import pretrain

    Counted.made.clear()

    def make(config: Any, stage: str, model: Any, optimizer: Any, say: Any) -> Counted:
        rows = getattr(config, stage).micro_batch
        return Counted(model, optimizer, rows, Graphing(None, say, key=f"{stage}.graph"))  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "resident_engine", make)
    monkeypatch.setattr(graphs, "resident_engine", make)
    run_tree["align"] |= {"tokens": 5 * 128, "tokens_per_step": 128}
    status, shown = elo("run", write_config(run_tree))  # six and five steps, an evaluation after three
    assert status == 0, shown
    assert Counted.made == {"pretrain.graph": 1, "align.graph": 1}


def test_it_is_the_same_class(config: Path) -> None:
    """Whatever looks at a stage's engine finds a resident one: what is held, the snapshot, the scorer."""
    assert issubclass(GraphedEngine, ResidentEngine) and attention.__name__ == "attention"
