"""Bounds of documents padded to a fixed number: buffers that stay, and the same training to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows_fixture import random_rows
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.data import RowBatch
from elo_engine.model import ops
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import Packing, PaddedPacking
from elo_engine.model.ops import choice
from elo_engine.train.guards import scale_of
from elo_engine.train.loop import micro_batches, to_batch
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.step_buffers import FEWEST_DOCUMENTS, Room, StepBuffers

from .test_loop import shallow

CPU = torch.device("cpu")
ROWS, T, MICRO = 5, 32, 2  # the last micro-batch has one row
ROOM = Room(FEWEST_DOCUMENTS, T)
GIVEN = torch.tensor([1, -2, 2**31 - 1], dtype=torch.int32)


def make_rows(seed: int, documents: int) -> RowBatch:
    """So many documents a row, the ends without a label."""
    return random_rows(seed, ROWS, T, documents, ends=True)


def test_buffers_hold_what_micro_batches_are(documents: int = 3) -> None:
    rows = make_rows(1, documents)
    buffers = StepBuffers(ROWS, T, MICRO, CPU)
    room = buffers.room(rows)
    assert room == ROOM
    for filled in (make_rows(2, 5), rows):  # what was there before is gone
        buffers.fill(filled, room, GIVEN, filled.tokens_loss)
    pieces = [to_batch(piece, CPU) for piece in micro_batches(rows, MICRO)]
    for found, right in zip(buffers.batches(room), pieces, strict=True):
        assert torch.equal(found.ids_N, right.ids_N) and torch.equal(found.labels_N, right.labels_N)
        assert torch.equal(found.packing.positions_N, right.packing.positions_N)
        assert found.packing.segment_starts == right.packing.segment_starts
        N, offsets = len(right.ids_N), found.packing.offsets.tolist()
        assert offsets == right.packing.segment_starts + [N] * (room.documents + 1 - len(right.packing.segment_starts))
        assert found.longest == found.packing.longest == T >= right.packing.longest
    assert torch.equal(buffers.given, GIVEN)
    assert buffers.inverse.item() == np.float32(1) / np.float32(rows.tokens_loss)


def test_places_stay_and_views_follow_them() -> None:
    """A batch made once shows what is filled in later: what a graph would read."""
    buffers = StepBuffers(ROWS, T, MICRO, CPU)
    before = list(buffers.batches(ROOM))
    places = [x.data_ptr() for b in before for x in (b.ids_N, b.labels_N, b.packing.positions_N, b.packing.offsets)]
    for seed in (3, 4):
        rows = make_rows(seed, seed)
        buffers.fill(rows, ROOM, GIVEN, 7)
        assert before[1].ids_N.tolist() == rows.ids_BT[MICRO : 2 * MICRO].reshape(-1).tolist()
        assert before[-1].packing.segment_starts == list(rows.part(4, 5).segment_starts)
        after = [
            x.data_ptr()
            for b in buffers.batches(ROOM)
            for x in (b.ids_N, b.labels_N, b.packing.positions_N, b.packing.offsets)
        ]
        assert after == places
    assert buffers.inverse.item() == np.float32(1 / 7)


@pytest.mark.parametrize(("documents", "room"), [(1, 16), (8, 16), (9, 32), (16, 32), (17, 64), (31, 64)])
def test_room_is_the_next_power_of_two_of_the_fullest_micro_batch(documents: int, room: int) -> None:
    assert StepBuffers(ROWS, T, MICRO, CPU).room(make_rows(0, documents)) == (room, T)


@pytest.mark.parametrize(("longest", "room"), [(1, 256), (256, 256), (257, 512), (512, 512), (513, 600), (600, 600)])
def test_room_for_the_longest_document_is_the_next_power_of_two(longest: int, room: int) -> None:
    """And never more than a row."""
    positions = np.zeros((1, 600), np.int64)
    positions[0, :longest] = np.arange(longest)
    rows = RowBatch(positions, positions, positions, np.array([0, 600]), ("x",))
    assert StepBuffers(1, 600, 1, CPU).room(rows) == (FEWEST_DOCUMENTS, room)


def test_rows_of_another_shape_are_not_taken() -> None:
    with pytest.raises(AssertionError, match="in buffers of"):
        StepBuffers(ROWS + 1, T, MICRO, CPU).fill(make_rows(0, 2), ROOM, GIVEN, 1)


@pytest.fixture(params=["auto", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of computing on the CPU."""
    before = choice._mode
    choice.configure(request.param, CPU)
    yield request.param
    choice.configure(before, CPU)


