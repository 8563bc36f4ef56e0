"""Every supported family against transformers: logits, loss and every gradient, packed, beyond the window, of the whole
model and of detached layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from family_cases import CASES, make_family
from test_parity import CPU, assert_close, gradients
from torch import Tensor

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import Recompute
from elo_engine.measure.flops import full_step, shallow_step
from elo_engine.model import ops
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.layers import Packing
from elo_engine.model.names import expected_shapes
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import read_spec

DOCUMENTS = (40, 1, 23)  # tokens; the window of the families that have one is 12
ENDS = (0, 3)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By case, in two shards."""
    return {case: make_family(tmp_path_factory.mktemp("family"), case, shards=2) for case in CASES}


@pytest.fixture(params=["reference", "auto"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.configure(request.param, CPU)
    yield request.param
    ops.configure("auto", CPU)


def packed() -> tuple[Batch, list[Tensor]]:
    """A row of several documents, and the documents by themselves."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 320, (size,), generator=generator) for size in DOCUMENTS]
    labels = [torch.cat((ids[1:], torch.tensor([-100]))) for ids in documents]
    starts = [0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()]
    positions_N = torch.cat([torch.arange(size) for size in DOCUMENTS])
    return Batch(torch.cat(documents), torch.cat(labels), Packing(starts, positions_N), max(DOCUMENTS)), documents


def theirs_of(folder: Path, layers: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model; with `layers`, what enters another one leaves it as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

    def pass_by(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return (entered, *output[1:]) if isinstance(output, tuple) else entered

    for index, layer in enumerate(model.model.layers):
        if layers is not None and index not in layers:
            layer.register_forward_hook(pass_by, with_kwargs=True)
    return model


def compare(ours: Decoder, theirs: Any, learning: set[str]) -> None:
    """Logits, loss and gradients of the packed batch against those of its documents one by one."""
    batch, documents = packed()
    logits = torch.cat([theirs(input_ids=ids[None], use_cache=False).logits[0] for ids in documents])
    assert_close(ours.logits(batch), logits.detach(), 1e-5, "logits")
    expected = F.cross_entropy(logits.float(), batch.labels_N, reduction="sum")
    expected.backward()
    loss = ours.loss_sum(batch)
    assert float((loss - expected).abs() / expected) < 1e-5
    loss.backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters() if name in learning}
    found = gradients(ours)
    assert found.keys() == learning == wanted.keys()
    for name, gradient in found.items():
        grad = wanted[name]
        assert grad is not None and float(grad.abs().max()) > 0, name
        assert_close(gradient, grad, 1e-5, name)


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("case", CASES)
def test_whole_model_equals_transformers(
    checkpoints: dict[str, Path], case: str, mode: str, recompute: Recompute
) -> None:
    index = open_checkpoint(checkpoints[case])
    spec = read_spec(index.config)
    ours, _ = load_full(index, spec, device=CPU, dtype=torch.float32, recompute=recompute)
    compare(ours, theirs_of(checkpoints[case]), set(expected_shapes(spec)))


@pytest.mark.parametrize("layers", [ENDS, (1,)])
@pytest.mark.parametrize("case", CASES)
def test_detached_layers_equal_those_of_transformers(
    checkpoints: dict[str, Path], case: str, mode: str, layers: tuple[int, ...]
) -> None:
    """A layer keeps the window and the rotary base of its place in the checkpoint."""
    index = open_checkpoint(checkpoints[case])
    ours, _ = load_shallow(index, read_spec(index.config), layers, device=CPU, dtype=torch.float32)
    compare(ours, theirs_of(checkpoints[case], layers), set(ours.trainable()))


@pytest.mark.parametrize("case", [case for case in CASES if "window" in case or "gemma" in case or "3" in case])
def test_the_kind_of_a_layer_matters(checkpoints: dict[str, Path], case: str) -> None:
    """The checks above would see a layer that is taken for one of another kind."""
    index = open_checkpoint(checkpoints[case])
    spec = read_spec(index.config)
    if len(spec.kinds) == 1:
        pytest.skip("all its layers are alike")
    from dataclasses import replace

    batch, _ = packed()
    right, _ = load_shallow(index, spec, ENDS, device=CPU, dtype=torch.float32)
    wrong, _ = load_shallow(
        index, replace(spec, kinds=(spec.kinds[0],)), ENDS, device=CPU, dtype=torch.float32
    )
    difference = (right.logits(batch) - wrong.logits(batch)).abs().max() / right.logits(batch).abs().max()
    assert float(difference) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_no_worse_than_that_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, case: str
) -> None:
    """Against the fp32 logits of the same rounded weights. Both errors are sums of some hundred roundings a token, in
    another order; over 64 tokens of 320 logits, whose errors are alike within a token, their ratio scatters by about
    0.1: 1 / sqrt(2 x 64) from either side.
    """
    folder = make_family(tmp_path_factory.mktemp("bf16"), case, dtype=torch.bfloat16)
    index = open_checkpoint(folder)
    batch, documents = packed()

    def of(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]).float()

    truth, theirs = of(theirs_of(folder)), of(theirs_of(folder, dtype=torch.bfloat16))
    model, _ = load_full(index, read_spec(index.config), device=CPU, dtype=torch.bfloat16, train=False)
    ours = model.logits(batch).float()
    assert float((ours - truth).norm()) < 1.2 * float((theirs - truth).norm())
    assert not torch.equal(ours, truth), "computed in bf16"


@pytest.mark.parametrize("case", CASES)
def test_operations_agree_with_torchs_counter(checkpoints: dict[str, Path], case: str) -> None:
    """Of the definitions: torch does not count csrc's attention."""
    from torch.utils.flop_counter import FlopCounterMode

    index = open_checkpoint(checkpoints[case])
    spec, T = read_spec(index.config), 64
    ids = torch.randint(0, 320, (T,), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, Packing([0, T], torch.arange(T)), T)
    ops.configure("reference", CPU)
    try:
        for whole in (True, False):
            load = {"device": CPU, "dtype": torch.float32}
            model = (load_full(index, spec, **load) if whole else load_shallow(index, spec, ENDS, **load))[0]  # type: ignore[arg-type]
            with FlopCounterMode(display=False) as counter:
                model.loss_sum(batch).backward()
            flops = full_step(spec, T) if whole else shallow_step(spec, ENDS, T)
            layers = spec.layers if whole else len(ENDS)
            # the definition multiplies all T x T pairs, two products forward and four backward, and forms dX of the
            # first detached layer's projections, which the engine's fast path does not
            pairs = layers * 12.0 * spec.H * spec.E * T
            formed = 0.0 if whole or spec.norms == "post" else 2.0 * spec.D * spec.E * (spec.H + 2 * spec.K)
            expected = T * (flops.linear + flops.head + pairs + formed)
            assert counter.get_total_flops() == pytest.approx(expected, rel=0.01), whole
    finally:
        ops.configure("auto", CPU)
