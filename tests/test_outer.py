"""Gradients of embedding and head that are added up beside autograd, and layers that are run again in the backward pass
without their last product: the same gradients, less memory, fewer products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from planner_cases import llama
from test_parity import whole_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from elo_engine.config import OptimizerConfig, Recompute
from elo_engine.model import names, ops
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.layers import Packing, RopeTable, decoder_layer, layer_gradient
from elo_engine.model.spec import ModelSpec
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.step_buffers import distinct_ids

CPU = torch.device("cpu")
B, T = 4, 16
SPEC = llama(3, 300, 48, 80, 3, 1, tied=False)
TIED = replace(SPEC, tied=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TYPES = pytest.mark.parametrize("dtype", DTYPES)
BOTH = pytest.mark.parametrize("spec", [TIED, SPEC], ids=["tied", "untied"])


@pytest.fixture(autouse=True)
def _chosen_again() -> Iterator[None]:
    ops.configure("auto", CPU)
    yield
    ops.configure("auto", CPU)


def decoder(spec: ModelSpec, dtype: str = "fp32", *, layers: tuple[int, ...] = (0, 1, 2), **options: Any) -> Decoder:
    """The same random weights at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = names.expected_shapes(spec)
    tensors = {name: (0.05 * torch.randn(shapes[name], generator=generator)).to(DTYPES[dtype]) for name in shapes}
    return Decoder(spec, tensors, layers, **({"train_outer": True} | options))


def rows() -> Tensor:
    """Ids [B, T] of which some occur often, in one row and in several, and most never."""
    ids_BT = torch.randint(0, 40, (B, T), generator=torch.Generator().manual_seed(1))
    ids_BT[:, ::4] = 7
    return ids_BT


def run(model: Decoder, parts: int = 1, *, aside: bool = True) -> float:
    """Forward and backward of a step in so many micro-batches; returns what the losses are multiplied with."""
    scale = 1 / (B * (T - 1))
    if aside:
        model.begin_step(rows())
    for ids_BT in rows().chunk(parts):
        (model.loss_sum(whole_rows(ids_BT)) * scale).backward()
    return scale


def outer(model: Decoder, parts: int = 1) -> dict[str, Tensor]:
    """Gradients of embedding and head, of a step whose sums are kept aside."""
    found = list(model.outer_gradients(run(model, parts)))
    assert model.embedding_VD.grad is None and model.head_VD.grad is None, "autograd has none"
    assert not list(model.outer_gradients(1.0)), "they are handed out once"
    return {"embedding" if tensor is model.embedding_VD else "head": gradient for tensor, gradient in found}


def autograds(model: Decoder) -> dict[str, Tensor]:
    run(model, aside=False)
    found = {"embedding": model.embedding_VD.grad} | ({} if model.spec.tied else {"head": model.head_VD.grad})
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@TYPES
@BOTH
def test_they_are_autograds(spec: ModelSpec, dtype: str) -> None:
    """fp32: to a rounding or two; bf16: autograd rounds to 2^-9 whenever it adds one of the 16 rows of id 7."""
    ours, theirs = outer(decoder(spec, dtype)), autograds(decoder(spec, dtype))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.shape == (spec.V, spec.D) and gradient.is_contiguous()
        assert error(gradient, theirs[name]) < (2**-21 if dtype == "fp32" else 16 * 2**-9), name
        assert theirs[name].count_nonzero() > 0
    if not spec.tied:  # a row for each id that occurs; the last of a row of text has no loss
        learning = set(ours["embedding"].abs().sum(1).nonzero().flatten().tolist())
        assert learning == set(rows()[:, :-1].flatten().tolist())


@BOTH
def test_the_other_weights_do_not_notice(spec: ModelSpec) -> None:
    ours, theirs = decoder(spec), decoder(spec)
    outer(ours)
    autograds(theirs)
    for mine, other in zip(ours.leaves, theirs.leaves, strict=True):
        if mine.tensor is not ours.embedding_VD and mine.tensor is not ours.head_VD:
            assert mine.tensor.grad is not None and other.tensor.grad is not None, mine.names
            assert torch.equal(mine.tensor.grad, other.tensor.grad), mine.names


@TYPES
@BOTH
def test_two_micro_batches_make_the_gradient_of_one(spec: ModelSpec, dtype: str) -> None:
    once, twice = outer(decoder(spec, dtype)), outer(decoder(spec, dtype), parts=2)
    for name, gradient in twice.items():
        assert gradient.dtype == torch.float32
        assert error(once[name], gradient) < (2**-21 if dtype == "fp32" else 2**-7), name