def trained(
    folder: Path, batches: Callable[[RowBatch], list[Batch]], inverse: Callable[[RowBatch], Any]
) -> list[Tensor]:  # fmt: skip
    """Losses, gradients and weights of three steps."""
    model = shallow(folder)
    optimizer = MasterAdamW(model, OptimizerConfig(lr=1e-2))
    found: list[Tensor] = []
    for step in range(3):
        rows = make_rows(step, documents=step + 2)
        optimizer.zero_grad()
        for batch in batches(rows):
            loss = model.loss_sum(batch)
            by = inverse(rows)
            if isinstance(by, Tensor):
                loss.backward(scale_of(loss) * by)
            else:
                (loss / by).backward(scale_of(loss))
            found.append(loss.detach())
        found += [grad.clone() for _, grad in optimizer.gradients() if grad is not None]
        optimizer.step(1e-2)
    return [*found, *(tensor.clone() for tensor in optimizer.weights().values())]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_padded_and_not_is_the_same_training(untied: Path, path: str) -> None:
    """Empty documents, the longest one taken to be a whole row, and one over the tokens as a number of the device."""

    def plain(rows: RowBatch) -> list[Batch]:
        return [to_batch(piece, CPU) for piece in micro_batches(rows, MICRO)]

    buffers = StepBuffers(ROWS, T, MICRO, CPU)

    def padded(rows: RowBatch) -> list[Batch]:
        buffers.fill(rows, buffers.room(rows), GIVEN, rows.tokens_loss)
        return list(buffers.batches(buffers.room(rows)))

    right = trained(untied, plain, lambda rows: rows.tokens_loss)
    assert same(trained(untied, padded, lambda rows: buffers.inverse), right)

    def wrong(rows: RowBatch) -> list[Batch]:
        buffers.fill(make_rows(9, 2) if rows.segment_starts[1] % 2 else rows, ROOM, GIVEN, rows.tokens_loss)
        return list(buffers.batches(ROOM))

    assert not same(trained(untied, wrong, lambda rows: buffers.inverse), right)


def test_one_over_the_tokens_is_what_dividing_by_them_gives() -> None:
    """For numbers of tokens up to 2^20, and some beyond: the first factor of the backward pass has the same bits."""
    tokens = torch.cat((torch.arange(1, 2**20), torch.randint(2**20, 2**24, (2**16,))))
    # and of the head's gradient, which a launched step scales by the number in double precision, rounded once more
    assert torch.equal((1 / tokens.double()).float(), torch.ones(len(tokens)) / tokens)
    loss = torch.ones(len(tokens), requires_grad=True)
    (loss / tokens).sum().backward()
    assert loss.grad is not None and torch.equal(loss.grad, torch.ones(len(tokens)) / tokens)
    for count in (3, 7, 262_144 - 17):
        one = torch.ones((), requires_grad=True)
        (one / count).backward()
        assert one.grad is not None and one.grad == torch.ones(1) / count


def test_bounds_on_the_host_are_those_of_now() -> None:
    offsets = torch.tensor([0, 3, 8, 8, 8], dtype=torch.int32)
    packing = PaddedPacking(offsets, torch.arange(8), 8)
    assert isinstance(packing, Packing) and packing.segment_starts == [0, 3, 8] and packing.offsets is offsets
    offsets.copy_(torch.tensor([0, 1, 2, 3, 8]))
    assert packing.segment_starts == [0, 1, 2, 3, 8] and packing.longest == 8


def test_attention_takes_padded_bounds(path: str) -> None:
    chance = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, generator=chance) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 5, 6, 12, 12, 12], dtype=torch.int32)
    padded = ops.attention(q, k, v, PaddedPacking(offsets, torch.arange(12), 12), 0.3)
    assert torch.equal(padded, ops.attention(q, k, v, Packing([0, 5, 6, 12], torch.arange(12)), 0.3))
