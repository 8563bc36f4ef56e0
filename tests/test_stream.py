"""Layer-major training against resident training: the same bits in fp32, whatever is kept where."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_cases import CPU, ROWS, SPEC, Case, T, counter, differing, everything, never, step_rows

from elo_engine.config import OptimizerConfig
from elo_engine.errors import FailedError
from elo_engine.model import ops
from elo_engine.stream.lanes import Fence
from elo_engine.stream.layout import ALIGN, model_units
from elo_engine.stream.slabs import Slab

STEPS = 20
BITWISE = 6  # where a single bit is seen in the step that changes it: all that differs between steps has come by then


@pytest.fixture(autouse=True)
def _fast() -> Any:
    ops.configure("auto", CPU)
    yield
    ops.configure("auto", CPU)


def optimizer(state: Any = "fp32", clip: float | None = 0.5) -> OptimizerConfig:
    return OptimizerConfig(state=state, clip=clip, weight_decay=0.1)


@pytest.mark.parametrize("micro_batch", [ROWS, 2])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_equals_resident_bit_for_bit_in_fp32(tied: bool, state: str, micro_batch: int) -> None:
    case = Case(replace(SPEC, tied=tied), optimizer=optimizer(state), micro_batch=micro_batch)
    resident, streamed = case.resident(), case.streamed()
    there, here = case.steps(resident, 0, BITWISE), case.steps(streamed, 0, BITWISE)
    assert there == here
    assert sum(outcome.norm > 0.5 for outcome in there) >= BITWISE // 2, "clipping is to act"
    assert differing(everything(resident), everything(streamed)) == []


def test_a_looser_or_tighter_comparison_would_fail() -> None:
    """The comparison sees a single changed bit, and a step more or less."""
    case = Case()
    resident, streamed = case.resident(), case.streamed()
    case.steps(resident, 0, 2)
    case.steps(streamed, 0, 3)
    assert len(differing(everything(resident), everything(streamed))) > 50
    case.steps(resident, 2, 3)
    one, two = everything(resident), everything(streamed)
    assert differing(one, two) == []
    two["model.norm.weight"].view(torch.int32)[7] ^= 1
    assert differing(one, two) == ["model.norm.weight"]


@pytest.mark.parametrize(
    "streaming",
    [{"inputs": "host"}, {"store": "disk"}, {"store": "disk", "inputs": "host"}],
    ids=lambda streaming: "-".join(streaming.values()),
)
def test_where_things_are_kept_changes_no_bit(tmp_path: Path, streaming: dict[str, Any]) -> None:
    case = Case()
    resident, streamed = case.resident(), case.streamed(tmp_path, **streaming)
    assert case.steps(resident, 0, 4) == case.steps(streamed, 0, 4)
    assert differing(everything(resident), everything(streamed)) == []
    assert list(tmp_path.iterdir()) == [], "the file of the store has no name"


@pytest.mark.parametrize("tied", [True, False])
def test_at_once_without_clipping_equals_resident(tied: bool) -> None:
    case = Case(replace(SPEC, tied=tied), optimizer=optimizer(clip=None))
    resident, streamed = case.resident(), case.streamed(update="at_once")
    assert case.steps(resident, 0, 5) == case.steps(streamed, 0, 5)
    assert differing(everything(resident), everything(streamed)) == []


def test_at_once_clips_each_unit_by_its_own_norm() -> None:
    """The definition, written out with resident gradients: every unit scaled down to the limit by itself."""
    limit = 0.01
    case = Case(optimizer=OptimizerConfig(clip=limit, betas=(0.0, 0.0), eps=1.0))  # a step along the gradient
    streamed = case.streamed(update="at_once")
    resident = replace(case, optimizer=OptimizerConfig(clip=None)).resident()  # its gradients stay as they are
    before = everything(resident)
    case.steps(streamed, 0, 1)
    rows, model = step_rows(0), resident.model
    count = int((rows.labels_BT >= 0).sum())
    resident.step(rows, count, 0.0, first=True, should_stop=never)
    gradients = {name: grad for name, grad in resident.optimizer.gradients() if grad is not None}
    after = everything(streamed)
    units = [f"model.layers.{index}." for index in range(5)] + ["model.embed_tokens", "model.norm"]
    for unit in units:
        inside = [name for name in gradients if name.startswith(unit)]
        norm = torch.linalg.vector_norm(torch.cat([gradients[name].flatten() for name in inside]))
        assert inside and norm > limit, "clipping is to act on every unit"
        for name in inside:
            g = gradients[name] * (limit / norm)
            expected = before[name] - 1e-2 * g / (g.abs() + 1.0)
            assert torch.allclose(after[name], expected, rtol=0, atol=3e-8), name
    assert model.spec.tied


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("micro_batch", [ROWS, 2])
def test_bf16_differs_only_by_the_type_in_which_gradients_wait(state: str, micro_batch: int) -> None:
    """One step from equal weights: the waiting gradient is rounded to bf16 once (2^-9 of itself), nothing else is."""
    case = Case(dtype=torch.bfloat16, optimizer=optimizer(state), micro_batch=micro_batch)
    resident, streamed = case.resident(), case.streamed()
    (there,), (here,) = case.steps(resident, 0, 1), case.steps(streamed, 0, 1)
    assert there.loss_sum == here.loss_sum
    assert abs(there.norm - here.norm) <= 2**-9 * there.norm
    if state == "fp32":
        mine, theirs = everything(streamed), everything(resident)
        for name, moment in theirs.items():
            if name.startswith("exp_avg."):
                assert (mine[name] - moment).abs().max() <= 2**-7 * moment.abs().max(), name
    resident, streamed = case.resident(), case.streamed()
    case.lr = 1e-3
    there, here = case.steps(resident, 0, STEPS)[-1], case.steps(streamed, 0, STEPS)[-1]
    assert abs(there.loss_sum - here.loss_sum) < 0.002 * there.loss_sum


@pytest.mark.parametrize(("state", "inputs"), [("fp32", "device"), ("8bit", "host")])
def test_a_step_that_is_given_up_at_any_point_leaves_no_trace(state: str, inputs: str) -> None:
    """`should_stop` at every moment of the sweep: 1 question at its start, 9 forward, 3 at the head, 9 backward. Three
    layers, so that one lies between the first and the last.
    """
    case = Case(replace(SPEC, layers=3), optimizer=optimizer(state))
    resident, streamed = case.resident(), case.streamed(inputs=inputs)
    stops = dict(zip(range(2, 24), range(22), strict=True))
    there = case.steps(resident, 0, 24)
    here = case.steps(streamed, 0, 24, stops)
    assert there == here
    assert differing(everything(resident), everything(streamed)) == []
    with pytest.raises(AssertionError, match="step 24 ended"):  # there is no further moment
        case.steps(streamed, 24, 25, {24: 22})


@pytest.mark.parametrize("master", ["none", "24", "32"])
def test_masters_stream_bit_for_bit_where_no_gradient_is_rounded(master: Any) -> None:
    """bf16, one micro-batch, head and embedding apart: the waiting gradients are those that came."""
    config = OptimizerConfig(state="8bit", master=master, clip=0.5, weight_decay=0.1)
    case = Case(replace(SPEC, tied=False), torch.bfloat16, config, micro_batch=ROWS, lr=1e-4)
    resident, streamed = case.resident(), case.streamed()
    assert case.steps(resident, 0, 4) == case.steps(streamed, 0, 4)
    mine = everything(streamed)
    assert differing(everything(resident), mine) == []
    assert mine["model.norm.weight"].dtype == (torch.bfloat16 if master == "none" else torch.float32)


def test_a_snapshot_in_the_middle_of_waiting_updates_is_the_resident_one() -> None:
    """Flushed after every step, or after none, and resumed by the other engine."""
    case = Case(optimizer=optimizer("8bit"))
    resident, streamed = case.resident(), case.streamed()
    for number in range(3):
        case.steps(resident, number, number + 1)
        case.steps(streamed, number, number + 1)
        assert differing(everything(resident), everything(streamed)) == []
    resumed_resident, resumed_streamed = case.resident(), case.streamed()
    for fresh, before in ((resumed_resident, streamed), (resumed_streamed, resident)):
        fresh.optimizer.load(
            {name: tensor.clone() for name, tensor in before.optimizer.weights().items()},
            {name: tensor.clone() for name, tensor in before.optimizer.moments().items()},
        )
    ends = [case.steps(engine, 3, 6) for engine in (resident, streamed, resumed_resident, resumed_streamed)]
    assert all(end == ends[0] for end in ends)
    assert differing(everything(resumed_resident), everything(resumed_streamed)) == []
    assert differing(everything(resident), everything(resumed_streamed)) == []


def poison(engine: Any, value: float) -> None:
    """Make the next loss what it may not be, through a weight that is then put right again."""
    engine.flush()
    engine.store.views[engine.store.last]["weights"]["norm"][0] = value


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    case = Case(replace(SPEC, tied=False))
    resident, streamed = case.resident(), case.streamed()
    case.steps(resident, 0, 2)
    case.steps(streamed, 0, 2)
    before = everything(streamed)
    poison(streamed, float("inf"))
    rows = step_rows(2)
    outcome = streamed.step(rows, int((rows.labels_BT >= 0).sum()), 1e-2, first=False, should_stop=never)
    assert outcome is not None and not outcome.updated
    poison(streamed, float(before["model.norm.weight"][0]))
    assert differing(before, everything(streamed)) == ["attempts"], "the count of steps, by which later ones draw"
    assert case.steps(resident, 3, 5) == case.steps(streamed, 3, 5)


def test_at_once_breaks_off_for_good_when_a_number_is_not_finite() -> None:
    """What was updated before the bad number cannot be taken back, so nothing of it may reach a snapshot."""
    case = Case(optimizer=optimizer(clip=None))
    streamed = case.streamed(update="at_once")
    case.steps(streamed, 0, 1)
    poison(streamed, float("nan"))
    rows = step_rows(1)
    with pytest.raises(FailedError, match="start a new run"):
        streamed.step(rows, ROWS * T, 1e-2, first=False, should_stop=never)
    for hand_out in (streamed.optimizer.weights, streamed.optimizer.moments, streamed.flush):
        with pytest.raises(FailedError, match="start a new run"):
            hand_out()


def test_at_once_finishes_a_step_whose_backward_pass_has_begun() -> None:
    case = Case(optimizer=optimizer(clip=None))
    streamed = case.streamed(update="at_once")
    rows = step_rows(0)
    asked = counter(1 + 15 + 3)  # before the step, forward, head
    assert streamed.step(rows, ROWS * T, 1e-2, first=True, should_stop=asked) is not None
    asked = counter(1 + 15 + 2)
    assert streamed.step(rows, ROWS * T, 1e-2, first=False, should_stop=asked) is None


def test_the_first_step_names_what_does_not_learn() -> None:
    case = Case()
    streamed = case.streamed()
    streamed.store.views[2]["weights"]["gate_up"].zero_()  # then the norm before it gets no gradient
    rows = step_rows(0)
    with pytest.raises(FailedError, match=r"model\.layers\.2\.post_attention_layernorm\.weight is zero everywhere"):
        streamed.step(rows, ROWS * T, 1e-2, first=True, should_stop=never)


def test_the_definitions_stream_too() -> None:
    """`kernels: reference`: autograd has the head's gradient; the sums are close, in another order."""
    case = Case(micro_batch=ROWS)
    fast = case.steps(case.streamed(), 0, 3)
    ops.configure("reference", CPU)
    plain, resident = case.steps(case.streamed(), 0, 3), case.steps(case.resident(), 0, 3)
    for one, two, three in zip(fast, plain, resident, strict=True):
        assert one.loss_sum == pytest.approx(two.loss_sum, rel=1e-5) == pytest.approx(three.loss_sum, rel=1e-5)
        assert one.norm == pytest.approx(two.norm, rel=1e-3) == pytest.approx(three.norm, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_definitions_stream_in_bf16(tied: bool) -> None:
    """There a gradient is set aside when it arrives, the head's too."""
    case = Case(replace(SPEC, tied=tied), dtype=torch.bfloat16)
    fast = case.steps(case.streamed(), 0, 1)
    ops.configure("reference", CPU)
    (plain,) = case.steps(case.streamed(), 0, 1)
    assert plain.loss_sum == pytest.approx(fast[0].loss_sum, rel=1e-2)
    assert plain.norm == pytest.approx(fast[0].norm, rel=0.05)


def test_memory_of_the_host_lives_as_long_as_its_engine(tmp_path: Path) -> None:
    """With the slab would go its registration, silently: copies would no longer run beside the computation."""
    case = Case()
    engine = case.streamed(inputs="host")
    gc.collect()
    slabs = [found for found in gc.get_objects() if type(found) is Slab]
    assert len(slabs) == 4, "weights, state, gradients, and the layers' inputs"
    assert engine.store.nbytes > 0


def test_at_once_an_error_in_mid_step_hands_out_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(optimizer=optimizer(clip=None))
    streamed = case.streamed(update="at_once")
    plain, calls = streamed.device_units.update_now, [0]

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("out of memory")
        plain(*args)

    monkeypatch.setattr(streamed.device_units, "update_now", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        streamed.step(step_rows(0), ROWS * T, 1e-2, first=True, should_stop=never)
    with pytest.raises(FailedError, match="broke off half-way"):
        streamed.optimizer.weights()


def test_units_hold_every_tensor_once_in_the_order_of_the_leaves() -> None:
    for tied in (True, False):
        case = Case(replace(SPEC, tied=tied))
        leaves = case.resident().model.leaves
        units = model_units(case.spec, torch.bfloat16, OptimizerConfig(state="8bit"))
        assert [part.names for unit in units for part in unit.parts] == [leaf.names for leaf in leaves]
        at = 0
        for unit in units:
            assert unit.first == at
            at += len(unit.parts)
            for block in (unit.weights, unit.state, unit.gradients):
                ends = 0
                for field in block.fields:
                    assert field.offset % ALIGN == 0 and field.offset >= ends
                    ends = field.offset + field.nbytes
                assert ends <= block.nbytes


def test_a_writer_waits_for_writer_and_readers_and_a_reader_for_the_writer() -> None:
    fence = Fence()
    assert fence.before_reading() == fence.before_writing() == []
    fence.was_written("w1")
    assert fence.before_reading() == ["w1"]
    fence.was_read("r1")
    fence.was_read("r2")
    assert fence.before_reading() == ["w1"] and fence.before_writing() == ["w1", "r1", "r2"]
    fence.was_written("w2")
    assert fence.before_writing() == ["w2"]


def test_a_full_disk_is_refused_before_anything_is_mapped(tmp_path: Path) -> None:
    from elo_engine.errors import RefusedError

    with pytest.raises(RefusedError, match=r"cannot be reserved in .*free that much there"):
        Slab(1 << 60, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RefusedError, match="host memory cannot be had"):
        Slab(1 << 60)