@BOTH
def test_all_gradients_of_a_step_have_one_type(spec: ModelSpec) -> None:
    """bf16 after a single micro-batch of it, else fp32; and what is rounded is the sum."""
    for parts, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        model = decoder(spec, "bf16")
        optimizer = MasterAdamW(model, OptimizerConfig(state="8bit"))
        optimizer.take(model.outer_gradients(run(model, parts)))
        found = dict(optimizer.gradients())
        assert {gradient.dtype for gradient in found.values() if gradient is not None} == {dtype}
        assert found.keys() == model.trainable().keys() and None not in found.values()
        head = outer(decoder(spec, "bf16"), parts)["embedding" if spec.tied else "head"]
        taken = found[names.EMBEDDING if spec.tied else names.HEAD]
        assert taken is not None and torch.equal(taken, head.to(dtype))


def bits(gradient: Tensor) -> Tensor:
    return gradient.contiguous().view(torch.int32 if gradient.dtype == torch.float32 else torch.int16)


@TYPES
@BOTH
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_of_ids_that_do_not_occur_change_no_bit(spec: ModelSpec, dtype: str, parts: int) -> None:
    """As many rows as the step has tokens, and one over the tokens as a number of the device: a graph's step."""
    plain = outer(decoder(spec, dtype), parts)

    def padded(ids_BT: Tensor) -> dict[str, Tensor]:
        model = decoder(spec, dtype)
        ids_U = torch.from_numpy(distinct_ids(ids_BT.numpy(), spec.V, B * T))
        assert len(ids_U) == B * T > 1 + len(rows().unique())
        model.begin_step(ids_U, distinct=True)
        run(model, parts, aside=False)
        found = model.outer_gradients(torch.ones(()) / (B * (T - 1)))
        return {"embedding" if tensor is model.embedding_VD else "head": gradient for tensor, gradient in found}

    found = padded(rows())
    assert found.keys() == plain.keys() and all(torch.equal(bits(found[name]), bits(plain[name])) for name in plain)
    assert not torch.equal(padded(rows() + 60)["embedding"], plain["embedding"]), "rows of other ids are seen"


