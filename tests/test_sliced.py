"""Embedding and head in slices: the maths of the loss, steps against those of whole matrices, and the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from planner_cases import llama, only_what_is_made_here
from stream_cases import CPU, ROWS, SPEC, Case, T, differing, everything, never, step_rows
from test_memory_streamed import Rows, engine_of, measured_peak, streamed
from torch import Tensor

from elo_engine.config import OptimizerConfig, StreamConfig
from elo_engine.engine_choice import Rooms, _streaming, streamed_setting
from elo_engine.errors import FailedError
from elo_engine.measure.expected import Needs
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.machine import Room
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Setting, Streaming, vocabulary_slices
from elo_engine.model import chunked_head, ops, sliced_head
from elo_engine.model.presets import preset_spec
from elo_engine.model.reference_adamw import GROUP
from elo_engine.stream import sliced
from elo_engine.stream.device import DeviceUnits

SLICED = Streaming(vocabulary="sliced")


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    """Traced memory is of this file's tensors, whatever other tests have left."""
    with only_what_is_made_here():
        yield


@pytest.fixture(autouse=True)
def _fast() -> Any:
    ops.configure("auto", CPU)
    yield
    ops.configure("auto", CPU)


# -- the loss


def by_slices(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, bounds: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    loss = sliced_head.SlicedLoss(labels_N)
    for begin, end in bounds:
        loss.observe(hidden_ND, head_VD[begin:end], begin)
    d_head_VD = torch.zeros(head_VD.shape, dtype=torch.float32)
    d_hidden_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32)
    for begin, end in reversed(bounds):
        d_hidden_ND += loss.gradients(hidden_ND, head_VD[begin:end], begin, d_head_VD[begin:end])
    return loss.losses_N(), d_hidden_ND, d_head_VD


