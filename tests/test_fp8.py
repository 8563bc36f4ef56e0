"""`pretrain.fp8`: where it is refused, what is checked before training, and that training with it goes on and resumes.

The products are emulated here, as ELO_FP8=emulated asks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from elo_engine import fp8_check
from elo_engine.config import Recompute, load_config
from elo_engine.data import Mixture, TokenStore
from elo_engine.doctor import examine
from elo_engine.errors import RefusedError, UsageError
from elo_engine.levers import stage_setting
from elo_engine.measure import memory_engine_head, memory_engine_mlp, memory_fp8
from elo_engine.measure.cards import CARDS, find_card
from elo_engine.measure.expected import card_rate, stage_seconds
from elo_engine.measure.ledger import Ledger
from elo_engine.measure.memory_engine import EngineStep
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Setting
from elo_engine.model import ops, reference_fp8
from elo_engine.model.ops.quantize_fp8 import EMULATE
from elo_engine.model.presets import preset_spec
from elo_engine.plan import Subject, Target, make_plan
from elo_engine.train.loop import to_batch

from .test_loop import shallow

Tree = dict[str, Any]
Elo = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


@pytest.fixture
def config(run_tree: Tree, write_config: Callable[..., Path]) -> Path:
    run_tree |= {"dtype": "bf16"}
    run_tree["pretrain"]["fp8"] = "head"
    run_tree["evaluate"]["whole"] = False
    return write_config(run_tree)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMULATE, "emulated")


@pytest.fixture
def mixture(shards: dict[str, str]) -> Mixture:
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    return Mixture(stores, {"ja": 9.0, "en": 1.0}, 32, 42)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record.get("event") == name]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss_nats"] for record in map(json.loads, lines) if "step_s" in record]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_a_machine_without_such_products_is_refused(elo: Elo, config: Path) -> None:
    status, said = elo("pretrain", config)
    assert status == 3
    flat = " ".join(said.split())
    for part in ("pretrain.fp8: head", "a cpu has no such products", "pretrain.fp8: none, which is bf16", "no int8",
                 "ELO_FP8=emulated"):  # fmt: skip
        assert part in flat, f"{part!r} is not in {flat}"


def test_an_older_card_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(RefusedError, match=r"A100-SXM4-80GB has compute capability 8\.0, and .*8\.9.*which is bf16"):
        ops.require_fp8("all", torch.device("cuda"), torch.bfloat16, {})
    assert "none here, NVIDIA A100" in ops.describe_fp8(torch.device("cuda"))


def test_a_torch_that_cannot_is_refused_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    real = torch.ones

    def refuses(*args: Any, **named: Any) -> Any:
        raise RuntimeError("row-wise scaling is not built in")

    monkeypatch.setattr(torch, "ones", lambda *shape, device: real(*shape))  # there is no such device here
    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(RefusedError, match="cannot multiply them on NVIDIA H200: row-wise scaling is not built in"):
        ops.require_fp8("head", torch.device("cuda"), torch.bfloat16, {})


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        (torch.float32, {}, "computes in float32; set dtype: bf16"),
        (torch.bfloat16, {"width": 40, "MLP width": 96}, "multiples of 16, and this model has width 40;"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(
    dtype: torch.dtype, sizes: dict[str, int], message: str, emulated: None
) -> None:
    with pytest.raises(RefusedError, match=message):
        ops.require_fp8("head", CPU, dtype, sizes)


def test_a_head_that_learns_is_refused(elo: Elo, config: Path) -> None:
    status, said = elo("plan", config, "align.when=interleaved")
    assert status == 2 and "the head" in " ".join(said.split()) and "align.when: after" in " ".join(said.split())
    status, said = elo("plan", config, "align.fp8=head")
    assert status == 2 and "align.fp8: unknown key" in " ".join(said.split())
    assert elo("search", config, "pretrain.fp8=head")[0] == 2


@pytest.mark.parametrize("fp8", ["head", "all"])
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_it_trains_and_says_what_it_found_first(
    fp8: str, recompute: str, elo: Elo, config: Path, run_tree: Tree, emulated: None
) -> None:
    beside = f"pretrain.recompute={recompute}"
    status, said = elo("pretrain", config, f"pretrain.fp8={fp8}", beside)
    assert status == 0, said
    run = Path(run_tree["output"])
    (found,) = events(run, "fp8 checked")
    assert found["emulated"] and found["products"] == fp8 and found["head_bytes"] > 0
    assert f"fp8 ({fp8}) on the first micro-batch: loss" in (run / "log.txt").read_text(encoding="utf-8")
    assert len(found["gradients"]) == 13  # the leaves of two layers, and all as one
    for part, apart in found["gradients"].items():
        assert 0 < apart["relative"] < 0.3 and 0.95 < apart["cosine"] < 1, (part, apart)
    other = run.with_name("bf16")
    assert elo("pretrain", config, "pretrain.fp8=none", beside, f"output={other}")[0] == 0
    assert events(other, "fp8 checked") == []
    ours, theirs = losses(run), losses(other)
    assert len(ours) == 6 and ours != theirs
    assert all(abs(a - b) < 0.05 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_a_resumed_run_is_the_same_run(elo: Elo, config: Path, run_tree: Tree, emulated: None) -> None:
    beside = "pretrain.fp8=all"
    assert elo("pretrain", config, beside)[0] == 0
    run = Path(run_tree["output"])
    last, before = (run / "pretrain" / f"step-{step:08d}" for step in (6, 4))
    first = load_file(last / "weights.safetensors")
    shutil.rmtree(last)
    assert before.exists()
    assert elo("pretrain", config, beside, "--resume", "auto")[0] == 0
    again = load_file(last / "weights.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert elo("pretrain", config, "pretrain.fp8=head", "--resume", "auto")[0] == 3, "another computation went on"


def test_evaluation_is_in_bf16(untied: Path, mixture: Mixture, emulated: None) -> None:
    model = shallow(untied, torch.bfloat16)
    batch = to_batch(mixture.rows(0, 2), CPU)
    scored, trained = model.token_losses(batch), float(model.loss_sum(batch).detach())
    model.use_fp8("all")
    assert torch.equal(model.token_losses(batch), scored) and float(model.loss_sum(batch).detach()) != trained
    assert sum(tensor.nbytes for tensor in model.fp8_tensors) == 2 * model.head_VD.nbytes + 20 * model.spec.D + (
        24 * (2 * 2 * model.spec.V + 8)  # of 48 columns half are outliers, twice behind the rows in bf16
    )
    model.fp8 = "none"
    assert float(model.loss_sum(batch).detach()) == trained


def check(folder: Path, mixture: Mixture, fp8: str = "head") -> fp8_check.Check:
    model = shallow(folder, torch.bfloat16)
    rows = mixture.rows(0, 2)
    model.use_fp8(fp8, to_batch(rows, CPU))
    found = fp8_check.compare(model, rows)
    assert model.fp8 == fp8 and all(leaf.tensor.grad is None for leaf in model.leaves)
    return found


def test_a_check_that_finds_nothing_wrong(untied: Path, mixture: Mixture, emulated: None) -> None:
    assert check(untied, mixture, "head").faults() == [] and check(untied, mixture, "all").faults() == []


def _twice(right: Any) -> Any:
    return lambda *args, **named: right(*args, **named) * 2


def _no_target(right: Any) -> Any:
    """The target's term left out of the gradient: added once more, with the other sign."""

    def wrong(hidden: Any, head: Any, *made_of: Any, **named: Any) -> Any:
        *_, mean, _, labels = made_of
        losses_N, d_ND = right(hidden, head, *made_of, **named)
        target = -torch.expm1(-losses_N)[:, None] * (head[labels.clamp_min(0)].float() - mean)
        return losses_N, (d_ND + target.where(labels[:, None] >= 0, 0.0)).to(d_ND.dtype)

    return wrong


