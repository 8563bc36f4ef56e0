"""`recompute: selective`: the MLP as one node that keeps no activation and makes its first product again. The bits of a
step are those of a step that keeps all; tests/test_planner.py holds its memory, tests/test_flops.py its operations.

Started under TRITON_INTERPRET=1, as the last test does, these same tests run the Triton kernels through Triton's
interpreter, where the gradient of [gate | up] takes its place.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from family_cases import CASES, SHAPE
from forked import PYTEST, Forked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elo_engine.config import Recompute
from elo_engine.model import names, ops
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.layers import Packing
from elo_engine.model.ops.quantize_fp8 import EMULATE
from elo_engine.model.spec import ModelSpec, read_spec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
if INTERPRETED:
    from launching import _round_as_hardware_does

    _round_as_hardware_does()
N = 20 if INTERPRETED else 40  # the interpreter takes seconds a kernel
FAMILIES = ("llama, tied, biases", "gemma2", "olmo2", "qwen3", "smollm3, untied, windows", "phi3")


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """The fast path of this process."""
    ops.configure("fused" if INTERPRETED else "auto", DEVICE)
    yield
    ops.configure("auto", DEVICE)


def spec_of(case: str) -> ModelSpec:
    from transformers import AutoConfig

    family, fields = CASES[case]
    size = {"num_hidden_layers": 1, "vocab_size": 32} if INTERPRETED and "layer_types" not in fields else {}
    return read_spec(AutoConfig.for_model(family, **{**SHAPE, **fields, **size}).to_dict())


def decoder(spec: ModelSpec, recompute: Recompute, dtype: torch.dtype, whole: bool = True) -> Decoder:
    generator = torch.Generator().manual_seed(3)
    drawn = {
        name: (0.15 * torch.randn(shape, generator=generator) + (len(shape) == 1)).to(DEVICE, dtype)
        for name, shape in names.expected_shapes(spec).items()
    }
    layers = tuple(range(spec.layers)) if whole else (0, spec.layers - 1)
    return Decoder(spec, drawn, layers, train_outer=whole, recompute=recompute)


def batch(spec: ModelSpec) -> Batch:
    ids_N = torch.randint(0, spec.V, (N,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    positions_N = torch.cat((torch.arange(17), torch.arange(N - 17))).to(DEVICE)
    return Batch(ids_N, ids_N.roll(-1), Packing([0, 17, N], positions_N), max(17, N - 17))


def step(model: Decoder, micro_batches: int = 1 if INTERPRETED else 2) -> dict[str, Tensor]:
    """Loss and gradients of a step."""
    losses = []
    for _ in range(micro_batches):
        loss = model.loss_sum(batch(model.spec))
        (loss / 100).backward()
        losses.append(loss.detach())
    found = {"+".join(leaf.names): leaf.tensor.grad for leaf in model.leaves}
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found.values())
    return found | {"loss": torch.stack(losses)}  # type: ignore[return-value]


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "shallow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FAMILIES)
def test_the_bits_are_those_of_a_step_that_keeps_all(case: str, dtype: torch.dtype, whole: bool) -> None:
    spec = spec_of(case)
    kept = step(decoder(spec, "none", dtype, whole))
    assert all(gradient.count_nonzero() > 0 for gradient in kept.values())
    for recompute in ("selective", "layer"):
        assert differing(kept, step(decoder(spec, recompute, dtype, whole))) == [], recompute  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="tests/test_linear_fp8.py has a layer with its kernels")
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", FAMILIES)
def test_the_same_of_products_of_8_bit_operands(case: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EMULATE, "emulated")
    ops.configure(mode, DEVICE)
    spec, found = spec_of(case), {}
    for recompute in get_args(Recompute):
        model = decoder(spec, recompute, torch.bfloat16, whole=False)
        model.use_fp8("all")
        found[recompute] = step(model)
        assert differing(found["none"], found[recompute]) == [], recompute
    assert len(differing(found["none"], step(decoder(spec, "selective", torch.bfloat16, whole=False)))) > spec.layers


@pytest.mark.skipif(INTERPRETED, reason="the definitions are the same in this process")
@pytest.mark.parametrize("case", ["llama, tied, biases", "gemma2", "olmo2"])
def test_the_same_of_the_definitions(case: str) -> None:
    ops.configure("reference", DEVICE)
    spec = spec_of(case)
    kept = step(decoder(spec, "none", torch.float32))
    for recompute in ("selective", "layer"):
        assert differing(kept, step(decoder(spec, recompute, torch.float32))) == [], recompute  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["llama, tied, biases", "gemma2", "olmo2"])
def test_nothing_as_wide_as_the_mlp_is_kept(case: str) -> None:
    spec = replace(spec_of(case), V=64)  # no logits as wide

    def widths(recompute: Recompute) -> set[int]:
        model, seen = decoder(spec, recompute, torch.float32), set[int]()
        weights = {leaf.tensor.untyped_storage().data_ptr() for leaf in model.leaves}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in weights and x.dim() == 2:
                seen.add(x.shape[1])
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss_sum(batch(spec))
        return seen

    assert 2 * spec.F in widths("none")
    assert not widths("selective") & {spec.F, 2 * spec.F}


def flops(spec: ModelSpec, recompute: Recompute) -> int:
    model = decoder(spec, recompute, torch.float32)
    with FlopCounterMode(display=False) as counter:
        step(model, 1)
    return int(counter.get_total_flops())


def test_one_product_a_layer_is_made_again() -> None:
    spec = spec_of("llama, tied, biases")
    again = flops(spec, "selective") - flops(spec, "none")
    assert again == spec.layers * 4 * N * spec.D * spec.F
    assert again < flops(spec, "layer") - flops(spec, "none")


@pytest.mark.parametrize("planted", ["product", "norm"])
def test_a_product_that_is_made_otherwise_is_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("llama, tied, biases")
    kept = step(decoder(spec, "none", torch.float32))
    module = importlib.import_module("elo_engine.model.ops.gated_mlp")
    if planted == "product":
        right = module.gated_backward
        monkeypatch.setattr(module, "gated_backward", lambda d, packed, *a, **k: right(d, packed * (1 + 1e-6), *a, **k))
    else:
        right_norm, calls = module.norm_forward, [0]

        def another(hidden_ND: Tensor, gamma_D: Any, eps: float, *rest: Any) -> Any:
            calls[0] += 1
            return right_norm(hidden_ND, gamma_D, eps if len(rest) > 1 else 2 * eps, *rest)

        monkeypatch.setattr(module, "norm_forward", another)
    wrong = differing(kept, step(decoder(spec, "selective", torch.float32)))
    assert "loss" not in wrong and len(wrong) > spec.layers


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(AssertionError, match="recompute is one of"):
        decoder(spec_of("olmo2"), "all", torch.float32)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
def test_the_same_under_tritons_interpreter(forked: Forked) -> None:
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    chosen = ("-k", "bits and whole and (llama or gemma2)")
    done = forked(PYTEST, __file__, *chosen, environment=environment, folder=root, timeout_s=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
