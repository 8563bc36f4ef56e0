"""Losses and gradients that are no numbers, and losses that leap: faults 23, 24 and 25."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_fixture import records
from safetensors.torch import load_file

from elo_engine.data import Mixture, TokenStore
from elo_engine.model.decoder import Decoder
from elo_engine.stream.step import Step
from elo_engine.train.gradients import Gradients
from elo_engine.train.guards import SPIKE_AFTER, LossSpread, scale_of

Elo = Callable[..., tuple[int, str]]
Tree = dict[str, Any]


def spoil_losses(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], calls: set[int]
) -> None:
    """Change the loss of these micro-batches, counted from 1."""
    plain, count = Decoder.loss_sum, [0]

    def loss_sum(self: Decoder, *args: Any, **options: Any) -> torch.Tensor:
        count[0] += 1
        loss = plain(self, *args, **options)
        return change(loss) if count[0] in calls else loss

    monkeypatch.setattr(Decoder, "loss_sum", loss_sum)


def steps_of(run: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("stage") == stage and "step_s" in record]


def assert_finite(run: Path) -> None:
    """Everything that is committed, in every folder of a run."""
    files = sorted(run.rglob("*.safetensors"))
    assert files
    for path in files:
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{path}: {name}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_skipped_and_counted(
    value: float, run_tree: Tree, write_config: Callable[..., Path], elo: Elo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`loss + inf` has a gradient that is finite: the loss itself is looked at. The update is left out, and the run
    goes on."""
    run_tree["snapshot"] = {"every": 1, "keep": 6}
    spoil_losses(monkeypatch, lambda loss: loss + value, {5})  # of the third step, its first half
    status, shown = elo("pretrain", write_config(run_tree), "evaluate.every=0")
    assert status == 0 and "step 3: not finite" in shown, shown
    run = Path(run_tree["output"])
    found = steps_of(run)
    assert [record["updated"] for record in found] == [True, True, False, True, True, True]
    assert [record["skipped"] for record in found] == [0, 0, 1, 1, 1, 1]
    assert found[2]["loss_nats"] is None and found[2]["gradient_norm"] is None
    batch = found[2]["batch"]
    assert [origin["row"] for origin in batch] == [8, 9, 10, 11] and all(origin["documents"] for origin in batch)
    assert "batch" not in found[3]
    for name in ("weights", "optimizer"):
        two, three, four = (
            load_file(run / "pretrain" / f"step-{number:08d}" / f"{name}.safetensors") for number in (2, 3, 4)
        )
        assert all(torch.equal(two[key], three[key]) for key in two), "a skipped step changes nothing"
        assert not all(torch.equal(two[key], four[key]) for key in two)
    assert_finite(run)


