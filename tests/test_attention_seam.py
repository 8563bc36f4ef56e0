"""Which attention serves where: the choice, the calls as the libraries define them, and refusals by name.

The flash kernels themselves run on a GPU alone (tests/test_ops.py runs there too). Here their places are taken by
functions that bind the arguments against the real signature and compute what the library's documentation says of
them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elo_engine.errors import RefusedError
from elo_engine.model import ops, reference
from elo_engine.model.layers import Packing

attention = importlib.import_module("elo_engine.model.ops.attention")
varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")

STARTS = [0, 5, 6, 13]
PACKING = Packing(STARTS, torch.cat([torch.arange(5), torch.arange(1), torch.arange(7)]))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    ops.configure("auto", torch.device("cpu"))
    attention._varlen_parameters.cache_clear()


def heads() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q_NHE, k_NKE, v_NKE = (torch.randn(13, count, 8, generator=generator) for count in (4, 2, 2))
    return q_NHE, k_NKE, v_NKE


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_torchs_variable_length_attention_is_called_as_it_is_defined(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def documented(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        for name in ("cu_seq_q", "cu_seq_k"):
            assert given[name].dtype == torch.int32 and given[name].tolist() == STARTS
        assert given["max_q"] == given["max_k"] == 7
        assert given.get("enable_gqa", "enable_gqa" not in signature.parameters)  # 2.11 has them anyway
        left, right = given["window_size"]
        assert right == 0, "causal"
        seen = None if left == -1 else left + 1
        return reference.attention(given["query"], given["key"], given["value"], STARTS, given["scale"], seen)

    documented.__signature__ = signature  # type: ignore[attr-defined]
    attention._varlen_parameters.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    found = attention._torch_varlen(*heads(), PACKING, 0.3, window)
    assert torch.equal(found, reference.attention(*heads(), STARTS, 0.3, window))


def test_a_torch_without_windows_and_scales_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's varlen_attn has is_causal and neither window_size nor scale."""

    def old(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        raise AssertionError("never called")

    assert attention._varlen_parameters(), "the pinned torch has one"
    attention._varlen_parameters.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", old)
    assert attention._varlen_parameters() == frozenset()
    assert attention._backend(torch.bfloat16, 128, None) == "sdpa"


@pytest.mark.parametrize(
    ("flash", "dtype", "E", "softcap", "expected"),
    [
        (True, torch.bfloat16, 128, None, "flash-attn"),
        (True, torch.bfloat16, 128, 50.0, "flash-attn"),
        (True, torch.float32, 128, None, "sdpa"),
        (False, torch.bfloat16, 128, None, "torch varlen"),
        (False, torch.bfloat16, 128, 50.0, "sdpa"),
        (False, torch.bfloat16, 36, None, "sdpa"),
        (False, torch.bfloat16, 512, None, "sdpa"),
    ],
)
def test_who_serves(
    flash: bool, dtype: torch.dtype, E: int, softcap: float | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = frozenset({"window_size", "softcap"}) if flash else frozenset()
    monkeypatch.setattr(attention, "_flash_attn_parameters", lambda: known)
    assert attention._backend(dtype, E, softcap) == expected


class OnCuda:
    """A tensor's face as the seam sees it before it calls anything."""

    is_cuda = True
    dtype = torch.bfloat16
    shape = (13, 4, 128)


def test_a_softcap_that_no_fused_backend_has_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash_attn_parameters", frozenset)
    monkeypatch.setattr(attention.choice, "_mode", "fused")
    with pytest.raises(RefusedError, match=r"soft-cap 50\.0.*install flash-attn"):
        attention.attention(OnCuda(), OnCuda(), OnCuda(), PACKING, 0.1, None, 50.0)


def test_offsets_and_longest() -> None:
    assert PACKING.offsets.tolist() == STARTS and PACKING.offsets.dtype == torch.int32
    assert PACKING.longest == 7


def test_a_flash_attn_without_softcap_serves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn before 2.6."""
    monkeypatch.setattr(attention, "_flash_attn_parameters", lambda: frozenset({"window_size"}))
    assert attention._backend(torch.bfloat16, 128, None) == "flash-attn"
    assert attention._backend(torch.bfloat16, 128, 50.0) == "sdpa"


def test_a_flash_attn_that_does_not_load_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built against another torch: the package is there, and importing it fails."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    attention._flash_attn_parameters.cache_clear()
    assert attention._backend(torch.bfloat16, 128, None) == "torch varlen"
    attention._flash_attn_parameters.cache_clear()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_the_slow_exact_way_stays_on_its_device(window: int | None, softcap: float | None) -> None:
    """On the meta device, where a mask made on the CPU would be refused as on a GPU."""
    q_NHE, k_NKE, v_NKE = (x.to("meta") for x in heads())
    out_NHE = attention.cpu.attention_by_segment(q_NHE, k_NKE, v_NKE, STARTS, 0.3, window, softcap)
    assert out_NHE.device.type == "meta" and out_NHE.shape == (13, 4, 8)


@pytest.mark.parametrize(
    ("dtype", "E", "window", "repeated"),
    [
        (torch.float32, 8, None, True),
        (torch.bfloat16, 8, None, False),
        (torch.bfloat16, 8, 3, True),
        (torch.bfloat16, 264, None, True),
    ],
)
def test_off_the_cpu_no_call_is_left_to_torchs_kernel_of_all_scores(
    dtype: torch.dtype, E: int, window: int | None, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads go to flash attention alone; whatever else serves gets as many keys as queries."""
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((k.shape[1] == v.shape[1] == q.shape[1], options["enable_gqa"]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    q_NHE, k_NKE, v_NKE = (torch.zeros(13, count, E, dtype=dtype, device="meta") for count in (4, 2, 2))
    attention.cpu.attention_by_segment(q_NHE, k_NKE, v_NKE, [0, 6, 13], 0.3, window, None)
    assert set(calls) == ({(True, False)} if repeated else {(False, True)})


@pytest.mark.parametrize("window", [None, 3])
def test_repeated_heads_are_the_ones_of_their_group(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_attention = importlib.import_module("elo_engine.model.cpu_attention")
    monkeypatch.setattr(cpu_attention, "_one_for_each_query", lambda q_SHTE, *, masked: True)
    found = cpu_attention.attention_by_segment(*heads(), STARTS, 0.3, window, None)
    torch.testing.assert_close(found, reference.attention(*heads(), STARTS, 0.3, window))
