"""The bridge: its fit against numpy, its op against autograd, where the decoder uses it, and what it takes.
tests/test_calibrate.py has the pass of the base model and whole runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import planner_cases
import pytest
import test_flops
import torch
import torch.nn.functional as F
from planner_cases import case, llama, measured_peak, only_what_is_made_here
from safetensors.torch import load, save
from stream_cases import SPEC, random_tensors, step_rows
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elo_engine.config import Recompute
from elo_engine.errors import FailedError, UsageError
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Setting
from elo_engine.model import bridge as bridge_module
from elo_engine.model import ops
from elo_engine.model.bridge import MASSIVE, Bridge, Gap, GapStatistics, gaps
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.layers import decoder_layer
from elo_engine.model.shallow import shallow_names
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.train.loop import micro_batches, to_batch

CPU, FP64 = torch.device("cpu"), torch.float64
D = 12


def states(count: int, seed: int = 0, width: int = D) -> tuple[Tensor, Tensor]:
    """Correlated x with a mean, and y = x + a noisy affine change."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fixed = torch.Generator().manual_seed(99)
    mix_DD, change_DD, offset_D = (torch.randn(s, generator=fixed) for s in ((width, width), (width, width), (width,)))
    x_ND = draw(count, width) @ mix_DD + offset_D
    return x_ND, x_ND + 0.3 * x_ND @ change_DD.T + offset_D + 0.5 * draw(count, width)


def counted(x_ND: Tensor, y_ND: Tensor, pieces: int = 1) -> GapStatistics:
    found = GapStatistics(x_ND.shape[1], CPU)
    for x, y in zip(x_ND.chunk(pieces), y_ND.chunk(pieces), strict=True):
        found.add(x, y)
    return found


def random_bridges(spec: ModelSpec, layers: tuple[int, ...], seed: int = 5) -> dict[Gap, Bridge]:
    generator = torch.Generator().manual_seed(seed)
    return {
        gap: Bridge(
            0.05 * torch.randn(spec.D, spec.D, generator=generator), 0.05 * torch.randn(spec.D, generator=generator)
        )
        for gap in gaps(spec.layers, layers)
    }


# -- the fit


def test_gaps_are_where_layers_are_missing() -> None:
    assert gaps(30, (0, 14, 29)) == [(0, 14), (14, 29)]
    assert gaps(30, (3, 20)) == [(-1, 3), (3, 20), (20, 30)]
    assert gaps(30, (0, 1, 28, 29)) == [(1, 28)]
    assert gaps(4, (0, 1, 2, 3)) == []


def test_an_affine_map_is_recovered() -> None:
    x_ND, _ = states(400)
    generator = torch.Generator().manual_seed(1)
    change_DD, bias_D = torch.randn(D, D, generator=generator), torch.randn(D, generator=generator)
    x_ND = x_ND.double()
    fit = counted(x_ND, x_ND + x_ND @ change_DD.double().T + bias_D).fit(0.0)
    torch.testing.assert_close(fit.bridge.matrix_DD, change_DD, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.bridge.bias_D, bias_D, rtol=1e-6, atol=1e-5)
    assert fit.r2_change == pytest.approx(1) and fit.r2_output == pytest.approx(1)
    assert (fit.tokens, fit.left_out) == (400, 0)


@pytest.mark.parametrize("ridge", [0.0, 0.05, 10.0])
def test_fit_is_numpys_ridge_of_the_change(ridge: float) -> None:
    """Least squares with one more row a feature, which pulls its weights to 0; R2 from the residuals themselves."""
    (x, y), (unseen_x, unseen_y) = ([t.double().numpy() for t in states(300, seed)] for seed in (0, 1))
    change = y - x
    centred, target = x - x.mean(0), change - change.mean(0)
    penalty = np.sqrt(ridge * (centred**2).sum() / D) * np.eye(D)
    expected = np.linalg.lstsq(np.vstack([centred, penalty]), np.vstack([target, np.zeros((D, D))]), rcond=None)[0].T
    bias = change.mean(0) - expected @ x.mean(0)
    fit = counted(torch.from_numpy(x), torch.from_numpy(y)).fit(ridge)
    np.testing.assert_allclose(fit.bridge.matrix_DD, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fit.bridge.bias_D, bias, rtol=1e-5, atol=1e-5)

    def r2(x: np.ndarray, y: np.ndarray, of: np.ndarray) -> float:
        rest = y - x - x @ expected.T - bias
        return float(1 - (rest**2).sum() / ((of - of.mean(0)) ** 2).sum())

    assert fit.r2_change == pytest.approx(r2(x, y, y - x), abs=1e-6)
    assert fit.r2_output == pytest.approx(r2(x, y, y), abs=1e-6)
    unseen = counted(torch.from_numpy(unseen_x), torch.from_numpy(unseen_y)).r2(fit.bridge)
    assert unseen == pytest.approx((r2(unseen_x, unseen_y, unseen_y - unseen_x), r2(unseen_x, unseen_y, unseen_y)))


