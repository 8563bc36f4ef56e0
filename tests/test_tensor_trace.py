"""The tensor trace against allocations whose sizes are known, to the byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from planner_cases import only_what_is_made_here

from elo_engine.measure.tensor_trace import traced_tensor_bytes

MB = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


def bytes_of(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def test_peak_and_timeline_of_known_allocations() -> None:
    kept = bytes_of(3 * MB)
    with traced_tensor_bytes() as trace:
        first = bytes_of(5 * MB)
        second = bytes_of(2 * MB)
        del first
        third = bytes_of(4 * MB)
    base = trace.base_bytes
    assert trace.peak_bytes == base + 7 * MB
    assert [live - base for _, live in trace.timeline] == [0, 5 * MB, 7 * MB, 2 * MB, 6 * MB, 6 * MB]
    seconds = [at for at, _ in trace.timeline]
    assert seconds == sorted(seconds) and seconds[1] >= 0.0 and seconds[-1] > 0.0
    del kept, second, third


def test_base_counts_storages_once_and_gradients_that_python_has_not_seen() -> None:
    with traced_tensor_bytes() as before:
        pass
    weight = torch.ones(1000, 250, requires_grad=True)  # 1 MB
    views = [weight[:10], weight.detach().t()]
    (weight * 2.0).sum().backward()  # and a gradient of 1 MB
    with traced_tensor_bytes() as after:
        pass
    assert after.base_bytes - before.base_bytes == 2 * MB
    assert after.peak_bytes == after.base_bytes
    del views


def test_operators_and_the_backward_pass_are_seen() -> None:
    weight, other = torch.ones(1000, 250, requires_grad=True), torch.ones(1000, 250)
    with traced_tensor_bytes() as trace:
        (weight * other).sum().backward()
    # the product (1 MB) is freed before the gradient (1 MB) is made; the sum and its gradient are 4 bytes each, and
    # several threads sum into a partial one each
    partial = 4 * torch.get_num_threads()
    assert MB + 8 <= trace.peak_bytes - trace.base_bytes <= MB + 8 + partial
    assert trace.timeline[-1][1] - trace.base_bytes == MB


def test_frees_of_what_lived_before_keep_their_place() -> None:
    weight = torch.ones(1000, 250, requires_grad=True)
    (weight * 2.0).sum().backward()
    old = bytes_of(6 * MB)
    with traced_tensor_bytes() as trace:
        weight.grad = None  # -1
        new = bytes_of(2 * MB)  # +1
        del old  # -5
        last = bytes_of(5 * MB)  # 0
    assert trace.peak_bytes == trace.base_bytes + MB
    assert trace.timeline[-1][1] == trace.base_bytes
    del new, last


def test_what_an_earlier_trace_allocated_is_freed_in_a_later_one() -> None:
    with traced_tensor_bytes():
        early = bytes_of(6 * MB)
    with traced_tensor_bytes() as trace:
        del early
        late = bytes_of(4 * MB)
    assert trace.peak_bytes == trace.base_bytes
    assert trace.timeline[-1][1] == trace.base_bytes - 2 * MB
    del late


def test_a_storage_that_another_tensor_still_holds_is_not_free() -> None:
    old = bytes_of(6 * MB)
    with traced_tensor_bytes() as trace:
        view = old[1:]  # made inside, so that not the one who was seen at entry holds it at the end
        del old
        new = bytes_of(MB)
    assert trace.peak_bytes == trace.base_bytes + MB == trace.timeline[-1][1]
    del view, new


def test_an_error_in_the_block_passes_through_and_leaves_the_trace() -> None:
    with pytest.raises(ValueError, match="mine"), traced_tensor_bytes() as trace:
        held = bytes_of(2 * MB)
        raise ValueError("mine")
    assert trace.peak_bytes == trace.base_bytes + 2 * MB
    del held