@pytest.mark.parametrize(("V", "tokens"), [(300, 64), (50, 64), (64, 64), (40, 64)])
def test_distinct_ids_are_those_that_occur_and_the_smallest_others(V: int, tokens: int) -> None:
    chance = np.random.default_rng(V)
    for most in (1, 7, V):
        ids_BT = chance.integers(V - most, V, (4, tokens // 4))
        found = distinct_ids(ids_BT, V, min(V, tokens))
        occur = np.unique(ids_BT)
        others = np.setdiff1d(np.arange(V), occur)[: min(V, tokens) - len(occur)]
        assert found.tolist() == sorted([*occur, *others]) and len(found) == min(V, tokens)


class Dense(TorchDispatchMode):
    """Counts the matrices of the vocabulary's size that operators make, beside those that are there already."""

    def __init__(self, shape: tuple[int, int], known: list[Tensor]) -> None:
        super().__init__()
        self.made = 0
        self._shape, self._known = shape, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self._shape:
            self.made += out.untyped_storage().data_ptr() not in self._known
        return out


@TYPES
@BOTH
def test_nothing_dense_is_made_for_a_micro_batch(spec: ModelSpec, dtype: str) -> None:
    """One sum for all, made with the first loss; autograd makes a matrix or more in every backward pass."""
    made: dict[bool, list[int]] = {}
    for aside in (True, False):
        model = decoder(spec, dtype)
        if aside:
            model.begin_step(rows())
        made[aside] = []
        known = [model.embedding_VD.detach(), model.head_VD.detach()]
        for ids_BT in rows().chunk(2):
            loss = model.loss_sum(whole_rows(ids_BT))
            known += [] if model._outer is None else [model._outer.head_sum_VD]
            with Dense((spec.V, spec.D), known) as seen:
                loss.backward()
            made[aside].append(seen.made)
            model.embedding_VD.grad = model.head_VD.grad = None
    assert made[True] == [0, 0]
    assert min(made[False]) >= 1
    model.begin_step(rows())
    sums = []
    for ids_BT in rows().chunk(2):
        model.loss_sum(whole_rows(ids_BT))
        assert model._outer is not None
        sums.append(model._outer.head_sum_VD)
    assert sums[0] is sums[1]


def test_a_step_that_is_given_up_leaves_nothing() -> None:
    model, fresh = decoder(SPEC), outer(decoder(SPEC))
    run(model)
    model.drop_step()
    assert not list(model.outer_gradients(1.0))
    again = outer(model)
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def test_an_evaluation_in_the_middle_adds_nothing() -> None:
    model, alone = decoder(SPEC), outer(decoder(SPEC))
    scale = run(model)
    model.token_losses(whole_rows(rows().flip(0)))
    found = dict(zip(("head", "embedding"), (gradient for _, gradient in model.outer_gradients(scale)), strict=True))
    assert all(torch.equal(found[name], alone[name]) for name in alone)


@BOTH
def test_the_definitions_leave_them_to_autograd(spec: ModelSpec) -> None:
    ops.configure("reference", CPU)
    model = decoder(spec)
    assert not list(model.outer_gradients(run(model)))
    reference = model.embedding_VD.grad
    ops.configure("auto", CPU)
    assert reference is not None and error(outer(decoder(spec))["embedding"], reference) < 1e-5


def test_frozen_they_have_none() -> None:
    model = decoder(SPEC, layers=(0, 2), train_outer=False)
    assert not list(model.outer_gradients(run(model)))
    assert model.embedding_VD.grad is None and model.head_VD.grad is None


# -- a layer that is run again

WIDE = replace(SPEC, qkv_bias=True, output_bias=True, mlp_bias=True)


class Layer:
    """One layer between a hidden state of two documents and a gradient of what it makes of it."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.model = spec, decoder(spec, layers=(1,), train_outer=False)
        self.weights, N = self.model.layers[0], 40
        generator = torch.Generator().manual_seed(2)
        self.hidden_ND, self.d_out_ND = (torch.randn(N, spec.D, generator=generator) for _ in range(2))
        self.packing = Packing([0, 15, N], torch.cat((torch.arange(15), torch.arange(N - 15))))
        self.rope = RopeTable(spec, CPU).gather(self.packing, N - 15)

    def once(self, need: bool = True) -> dict[str, Tensor | None]:
        """Forward and backward through the graph."""
        hidden_ND = self.hidden_ND.clone().requires_grad_(need)
        decoder_layer(self.spec, 0, self.weights, hidden_ND, self.rope, self.packing).backward(self.d_out_ND)
        return self._gradients() | {"hidden": hidden_ND.grad}

    def again(self, need: bool = True) -> dict[str, Tensor | None]:
        """From the input alone."""
        d_hidden_ND = layer_gradient(
            self.spec, 0, self.weights, self.hidden_ND, self.rope, self.packing, self.d_out_ND, need_d_hidden=need
        )
        return self._gradients() | {"hidden": d_hidden_ND}

    def _gradients(self) -> dict[str, Tensor | None]:
        found = {name: weight.grad for name, weight in self.weights.items()}
        for weight in self.weights.values():
            weight.grad = None
        return found


def same(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    return left.keys() == right.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((left[name], right[name]) for name in left)
    )


@pytest.mark.parametrize("need", [True, False], ids=["below", "nothing below"])
@pytest.mark.parametrize("spec", [SPEC, WIDE], ids=["plain", "biases"])
def test_a_layer_that_is_run_again_has_the_same_gradients_bit_for_bit(spec: ModelSpec, need: bool) -> None:
    layer = Layer(spec)
    found = layer.again(need)
    assert same(found, layer.once(need))
    assert (found.pop("hidden") is not None) == need
    assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in found.values())
    assert not layer.hidden_ND.requires_grad and layer.hidden_ND.grad is None


def flops(work: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())


def test_the_last_product_is_not_run_again() -> None:
    layer = Layer(SPEC)
    down = 2 * len(layer.hidden_ND) * SPEC.D * SPEC.F
    with torch.no_grad():
        forward = flops(lambda: decoder_layer(SPEC, 0, layer.weights, layer.hidden_ND, layer.rope, layer.packing))
    assert forward > 3 * down
    assert flops(layer.again) == flops(layer.once) - down


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "shallow"])
def test_a_model_that_recomputes_learns_the_same_bits(whole: bool) -> None:
    """In the shallow one nothing that enters the first layer needs a gradient."""
    found = []
    for recompute in get_args(Recompute):
        layers = (0, 1, 2) if whole else (0, 2)
        model = decoder(SPEC, layers=layers, train_outer=whole, recompute=recompute)
        handed = {f"outer {i}": gradient for i, (_, gradient) in enumerate(model.outer_gradients(run(model, 2)))}
        found.append({"+".join(leaf.names): leaf.tensor.grad for leaf in model.leaves} | handed)
        assert len(handed) == (2 if whole else 0)
    assert len(found) == 3 and all(same(found[0], other) for other in found[1:])
    assert sum(gradient is not None for gradient in found[0].values()) == len(model.leaves)


def test_an_evaluation_runs_no_layer_for_a_gradient() -> None:
    model = decoder(SPEC, recompute="layer")
    batch: Batch = whole_rows(rows())
    with torch.no_grad():
        assert not model.hidden_states(batch).requires_grad
    assert torch.equal(model.token_losses(batch), decoder(SPEC).token_losses(batch))