def test_a_large_ridge_is_no_map_but_the_mean_change() -> None:
    x_ND, y_ND = states(300)
    fit = counted(x_ND, y_ND).fit(1e9)
    assert float(fit.bridge.matrix_DD.abs().max()) < 1e-6 and fit.r2_change == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(fit.bridge.bias_D, (y_ND - x_ND).mean(0), rtol=1e-4, atol=1e-5)


def test_pieces_chunks_and_merging_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, y_ND = states(300)
    whole = counted(x_ND, y_ND)
    merged = counted(x_ND[:100], y_ND[:100])
    merged.merge(counted(x_ND[100:], y_ND[100:]))
    in_pieces = counted(x_ND, y_ND, 7)
    monkeypatch.setattr(bridge_module, "_CHUNK_BYTES", 2 * 8 * D * 13)
    for other in (merged, in_pieces, counted(x_ND, y_ND)):
        for name, total in whole.state().items():
            torch.testing.assert_close(other.state()[name], total, rtol=1e-12, atol=1e-9)


def test_forgetting_weighs_what_came_before() -> None:
    x_ND, y_ND = states(300)
    found = counted(x_ND[:200], y_ND[:200])
    found.scale(0.5)
    found.add(x_ND[200:], y_ND[200:])
    weights = np.sqrt(np.repeat([0.5, 1.0], [200, 100]))[:, None]
    one = np.hstack([x_ND.double().numpy(), np.ones((300, 1))])
    expected = np.linalg.lstsq(weights * one, weights * (y_ND - x_ND).double().numpy(), rcond=None)[0].T
    fit = found.fit(0.0)
    np.testing.assert_allclose(fit.bridge.matrix_DD, expected[:, :D], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fit.bridge.bias_D, expected[:, D], rtol=1e-4, atol=1e-5)
    assert fit.tokens == 200


@pytest.mark.parametrize("where", ["x", "y"])
def test_tokens_with_massive_activations_are_left_out(where: str) -> None:
    x_ND, y_ND = states(300)
    expected = counted(x_ND, y_ND)
    massive_ND = torch.zeros(4, D)
    massive_ND[:, 3] = 2 * MASSIVE * float(torch.maximum(x_ND.norm(dim=1), y_ND.norm(dim=1)).max())
    usual_ND = x_ND[:4]
    more = (massive_ND, usual_ND) if where == "x" else (usual_ND, massive_ND)
    found = counted(torch.cat([x_ND, more[0]]), torch.cat([y_ND, more[1]]))
    assert float(found.state()["left_out"]) == 4
    for name, total in expected.state().items():
        if name != "left_out":
            torch.testing.assert_close(found.state()[name], total, rtol=1e-12, atol=1e-9)
    fit = found.fit(0.0)
    assert (fit.tokens, fit.left_out) == (300, 4) and fit.r2_change == expected.fit(0.0).r2_change


def test_what_cannot_be_fitted_is_said() -> None:
    x_ND, y_ND = states(300)
    with pytest.raises(UsageError, match=rf"{D} tokens.*takes {D + 1}.*bridge_tokens"):
        counted(x_ND[:D], y_ND[:D]).fit(1e-3)
    twice_ND = torch.cat([x_ND[:, :6], x_ND[:, :6]], dim=1)
    with pytest.raises(FailedError, match="singular"):
        counted(twice_ND, y_ND).fit(0.0)
    assert counted(twice_ND, y_ND).fit(1e-6).r2_change > 0.1
    y_ND[7, 2] = torch.nan
    with pytest.raises(FailedError, match="not finite"):
        counted(x_ND, y_ND).fit(1e-3)