def _nan(right: Any) -> Any:
    return lambda *args, **named: right(*args, **named) * torch.nan


@pytest.mark.parametrize(
    ("where", "plant"),
    [
        ("rounded_rows", _twice),
        ("linear_cross_entropy_fp8", _no_target),
        ("rounded_tensor", _twice),
        ("rounded_tensor", _nan),
    ],
    ids=["scale twice", "no target", "layers' scale twice", "not finite"],
)
def test_a_planted_error_is_refused_before_training(
    where: str, plant: Any, untied: Path, mixture: Mixture, emulated: None, monkeypatch: pytest.MonkeyPatch,
    elo: Elo, config: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(reference_fp8, where, plant(getattr(reference_fp8, where)))
    kind = "all" if where == "rounded_tensor" else "head"
    assert check(untied, mixture, kind).faults()
    status, said = elo("pretrain", config, f"pretrain.fp8={kind}")
    flat = " ".join(said.split())
    assert status == 3 and "more than rounding to 8 bits explains" in flat and "none, which is bf16" in flat


# -- the plan

SPEC = preset_spec("llama-3.1-8b")


def setting(fp8: Any, spec: Any = SPEC, **fields: Any) -> Setting:
    fields = {"recompute": "layer"} | fields
    return Setting("elo_pretrain", spec, (0, spec.layers - 1), 8192, 1, fp8=fp8, **fields)


def test_the_plan_has_the_head_twice_in_8_bits() -> None:
    before, after = (predict_memory(setting(fp8)).components for fp8 in ("none", "head"))
    assert after["weights"] - before["weights"] == 2 * SPEC.V * (SPEC.D + 64) + 4 * (SPEC.V + 6 * SPEC.D) + 8 * 64
    rest = {name: after[name] - before[name] for name in before if name not in ("weights", "slack", "loss workspace")}
    assert set(rest.values()) == {0}
    assert predict_memory(setting("all")).peak_bytes >= predict_memory(setting("head")).peak_bytes


def test_the_plans_workspace_is_the_launchers() -> None:
    kernel = pytest.importorskip("elo_engine.kernels.linear_cross_entropy_fp8")
    for N, V in ((8192, 128256), (4096, 50257), (100, 128256)):
        assert memory_engine_head.gpu_chunk(N, V, 3) == kernel.LAUNCH.chunk(N, V, 3)
        spec = preset_spec("llama-3.1-8b")
        made, ledger = setting("head"), Ledger()
        made = Setting("elo_pretrain", spec, (0, 31), N, 1, fp8="head")
        ledger.moment = "loss"
        memory_engine_head.forward(made, ledger, learns=False)
        assert ledger.peak_bytes == kernel.workspace_bytes(N, spec.D, spec.V, 64)
    assert memory_fp8.padded(50257) == kernel.LAUNCH.stride(50257) == 50272
    counts = [memory_fp8.outliers(D) for D in (16, 48, 64, 576, 2048, 3584, 4096)]
    assert counts == [reference_fp8.outlier_count(D) for D in (16, 48, 64, 576, 2048, 3584, 4096)]
    assert counts == [8, 24, 32, 32, 32, 56, 64]


def test_products_of_a_layer_are_entered_in_full() -> None:
    """Rounded operands beside a projection's result, and three of them in its backward pass."""
    ledger = Ledger()
    products = memory_fp8.Fp8Products(setting("all"), ledger)
    out = products.out(2 * 8192 * 6144, 4096)
    assert ledger.peak_bytes == 2 * 8192 * 6144 + 8192 * 4096 + 6144 * 4096 and out.bytes == ledger.live_bytes
    ledger.drop(out)
    products.backward(28672, 4096)
    assert ledger.peak_bytes == 2 * 8192 * 28672 + 28672 * 4096 and ledger.live_bytes == 0
    ledger = Ledger()
    memory_fp8.Fp8Products(setting("head"), ledger).backward(28672, 4096)
    assert ledger.peak_bytes == 0


def test_products_that_are_made_again_have_their_operands_too() -> None:
    found, N = {}, 8192
    for fp8 in ("head", "all"):
        ledger = Ledger()
        step = EngineStep(setting(fp8, recompute="selective"), ledger)
        memory_engine_mlp.forward_selective(step, ledger.add("activations", step.ND))
        forward, backward = ledger.peak_bytes, Ledger()
        step = EngineStep(setting(fp8, recompute="selective"), backward)
        memory_engine_mlp.backward_again(step, 0, backward.add("activations", 0))
        found[fp8] = forward, backward.peak_bytes
    # act(gate) * up and the down projection; the gradient of [gate | up] in both layouts and that projection the other
    # way around, when the gradients of the norm, with which it is at its highest in bf16, are not there yet
    assert found["all"][0] - found["head"][0] == (N + SPEC.D) * SPEC.F
    assert found["all"][1] - found["head"][1] == 2 * N * 2 * SPEC.F + 2 * SPEC.F * SPEC.D - 2 * (N + 1) * SPEC.D


@pytest.mark.parametrize(
    ("preset", "head", "every"),
    [("llama-3.1-8b", (1.16, 1.20), (1.47, 1.53)), ("smollm2-135m", (1.22, 1.26), (1.34, 1.39))],
)
def test_seconds_are_those_of_the_assumed_rate(
    preset: str, head: tuple[float, float], every: tuple[float, float]
) -> None:
    rate, spec = card_rate(find_card("h200")), preset_spec(preset)
    bf16, one, both = (
        stage_seconds(Setting("elo_pretrain", spec, (0, spec.layers - 1), 8192, 1, fp8=fp8), 1, rate)
        for fp8 in ("none", "head", "all")
    )
    assert head[0] < bf16 / one < head[1] and every[0] < bf16 / both < every[1]


@pytest.fixture
def large(run_tree: Tree, write_config: Callable[..., Path]) -> Path:
    run_tree["data"]["sequence_length"] = 8192
    for stage in ("pretrain", "align"):
        run_tree[stage] |= {"tokens": 2**19, "tokens_per_step": 2**18, "micro_batch": 1}
    run_tree |= {"device": "auto", "dtype": "auto"}
    run_tree["pretrain"] |= {"recompute": "layer", "optimizer": {"state": "8bit"}, "fp8": "head"}
    return write_config(run_tree)


def planned(config: Path, card: str) -> dict[str, Any]:
    return make_plan(load_config(config), Subject.preset("llama-3.1-8b"), Target.card(find_card(card)))


def test_a_plan_for_a_card_without_8_bit_floats_is_a_refusal(large: Path) -> None:
    (said,) = [text for text in planned(large, "a100")["refusals"] if "fp8" in text]
    assert "8-bit floats" in said and "a100-80gb" in said and "none, which is bf16" in said
    assert not any("fp8" in text for text in planned(large, "h100")["refusals"])
    without = [card.name for card in CARDS if not card.fp8]
    assert without == ["rtx-3060", "rtx-3090", "a10", "rtx-a6000", "a100-40gb", "a100-80gb", "a100-80gb-pcie"]


def test_a_plan_that_does_not_fit_names_the_lever(large: Path) -> None:
    advice = planned(large, "rtx-4060-ti-8gb")["pretrain"]["advice"]
    levers = {lever["override"]: lever["saves_bytes"] for lever in advice["levers"]}
    assert levers["pretrain.fp8=none"] > 2 * SPEC.V * SPEC.D


def test_only_pretraining_has_it(large: Path) -> None:
    loaded = load_config(large)
    found = [stage_setting(loaded, stage, SPEC, "cuda", "bf16").fp8 for stage in ("pretrain", "align")]
    assert found == ["head", "none"]
    together = load_config(large, ["align.when=interleaved", "align.optimizer.state=8bit"])
    with pytest.raises(UsageError, match="the head learns"):
        stage_setting(together, "align", SPEC, "cuda", "bf16")


def test_the_doctor_says_whether_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert "! fp8: none here, a cpu has no such products" in examine()[1]
    monkeypatch.setenv(EMULATE, "emulated")
    assert any(line.startswith("fp8: emulated") for line in examine()[1])