def truth(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = (tensor.double().detach().requires_grad_() for tensor in (hidden_ND, head_VD))
    losses = torch.nn.functional.cross_entropy(hidden @ head.t(), labels_N, reduction="none", ignore_index=-100)
    losses.sum().backward()
    assert hidden.grad is not None and head.grad is not None
    return losses.detach(), hidden.grad, head.grad


def head_case(dtype: torch.dtype, N: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden_ND, head_VD = torch.randn(N, 48, generator=generator), torch.randn(333, 48, generator=generator)
    labels_N = torch.randint(0, 333, (N,), generator=generator)
    labels_N[::7] = -100
    return hidden_ND.to(dtype), head_VD.mul(0.6).to(dtype), labels_N


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("bounds", [[(0, 333)], [(0, 100), (100, 200), (200, 333)], [(0, 332), (332, 333)]], ids=len)
def test_the_loss_and_its_gradients_are_the_definition(bounds: list[tuple[int, int]], monkeypatch: Any) -> None:
    monkeypatch.setattr(sliced_head, "CHUNK_ROWS", 32)  # chunks that do not divide the tokens
    case = head_case(torch.float32)
    assert max(errors(by_slices(*case, bounds), truth(*case))) < 1e-6


def test_bf16_is_no_worse_than_the_whole_head() -> None:
    case = head_case(torch.bfloat16)
    exact, bounds = truth(*case), [(0, 128), (128, 256), (256, 333)]
    whole = chunked_head.head_loss(*case, need_d_hidden=True, need_d_head=True)
    for mine, theirs in zip(errors(by_slices(*case, bounds), exact), errors(whole, exact), strict=True):  # type: ignore[arg-type]
        assert mine <= 1.1 * theirs


# -- slices


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"])
def test_slices_cover_the_vocabulary_in_whole_groups_and_are_no_larger_than_a_layer(name: str) -> None:
    spec = preset_spec(name)
    found = vocabulary_slices(spec)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == spec.V
    sizes = [(end - begin) * spec.D for begin, end in found]
    assert len(found) > 1 and max(sizes) <= spec.layer_parameters
    assert all(begin * spec.D % GROUP == 0 for begin, _ in found)
    assert (len(found) - 1) * spec.layer_parameters < spec.V * spec.D, "as few as can be"


# -- steps


def relative(mine: dict[str, Tensor], theirs: dict[str, Tensor], kind: str) -> float:
    names = [name for name in theirs if name.startswith(kind)]
    assert names
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in names)


@pytest.mark.parametrize("inputs", ["device", "host"])
@pytest.mark.parametrize("micro_batch", [ROWS, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_sliced_step_is_the_whole_one_to_rounding(tied: bool, micro_batch: int, inputs: str) -> None:
    """The first moments after one step are the clipped gradients: each differs by the order of sums alone."""
    case = Case(replace(SPEC, tied=tied, layers=3), micro_batch=micro_batch)
    resident, streamed = case.resident(), case.streamed(vocabulary="sliced", inputs=inputs)
    assert len(streamed.store.parts) == 3 + len(vocabulary_slices(case.spec)) * (1 if tied else 2) + 1
    (there,), (here,) = case.steps(resident, 0, 1), case.steps(streamed, 0, 1)
    assert here.loss_sum == pytest.approx(there.loss_sum, rel=1e-6)
    assert here.norm == pytest.approx(there.norm, rel=1e-5)
    assert relative(everything(streamed), everything(resident), "exp_avg.") < 2e-6
    for mine, theirs in zip(case.steps(streamed, 1, 20), case.steps(resident, 1, 20), strict=True):
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_slice_that_is_left_out_would_be_seen(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sliced.SlicedLoss.gradients

    def forgetful(self: Any, normed_ND: Tensor, head_SD: Tensor, begin: int, d_head_SD: Tensor) -> Tensor:
        found = plain(self, normed_ND, head_SD, begin, d_head_SD)
        return found.zero_() if begin else found

    monkeypatch.setattr(sliced.SlicedLoss, "gradients", forgetful)
    case = Case(replace(SPEC, tied=tied))
    resident, streamed = case.resident(), case.streamed(vocabulary="sliced")
    case.steps(resident, 0, 1)
    case.steps(streamed, 0, 1)
    assert relative(everything(streamed), everything(resident), "exp_avg.model.layers") > 1e-2


@pytest.mark.parametrize("master", ["none", "24", "32"])
def test_bf16_with_8_bit_state_follows_the_whole_one(master: Any) -> None:
    config = OptimizerConfig(state="8bit", master=master, clip=0.5, weight_decay=0.1)
    case = Case(dtype=torch.bfloat16, optimizer=config, lr=1e-3)
    whole, streamed = case.streamed(), case.streamed(vocabulary="sliced")
    for there, here in zip(case.steps(whole, 0, 20), case.steps(streamed, 0, 20), strict=True):
        assert here.loss_sum == pytest.approx(there.loss_sum, rel=2e-3)
        assert here.norm == pytest.approx(there.norm, rel=2e-2)


def test_slices_draw_their_own_random_bits() -> None:
    case = Case(optimizer=OptimizerConfig(state="8bit"))
    streamed = case.streamed(vocabulary="sliced")
    keys = []
    plain = DeviceUnits._update

    def seen(self: DeviceUnits, number: int, adamw: Any, grads: Any, numbers: Any, *more: Any) -> None:
        part = self._store.parts[number]
        if part.slice is not None:
            keys.append(part.numbers(numbers).key)
        plain(self, number, adamw, grads, numbers, *more)

    DeviceUnits._update = seen  # type: ignore[method-assign]
    try:
        case.steps(streamed, 0, 1)
        streamed.flush()
    finally:
        DeviceUnits._update = plain  # type: ignore[method-assign]
    assert len(keys) == len(set(keys)) == len(vocabulary_slices(case.spec))


@pytest.mark.parametrize(("tied", "inputs"), [(True, "host"), (False, "device")])
def test_a_step_that_is_given_up_at_any_point_leaves_no_trace(tied: bool, inputs: str) -> None:
    """At every question of a sweep: some updates that waited have been made by then, of some slices only."""
    spec = replace(SPEC, tied=tied, layers=2)
    case = Case(spec, optimizer=OptimizerConfig(state="8bit", clip=0.5))
    straight, stopped = (case.streamed(vocabulary="sliced", inputs=inputs) for _ in range(2))
    slices = len(vocabulary_slices(spec))
    questions = 1 + slices + 2 * 3 + 2 * slices * 3 + 3 + 2 * 3
    stops = dict(zip(range(2, 2 + questions), range(questions), strict=True))
    assert case.steps(straight, 0, 2 + questions) == case.steps(stopped, 0, 2 + questions, stops)
    assert differing(everything(straight), everything(stopped)) == []
    with pytest.raises(AssertionError, match="ended"):  # one question more than there are
        case.steps(stopped, 2 + questions, 3 + questions, {2 + questions: questions})


def test_a_snapshot_is_that_of_whole_matrices_and_continues_bit_for_bit() -> None:
    case = Case(replace(SPEC, tied=False), optimizer=OptimizerConfig(state="8bit", clip=0.5))
    first, whole = case.streamed(vocabulary="sliced"), case.streamed()
    case.steps(first, 0, 3)
    weights = {name: tensor.clone() for name, tensor in first.optimizer.weights().items()}
    moments = {name: tensor.clone() for name, tensor in first.optimizer.moments().items()}
    again = case.streamed(vocabulary="sliced")
    for engine in (again, whole):
        engine.optimizer.load(weights, moments)
    assert differing(everything(first), everything(whole)) == []
    ends = [case.steps(engine, 3, 6) for engine in (first, again, whole)]
    assert ends[0] == ends[1] and differing(everything(first), everything(again)) == []
    assert ends[2][-1].loss_sum == pytest.approx(ends[0][-1].loss_sum, rel=1e-4)


def test_an_evaluation_between_the_steps_sees_the_updated_model() -> None:
    from elo_engine.train.loop import to_batch

    case = Case()
    whole, streamed = case.streamed(), case.streamed(vocabulary="sliced")
    for number in range(2):
        losses = []
        for engine in (whole, streamed):
            case.steps(engine, number, number + 1)
            losses.append(engine.scorer.losses_of([to_batch(step_rows(9), CPU)], lambda share: None)[0].sum())
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    assert streamed.device_units.waiting == set()


def test_the_first_step_names_a_matrix_that_does_not_learn() -> None:
    case = Case(replace(SPEC, tied=False))
    streamed = case.streamed(vocabulary="sliced")
    streamed.store.views[0]["weights"]["norm_attention"].zero_()  # layer 0 passes on its input alone
    # the embedding's later slices get no token: no error
    rows = replace(step_rows(0), ids_BT=step_rows(0).ids_BT % 100)
    assert streamed.step(rows, ROWS * T, 1e-2, first=False, should_stop=never) is not None
    broken = case.streamed(vocabulary="sliced")
    broken.store.views[broken.store.last]["weights"]["norm"].zero_()
    with pytest.raises(FailedError, match="is zero everywhere"):
        broken.step(rows, ROWS * T, 1e-2, first=True, should_stop=never)


# -- memory


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_takes_no_more_of_the_device(tied: bool) -> None:
    """Traced bytes of a whole step: slices of the same size, however many there are."""
    peaks = {}
    for V in (3000, 12000):
        spec = llama(3, V, 128, 352, 2, 2, tied=tied)
        assert vocabulary_slices(spec)[0] == (0, 1500)
        peaks[V] = measured_peak(streamed(spec, 64, 1, state="8bit", streaming=SLICED))
    assert peaks[12000] - peaks[3000] < 4096, "a norm a slice, and ids"
    whole = measured_peak(streamed(spec, 64, 1, state="8bit"))
    assert whole > 2 * peaks[12000]


GRID = [
    ("rows", {}),
    ("rows", {"micro_batches": 3, "streaming": Streaming("memory", "host", "lazy", "sliced")}),
    ("rows", {"dtype": "bf16", "state": "8bit", "micro_batches": 2}),
    ("logits", {"state": "8bit", "micro_batches": 5}),
    ("logits", {"dtype": "bf16", "state": "8bit"}),
    ("logits", {"dtype": "bf16", "state": "8bit", "master": "24", "micro_batches": 2}),
    ("tied logits", {"micro_batches": 2, "streaming": Streaming("memory", "host", "lazy", "sliced")}),
    ("tied logits", {"dtype": "bf16", "state": "8bit", "master": "24", "micro_batches": 2}),
    ("weights", {"dtype": "bf16", "state": "8bit", "micro_batches": 2}),
]


@pytest.mark.parametrize(("size", "fields"), GRID, ids=str)
def test_predicted_peak_is_the_traced_one(size: str, fields: dict[str, Any]) -> None:
    from test_memory_streamed import MOST, SIZES

    setting = streamed(*SIZES[size], **({"streaming": SLICED} | fields))
    plan, measured = predict_memory(setting), measured_peak(setting)
    assert measured <= plan.peak_bytes <= MOST * measured, f"{plan} is {plan.peak_bytes / measured:.4f} of {measured}"


def test_what_is_on_the_host_is_counted() -> None:
    from elo_engine.measure.memory_streamed import standing_bytes
    from elo_engine.measure.memory_units import inputs_bytes

    setting = streamed(
        llama(3, 300, 64, 160, 2, 1, tied=False), 16, 2, streaming=Streaming("memory", "host", "lazy", "sliced")
    )
    engine = engine_of(setting)
    assert inputs_bytes(setting) == engine.hidden._host.nbytes + engine.sums._host.nbytes
    held = engine.held()
    rows = Rows(setting).rows(0, 2)
    assert engine.step(rows, 32, 1e-4, first=True, should_stop=never) is not None
    assert held == engine.held() and sum(held.values()) < standing_bytes(setting)


# -- choice


def gpu(**fields: Any) -> Setting:
    return Setting("elo_align", preset_spec("llama-3.1-8b"), (0, 31), 4096, 1, 8, **fields)


def test_slices_are_taken_where_nothing_whole_fits() -> None:
    needs = {
        vocabulary: Needs.of(streamed_setting(gpu(), Streaming("memory", "host", "lazy", vocabulary))).device  # type: ignore[arg-type]
        for vocabulary in ("whole", "sliced")
    }
    assert needs["sliced"] < 0.75 * needs["whole"]
    for room, expected in ((needs["whole"], "whole"), (needs["whole"] - 1, "sliced"), (needs["sliced"], "sliced")):
        rooms = Rooms(device=Room(room, "of a test"))
        chosen, words = _streaming(StreamConfig(), gpu(), rooms, Needs.of)
        assert (chosen.inputs, chosen.vocabulary) == ("host", expected)
        assert ("in slices" in words) == (expected == "sliced")
        asked, _ = _streaming(StreamConfig(vocabulary="whole"), gpu(), rooms, Needs.of)
        assert asked.vocabulary == "whole"
        at_once, _ = _streaming(StreamConfig(update="at_once"), gpu(), rooms, Needs.of)
        assert at_once.vocabulary == "whole"


def test_slices_and_updates_at_once_are_refused_together() -> None:
    with pytest.raises(ValueError, match="vocabulary: sliced goes with update: lazy"):
        StreamConfig(vocabulary="sliced", update="at_once")


def test_the_second_pass_over_the_head_is_counted() -> None:
    setting = gpu()
    whole, sliced_ = (
        arm_flops(streamed_setting(setting, Streaming(vocabulary=vocabulary))) for vocabulary in ("whole", "sliced")  # type: ignore[arg-type]
    )
    spec = setting.spec
    assert whole.model == sliced_.model
    assert sliced_.executed.head - whole.executed.head == 2 * spec.D * spec.V