def test_state_goes_through_a_file() -> None:
    x_ND, y_ND = states(300)
    before, after = counted(x_ND[:100], y_ND[:100]), GapStatistics(D, CPU)
    after.load(load(save(before.state())))
    for statistics in (before, after):
        statistics.add(x_ND[100:], y_ND[100:])
    assert all(torch.equal(total, after.state()[name]) for name, total in before.state().items())
    for broken in ({"xx": torch.zeros(2, 2, dtype=FP64)}, {"xx": before.state()["xx"].float()}):
        with pytest.raises(FailedError, match="'xx'"):
            after.load(before.state() | broken)
    assert torch.equal(after.state()["xx"], before.state()["xx"]), "nothing is taken over in part"


# -- the op


def test_gradient_is_autograds_of_the_formula() -> None:
    x_ND, y_ND = states(7)
    x_ND = x_ND.double().requires_grad_()
    matrix_DD = torch.randn(D, D, dtype=FP64, generator=torch.Generator().manual_seed(2))
    bridge = Bridge(matrix_DD, y_ND[0].double())
    assert torch.autograd.gradcheck(bridge, (x_ND,))
    plain_ND = x_ND + x_ND @ bridge.matrix_DD.T + bridge.bias_D
    torch.testing.assert_close(bridge(x_ND), plain_ND, rtol=1e-12, atol=1e-12)


def test_it_saves_no_activation_and_makes_no_gradient_of_its_own() -> None:
    x_ND, y_ND = states(50)
    bridge = counted(*states(300)).fit(1e-3).bridge
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        out_ND = bridge(x_ND.requires_grad_())
        forward = counter.get_total_flops()
        out_ND.backward(y_ND)
    assert [tensor.data_ptr() for tensor in saved] == [bridge.matrix_DD.data_ptr()]
    assert bridge.matrix_DD.grad is None and bridge.bias_D.grad is None
    assert (forward, counter.get_total_flops()) == (2 * 50 * D * D, 4 * 50 * D * D)
    assert not bridge(x_ND.detach()).requires_grad, "below the first layer nothing goes back"


def test_the_identity_is_exact() -> None:
    """The error is that of two roundings at the size of the result, not of a sum of D products at the size of x."""
    generator = torch.Generator().manual_seed(3)
    x_ND = 1e4 * torch.randn(64, 512, generator=generator)
    bridge = Bridge(1e-5 * torch.randn(512, 512, generator=generator), torch.randn(512, generator=generator))
    truth_ND = x_ND.double() + x_ND.double() @ bridge.matrix_DD.double().T + bridge.bias_D
    eps = torch.finfo(torch.float32).eps
    error_ND = (bridge(x_ND) - truth_ND).abs()
    change_ND = (truth_ND - x_ND).abs() + 1
    assert bool((error_ND <= 0.5 * eps * truth_ND.abs() + 32 * eps * change_ND).all())
    multiplied_ND = x_ND @ (torch.eye(512) + bridge.matrix_DD).T + bridge.bias_D
    assert float((multiplied_ND - truth_ND).abs().mean()) > 2 * float(error_ND.mean())


# -- in a decoder


def some_batches(spec: ModelSpec, count: int = 2) -> list[Batch]:
    return [to_batch(piece, CPU) for step in range(count) for piece in micro_batches(step_rows(step, spec), 3)]


def shallow(layers: tuple[int, ...], **options: Any) -> Decoder:
    tensors = random_tensors(SPEC, torch.float32)
    kept = {name: tensors[name] for name in shallow_names(SPEC, layers)}
    return Decoder(SPEC, kept, layers, train_outer=False, **options)


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("layers", [(0, 4), (0, 2, 4), (1, 3)])
def test_between_layers_and_at_the_ends(layers: tuple[int, ...], recompute: Recompute) -> None:
    """Loss and gradients against the layers strung together here, with the formula at each gap."""
    ops.configure("auto", CPU)
    bridges, batch = random_bridges(SPEC, layers), some_batches(SPEC)[0]
    model, plain = shallow(layers, recompute=recompute, bridges=bridges), shallow(layers)
    loss = model.loss_sum(batch)
    loss.backward()
    rope = plain._rope.gather(batch.packing, batch.longest)
    hidden_ND = F.embedding(batch.ids_N, plain.embedding_VD)
    into = {gap[1]: bridge for gap, bridge in bridges.items()}
    for index in (*layers, SPEC.layers):
        if index in into:
            hidden_ND = hidden_ND + hidden_ND @ into[index].matrix_DD.T + into[index].bias_D
        if index < SPEC.layers:
            weights = plain.layers[layers.index(index)]
            hidden_ND = decoder_layer(SPEC, index, weights, hidden_ND, rope, batch.packing)
    expected = plain.head_loss(ops.rms_norm(hidden_ND, plain.norm_D, SPEC.norm_eps), batch.labels_N)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(model.leaves, plain.leaves, strict=True):
        assert ours.tensor.grad is not None and theirs.tensor.grad is not None
        torch.testing.assert_close(ours.tensor.grad, theirs.tensor.grad, rtol=1e-4, atol=1e-5)
    assert all(tensor.grad is None for tensor in model.bridge_tensors)
    assert model.frozen().keys() == plain.frozen().keys(), "no checkpoint has a bridge"