def test_four_in_a_row_stop_with_their_own_status_and_name_the_batch(
    run_tree: Tree, write_config: Callable[..., Path], elo: Elo, shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_losses(monkeypatch, lambda loss: loss * math.nan, set(range(3, 100)))
    config = write_config(run_tree)
    status, shown = elo("pretrain", config, "evaluate.every=0")
    assert status == 4, shown
    assert "step 5" in shown and "4 times in a row" in shown and "seed 42, rows 16 to 19" in shown
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    origins = Mixture(stores, {"ja": 9, "en": 1}, 32, 42).origins(16, 4)
    for origin in origins:
        assert f"row {origin.row} is {origin.language}, epoch 0, documents {origin.documents[0]}" in shown
        assert f"from token {origin.token} of {origin.folder}/tokens-00000.bin" in shown
    run = Path(run_tree["output"])
    assert '"failed"' in (run / "STATUS").read_text()
    assert_finite(run)
    monkeypatch.undo()
    status, shown = elo("pretrain", run, "evaluate.every=0")
    assert status == 0 and "resumed at step 4" in shown, shown
    assert steps_of(run)[-1]["skipped"] == 3, "counted on from the snapshot, which had three of them"


def test_the_first_step_has_the_same_status(
    run_tree: Tree, write_config: Callable[..., Path], elo: Elo, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_losses(monkeypatch, lambda loss: loss * math.nan, {1})
    status, shown = elo("pretrain", write_config(run_tree))
    assert status == 4 and "first step" in shown and "rows 0 to 3" in shown, shown


def test_origins_are_where_the_rows_tokens_are(shards: dict[str, str]) -> None:
    """The token offset that an error names is where the row's tokens stand in the file."""
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    mixture = Mixture(stores, {"ja": 9, "en": 1}, 32, 42)
    rows = mixture.rows(0, 200)
    origins = mixture.origins(0, 200)
    assert {origin.epoch for origin in origins} == {0, 1}
    for row, origin in enumerate(origins):
        store = stores[origin.language]
        file, start = store.place(origin.documents[0])
        joined = store.document(origin.documents[0])[origin.token - start :].tolist()
        for document in origin.documents[1:]:
            joined += store.document(document).tolist()
        assert file == origin.file and joined[:32] == rows.ids_BT[row].tolist(), row
        assert len(joined) - len(store.document(origin.documents[-1])) < 32 or len(origin.documents) == 1


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, engine: str, nth: int) -> list[int]:
    """An infinity in one place of one layer's gradient, once; returns the count of chances there were."""
    count = [0]
    if engine == "streamed":
        plain_checked = Step.checked

        def checked(self: Step, number: int, grads: list[Any]) -> list[torch.Tensor]:
            found = plain_checked(self, number, grads)
            count[0] += 1
            if count[0] == nth:
                found[0].view(-1)[3] = math.inf
            return found

        monkeypatch.setattr(Step, "checked", checked)
        return count
    plain = Gradients.take

    def take(self: Gradients, outer: Any) -> None:  # once a step, when its gradients are complete
        plain(self, outer)
        count[0] += 1
        if count[0] == nth:
            grads = (leaf.tensor.grad for leaf in self._leaves)
            next(grad for grad in grads if grad is not None).view(-1)[3] = math.inf

    monkeypatch.setattr(Gradients, "take", take)
    return count


@pytest.mark.parametrize(
    ("engine", "when", "nth", "skipped"),
    [
        ("resident", "after", 3, ("pretrain", 3)), ("resident", "after", 8, ("align", 2)),
        ("streamed", "after", 9, ("align", 2)),  # of 6 units a step
        ("resident", "interleaved", 5, ("pretrain", 4)), ("resident", "interleaved", 6, ("align", 2)),
    ],
)  # fmt: skip
def test_an_infinity_in_one_gradient_is_never_committed(
    engine: str, when: str, nth: int, skipped: tuple[str, int], run_tree: Tree, write_config: Callable[..., Path],
    elo: Elo, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_tree["snapshot"] = {"every": 1, "keep": 9}
    run_tree["align"] |= {"engine": engine, "when": when}
    count = spoil_gradients(monkeypatch, engine, nth)
    status, shown = elo("run", write_config(run_tree), "evaluate.every=0")
    assert status == 0, shown
    assert count[0] >= nth, "the fault was never reached"
    run = Path(run_tree["output"])
    left_out = [(r["stage"], r["step"]) for s in ("pretrain", "align") for r in steps_of(run, s) if not r["updated"]]
    assert left_out == [skipped]
    assert_finite(run)


def test_a_loss_spike_is_logged_and_changes_nothing(
    run_tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tree["pretrain"]["tokens"] = 128 * 26
    spoil_losses(monkeypatch, lambda loss: loss + 20 * loss.detach(), {2 * 24 - 1, 2 * 24})  # the same gradient
    status, shown = elo("pretrain", write_config(run_tree), "evaluate.every=0", "snapshot.every=22")
    assert status == 0 and "step 24: loss" in shown and "far above the usual" in shown, shown
    found = steps_of(Path(run_tree["output"]))
    assert [record["step"] for record in found if record["spike"]] == [24]
    assert found[23]["updated"] and found[23]["usual_loss_nats"] < found[23]["loss_nats"] / 5
    monkeypatch.undo()
    plain = run_tree | {"output": str(tmp_path / "plain")}
    assert elo("pretrain", write_config(plain, "plain.yaml"), "evaluate.every=0", "snapshot.every=22")[0] == 0
    assert not any(record["spike"] for record in steps_of(tmp_path / "plain"))
    runs = Path(run_tree["output"]), tmp_path / "plain"
    left, right = (load_file(run / "pretrain" / "step-00000026" / "weights.safetensors") for run in runs)
    assert all(torch.equal(left[name], right[name]) for name in left), "it is told and nothing else"


def test_the_spread_follows_learning_and_a_new_level_but_not_one_leap() -> None:
    chance = random.Random(3)
    spread, told = LossSpread(), 0
    for step in range(2000):  # a falling curve with noise of 2 %
        told += spread.see((2 + 8 * math.exp(-step / 300)) * (1 + 0.02 * chance.gauss(0, 1))) is not None
    assert told == 0
    kept = LossSpread(spread.state)
    leap = kept.see(9.0)
    assert leap is not None and leap.loss == 9.0 and leap.mean == pytest.approx(spread.mean)
    assert kept.see(9.0) is not None, "the first leap does not hide the second"
    assert spread.mean < kept.mean < 3.0
    for _ in range(200):
        kept.see(9.0)
    assert kept.see(9.0) is None and kept.mean == pytest.approx(9.0, rel=0.1), "a level that stays is the usual one"
    assert kept.see(math.nan) is None and math.isfinite(kept.mean)
    young = LossSpread()
    for _ in range(SPIKE_AFTER - 1):
        young.see(1.0)
    assert young.see(50.0) is None and young.count == SPIKE_AFTER


@pytest.mark.parametrize(
    ("loss", "scale"), [(1.5, 1.0), (-2.0, 1.0), (0.0, 1.0), (math.inf, math.nan), (math.nan, math.nan)]
)
def test_the_backward_pass_begins_with_one_or_with_nan(loss: float, scale: float) -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    (weight * 2 + loss).backward(scale_of(weight * 2 + loss))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.tensor(2.0)) if scale == 1.0 else bool(weight.grad.isnan())
