"""The model against transformers, its oracle: logits, loss and every gradient, whole and shallow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import Recompute
from elo_engine.model import ops
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.layers import Packing
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import read_spec

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied, three shards": {"tied": False, "shards": 3},
    "biases": {"tied": False, "attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "no sharing of key heads": {"num_key_value_heads": 6},
    "llama3 rotary": {"rope_parameters": LLAMA3},
    "linear rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn rotary": {"rope_parameters": YARN},
    "mistral with window": {"family": "mistral", "sliding_window": 12},
}


@pytest.fixture(params=["reference", "auto"])
def mode(request: pytest.FixtureRequest) -> Any:
    ops.configure(request.param, CPU)
    yield request.param
    ops.configure("auto", CPU)


def whole_rows(ids_BT: Tensor) -> Batch:
    B, T = ids_BT.shape
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, :-1] = ids_BT[:, 1:]
    packing = Packing([row * T for row in range(B + 1)], torch.arange(T).repeat(B))
    return Batch(ids_BT.reshape(-1), labels_BT.reshape(-1), packing, T)


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {}
    for leaf in model.leaves:
        assert leaf.tensor.grad is not None
        found.update(leaf.split(leaf.tensor.grad))
    return found


def assert_close(ours: Tensor, theirs: Tensor, relative: float, what: str) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < relative, f"{what}: {error:.2e} of the largest value, allowed {relative:.0e}"


@pytest.mark.parametrize("case", CASES)
def test_whole_model_equals_transformers(make_checkpoint: Callable[..., Path], case: str, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(**CASES[case])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    index = open_checkpoint(folder)
    ours, _ = load_full(index, read_spec(index.config), device=CPU, dtype=torch.float32)
    ids_BT = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    batch = whole_rows(ids_BT)
    expected = theirs(input_ids=ids_BT, labels=ids_BT)
    expected.loss.backward()
    assert_close(ours.logits(batch).view_as(expected.logits), expected.logits.detach(), 1e-5, "logits")
    loss = ours.loss_sum(batch) / int((batch.labels_N >= 0).sum())
    loss.backward()
    assert_close(loss.detach(), expected.loss.detach(), 1e-6, "loss")
    found = gradients(ours)
    named = dict(theirs.named_parameters())
    assert set(found) == set(named)
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert_close(found[name], parameter.grad, 2e-5, name)


@pytest.mark.parametrize("tie", [True, False])
def test_shallow_model_equals_transformers_layers_composed_by_hand(
    make_checkpoint: Callable[..., Path], tie: bool, mode: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tied=tie)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.requires_grad_(False)
    chosen = [theirs.model.layers[0], theirs.model.layers[3]]
    for layer in chosen:
        layer.requires_grad_(True)
    ids_BT = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(2))
    hidden_BTD = theirs.model.embed_tokens(ids_BT)
    positions_BT = torch.arange(24).repeat(2, 1)
    tables = theirs.model.rotary_emb(hidden_BTD, positions_BT)
    for layer in chosen:
        out = layer(hidden_BTD, position_embeddings=tables, attention_mask=None, position_ids=positions_BT)
        hidden_BTD = out if isinstance(out, Tensor) else out[0]
    logits = theirs.lm_head(theirs.model.norm(hidden_BTD))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 320), ids_BT[:, 1:].reshape(-1))
    expected.backward()

    index = open_checkpoint(folder)
    ours, _ = load_shallow(index, read_spec(index.config), (0, 3), device=CPU, dtype=torch.float32)
    batch = whole_rows(ids_BT)
    loss = ours.loss_sum(batch) / int((batch.labels_N >= 0).sum())
    loss.backward()
    assert_close(loss.detach(), expected.detach(), 1e-6, "loss")
    found = gradients(ours)
    assert len(found) == 18, "nine tensors in each of two layers learn, nothing else"
    for number, layer in zip((0, 3), chosen, strict=True):
        for name, parameter in layer.named_parameters():
            assert_close(found[f"model.layers.{number}.{name}"], parameter.grad, 2e-5, name)


def test_packed_documents_equal_documents_alone(tied: Path, mode: str) -> None:
    """Three documents in one row give each its own loss, as if it were alone."""
    index = open_checkpoint(tied)
    model, _ = load_full(index, read_spec(index.config), device=CPU, dtype=torch.float32, train=False)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 320, (1, length), generator=generator) for length in (7, 20, 13)]
    alone = [whole_rows(document) for document in documents]
    starts = [0, 7, 27, 40]
    packed = Batch(
        torch.cat([batch.ids_N for batch in alone]),
        torch.cat([batch.labels_N for batch in alone]),
        Packing(starts, torch.cat([batch.packing.positions_N for batch in alone])),
        20,
    )
    expected_N = torch.cat([model.token_losses(batch) for batch in alone])
    torch.testing.assert_close(model.token_losses(packed), expected_N, rtol=1e-5, atol=1e-5)


def test_changing_one_document_leaves_the_other_bit_identical(tied: Path, mode: str) -> None:
    index = open_checkpoint(tied)
    model, _ = load_full(index, read_spec(index.config), device=CPU, dtype=torch.float32, train=False)
    ids_BT = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(4))
    packing = Packing([0, 11, 32, 50, 64], torch.cat([torch.arange(n) for n in (11, 21, 18, 14)]))
    labels_N = torch.roll(ids_BT.reshape(-1), -1)
    labels_N[[10, 31, 49, 63]] = -100
    before_N = model.token_losses(Batch(ids_BT.reshape(-1), labels_N, packing, 21))
    changed_N, other_labels_N = ids_BT.reshape(-1).clone(), labels_N.clone()
    changed_N[:11] = (changed_N[:11] + 5) % 320
    other_labels_N[:10] = changed_N[1:11]
    after_N = model.token_losses(Batch(changed_N, other_labels_N, packing, 21))
    assert not torch.equal(before_N[:11], after_N[:11]), "the changed document must change"
    assert torch.equal(before_N[11:], after_N[11:]), "no other document may change in any bit"


def test_recomputed_layers_give_the_same_gradients(tied: Path) -> None:
    index = open_checkpoint(tied)
    ids_BT = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(5))
    found = []
    for recompute in get_args(Recompute):
        model, _ = load_full(index, read_spec(index.config), device=CPU, dtype=torch.float32, recompute=recompute)
        model.loss_sum(whole_rows(ids_BT)).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert all(torch.equal(gradient, other[name]) for other in found[1:]), name