def test_bridges_are_replaced_in_place() -> None:
    bridges, other, batch = random_bridges(SPEC, (0, 4)), random_bridges(SPEC, (0, 4), 6), some_batches(SPEC)[0]
    given = bridges[0, 4].matrix_DD.clone()
    model, addresses = shallow((0, 4), bridges=bridges), []
    before = model.loss_sum(batch).detach()
    addresses = [tensor.data_ptr() for tensor in model.bridge_tensors]
    model.replace_bridges(other)
    assert [tensor.data_ptr() for tensor in model.bridge_tensors] == addresses
    assert torch.equal(model.loss_sum(batch), shallow((0, 4), bridges=other).loss_sum(batch))
    assert not torch.equal(model.loss_sum(batch), before) and torch.equal(given, bridges[0, 4].matrix_DD)
    loss = model.loss_sum(batch)
    model.replace_bridges(bridges)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_observers_see_what_enters_a_layer_in_training_alone() -> None:
    model = Decoder(SPEC, random_tensors(SPEC, torch.float32), tuple(range(5)), train_outer=True, recompute="layer")
    seen: dict[int, list[Tensor]] = {index: [] for index in range(6)}
    model.observers = {index: found.append for index, found in seen.items()}
    batch = some_batches(SPEC)[0]
    model.loss_sum(batch).backward()
    assert all(len(found) == 1 and not found[0].requires_grad for found in seen.values()), "not run again, no graph"
    assert torch.equal(seen[0][0], model.embedding_VD.detach()[batch.ids_N])
    last_ND = ops.rms_norm(seen[5][0], model.norm_D.detach(), SPEC.norm_eps)
    assert torch.equal(last_ND, model.hidden_states(batch).detach())
    before = {index: len(found) for index, found in seen.items()}
    model.token_losses(batch)
    model.logits(batch)
    assert {index: len(found) for index, found in seen.items()} == before and model.observers


# -- counted and predicted


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("layers", [(0, 3), (1, 3), (0, 1), (1, 2)])
def test_flops_are_what_torch_counts(
    layers: tuple[int, ...], recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_spec(test_flops.SMALL)
    setting = Setting("elo_pretrain", spec, layers, 96, 2, dtype="fp32", recompute=recompute, device="cpu")
    setting = replace(setting, bridges=len(gaps(spec.layers, layers)))
    monkeypatch.setattr(test_flops, "Decoder", partial(Decoder, bridges=random_bridges(spec, layers)))
    found = test_flops.counted(setting, test_flops.SMALL)
    expected = test_flops.seen_in_full(arm_flops(setting).executed, spec, 96)
    assert found.linear == pytest.approx(expected.linear, rel=1e-3)
    without = arm_flops(replace(setting, bridges=0)).executed.total
    assert arm_flops(setting).executed.total - without == pytest.approx(
        {(0, 3): 4, (1, 3): 6, (0, 1): 4, (1, 2): 6}[layers] * spec.D**2
    )


@pytest.mark.parametrize("fields", [{"micro_batches": 2}, {"recompute": "layer", "state": "8bit"}, {"dtype": "bf16"}])
@pytest.mark.parametrize("layers", [(0, 3), (1, 2)])
def test_predicted_peak_is_the_traced_one(
    layers: tuple[int, ...], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes, T in (((4, 300, 128, 352, 4, 2), 256), ((4, 300, 256, 64, 2, 2), 16)):  # activations, and the maps
        spec, B = llama(*sizes, tied=True), 1
        setting = case("elo_pretrain", spec, T, B, layers=layers, bridges=len(gaps(4, layers)), **fields)
        monkeypatch.setattr(planner_cases, "Decoder", partial(Decoder, bridges=random_bridges(spec, layers)))
        with only_what_is_made_here():
            measured = measured_peak(setting)
        assert 1.0 <= predict_memory(setting).peak_bytes / measured <= 1.08
        assert predict_memory(replace(setting, bridges=0)).peak_bytes < predict_memory(setting).peak_bytes
