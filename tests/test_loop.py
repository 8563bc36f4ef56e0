"""The training loop: accumulation, first-step check, skipped steps, resume bit for bit, signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ELO, Forked
from safetensors.torch import load_file

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import OptimizerConfig, ScheduleConfig, StageConfig
from elo_engine.data import Mixture, TokenStore
from elo_engine.errors import FailedError
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import read_spec
from elo_engine.train.loop import Hooks, Progress, micro_batches, to_batch, train
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine, check_first_gradients
from elo_engine.train.schedule import learning_rate

CPU = torch.device("cpu")


def shallow(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    index = open_checkpoint(folder)
    return load_shallow(index, read_spec(index.config), (0, 3), device=CPU, dtype=dtype)[0]


@pytest.fixture
def mixture(shards: dict[str, str]) -> Mixture:
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    return Mixture(stores, {"ja": 9.0, "en": 1.0}, 32, 42)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_micro_batches_of_one_equal_one_of_four(tied: Path, mixture: Mixture, dtype: torch.dtype) -> None:
    """Normalised by the loss tokens of the step, not by micro-batch: rows with few labels must not weigh more."""
    rows = mixture.rows(0, 4)
    rows.labels_BT[1, 4:] = -100  # a row with few labels is where a mean of means would differ
    count = int((rows.labels_BT >= 0).sum())
    found = []
    for size in (1, 4):
        model = shallow(tied, dtype)
        optimizer = MasterAdamW(model, OptimizerConfig())
        for piece in micro_batches(rows, size):
            (model.loss_sum(to_batch(piece, CPU)) / count).backward()
        found.append({name: gradient.clone() for name, gradient in optimizer.gradients() if gradient is not None})
    assert len(found[0]) == 18
    # fp32 sums in another order; bf16 rounds each micro-batch's gradient once before it is added in fp32
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        error = float((gradient - found[1][name]).abs().max() / found[1][name].abs().max())
        assert error < tolerance, f"{name}: {error:.2e}"


def test_micro_batches_cut_documents_at_the_same_rows(mixture: Mixture) -> None:
    rows = mixture.rows(0, 5)
    pieces = list(micro_batches(rows, 2))
    assert [len(piece.ids_BT) for piece in pieces] == [2, 2, 1]
    assert np.array_equal(np.concatenate([piece.ids_BT for piece in pieces]), rows.ids_BT)
    for piece in pieces:
        assert piece.segment_starts[0] == 0 and piece.segment_starts[-1] == piece.ids_BT.size
        starts = np.zeros(piece.ids_BT.size, dtype=bool)
        starts[piece.segment_starts[:-1]] = True
        assert np.array_equal(starts, piece.positions_BT.reshape(-1) == 0)


def test_first_step_check_names_what_does_not_learn(tied: Path, mixture: Mixture) -> None:
    model = shallow(tied)
    optimizer = MasterAdamW(model, OptimizerConfig())
    with pytest.raises(FailedError, match="got no gradient"):
        check_first_gradients(model, optimizer)
    model.loss_sum(to_batch(mixture.rows(0, 2), CPU)).backward()
    check_first_gradients(model, optimizer)
    model.layers[1]["down"].grad.zero_()
    with pytest.raises(FailedError, match=r"model\.layers\.3\.mlp\.down_proj\.weight is zero everywhere"):
        check_first_gradients(model, optimizer)
    model.layers[1]["down"].grad.fill_(float("nan"))
    with pytest.raises(FailedError, match="not finite"):
        check_first_gradients(model, optimizer)
    model.layers[1]["down"].grad.fill_(1.0)
    model.embedding_VD.grad = torch.ones_like(model.embedding_VD)
    with pytest.raises(FailedError, match=r"embed_tokens\.weight is frozen and got a gradient"):
        check_first_gradients(model, optimizer)


def test_frozen_parts_get_no_gradient_and_do_not_change(untied: Path, mixture: Mixture) -> None:
    model = shallow(untied)
    before = {name: tensor.clone() for name, tensor in model.frozen().items()}
    assert set(before) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    section = StageConfig(tokens=256, tokens_per_step=128, micro_batch=2)
    optimizer = MasterAdamW(model, section.optimizer)
    assert train(
        ResidentEngine(model, optimizer, 2), mixture, section, steps=2, sequence_length=32, progress=Progress(),
        hooks=Hooks(),
    )  # fmt: skip
    for name, tensor in model.frozen().items():
        assert tensor.grad is None and torch.equal(tensor, before[name]), name


def test_steps_with_gradients_that_are_not_finite_are_skipped_then_stop(tied: Path, mixture: Mixture) -> None:
    model = shallow(tied)
    section = StageConfig(tokens=128 * 9, tokens_per_step=128, micro_batch=4)
    optimizer = MasterAdamW(model, section.optimizer)
    kept: list[bool] = []
    weights: list[dict[str, torch.Tensor]] = []
    broken = {3, 6, 7, 8, 9}

    def on_step(progress: Progress, metrics: dict[str, Any]) -> None:
        kept.append(metrics["updated"])
        weights.append({name: view.clone() for name, view in optimizer.weights().items()})
        poison = float("inf") if progress.step + 1 in broken else 1.0
        model.norm_D[0] = poison  # the frozen norm, so that the loss of the next step breaks

    with pytest.raises(FailedError, match="4 times in a row"):
        train(
            ResidentEngine(model, optimizer, section.micro_batch),
            mixture,
            section,
            steps=9,
            sequence_length=32,
            progress=Progress(),
            hooks=Hooks(on_step=on_step),
        )
    assert [number + 1 for number, updated in enumerate(kept) if not updated] == [3, 6, 7, 8, 9]
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1]), "a skipped step changes nothing"
    assert not all(torch.equal(weights[2][name], weights[3][name]) for name in weights[2]), "the next good one does"


def test_learning_rate_warms_up_and_decays_to_its_final_share() -> None:
    schedule = ScheduleConfig(warmup=0.1, final=0.1)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1) and all(a >= b for a, b in itertools.pairwise(rates[9:]))
    constant = ScheduleConfig(warmup=0.0, decay="constant")
    assert [learning_rate(step, 5, 2.0, constant) for step in range(5)] == [2.0] * 5


def test_bf16_keeps_fp32_masters(tied: Path, mixture: Mixture) -> None:
    """Updates far below bf16's resolution must add up in the masters."""
    model = shallow(tied, torch.bfloat16)
    optimizer = MasterAdamW(model, OptimizerConfig(lr=1e-6, clip=None))
    start = {name: view.clone() for name, view in optimizer.weights().items()}
    for step in range(3):
        optimizer.zero_grad()
        model.loss_sum(to_batch(mixture.rows(step, 2), CPU)).backward()
        norm, updated = optimizer.step(1e-6)
        assert updated and norm > 0
    moved = [float((view - start[name]).abs().max()) for name, view in optimizer.weights().items()]
    assert all(2e-6 < value < 4e-6 for value in moved), "three Adam steps of 1e-6 each"
    for leaf, master in optimizer.masters:
        assert leaf.tensor.dtype == torch.bfloat16 and torch.equal(leaf.tensor, master.bfloat16())


def final_state(run: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for stage in ("pretrain", "align"):
        newest = max((run / stage).glob("step-*"))
        for name in ("weights.safetensors", "optimizer.safetensors"):
            for key, tensor in load_file(newest / name).items():
                found[f"{stage}/{newest.name}/{name}/{key}"] = tensor.numpy().tobytes()
    for path in sorted((run / "model").glob("*.safetensors")):
        found[path.name] = path.read_bytes()
    return found


def interrupt_at(monkeypatch: pytest.MonkeyPatch, stage_steps: list[tuple[str, int]]) -> None:
    """SIGINT to this very process when a stage reaches a step, once each, as Ctrl-C would."""
    from elo_engine.run_dir import RunDir

    plain = RunDir.metric
    waiting = list(stage_steps)

    def metric(self: RunDir, record: dict[str, Any]) -> None:
        plain(self, record)
        if waiting and (record.get("stage"), record.get("step")) == waiting[0] and "step_s" in record:
            waiting.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunDir, "metric", metric)


def test_interrupted_and_resumed_twice_equals_uninterrupted_bit_for_bit(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C in pretraining (between two snapshots) and again in alignment: exit 130, a clean snapshot, the same end.
    """
    straight = dict(run_tree, output=str(tmp_path / "straight"))
    assert elo("run", write_config(straight, "straight.yaml"))[0] == 0
    config = write_config(run_tree)
    moments = [("pretrain", 3), ("pretrain", 6), ("align", 1)]  # 6 is the last step: alignment must not start
    interrupt_at(monkeypatch, moments)
    for stage, step in list(moments):
        status, shown = elo("run", config, "--resume", "auto")
        assert status == 130, shown
        assert "--resume auto" in shown
        assert (Path(run_tree["output"]) / stage / f"step-{step:08d}" / "COMMIT.json").exists()
        assert json.loads((Path(run_tree["output"]) / "STATUS").read_text())["state"] == "interrupted"
    status, shown = elo("run", config, "--resume", "auto")
    assert status == 0, shown
    left, right = final_state(tmp_path / "straight"), final_state(Path(run_tree["output"]))
    assert set(left) == set(right)
    assert [name for name in left if left[name] != right[name]] == []
    stages = json.loads((Path(run_tree["output"]) / "report.json").read_text())["stages"]
    assert stages["pretrain"]["steps"] == 6 and stages["align"]["steps"] == 3
    assert stages["pretrain"]["tokens_total"] == 768 and stages["pretrain"]["tokens_per_s"] > 0


def test_killed_without_warning_resumes_bit_for_bit(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]], tmp_path: Path,
    forked: Forked,
) -> None:  # fmt: skip
    """SIGKILL at an arbitrary moment of a real process, twice; at most the steps since the last snapshot are lost."""
    run_tree["pretrain"]["tokens"], run_tree["snapshot"]["every"] = 128 * 24, 8
    straight = dict(run_tree, output=str(tmp_path / "straight"))
    assert elo("run", write_config(straight, "straight.yaml"), "evaluate.every=0")[0] == 0
    config = write_config(run_tree)
    metrics = Path(run_tree["output"]) / "metrics.jsonl"
    for wanted in (5, 13):
        process = forked.start(ELO, "run", config, "evaluate.every=0", "--resume", "auto")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and f'"stage": "pretrain", "step": {wanted},' in metrics.read_text():
                break
            time.sleep(0.002)
        assert process.poll() is None, "the process ended before it could be killed"
        process.kill()
        process.wait()
    status, shown = elo("run", config, "evaluate.every=0", "--resume", "auto")
    assert status == 0, shown
    left, right = final_state(tmp_path / "straight"), final_state(Path(run_tree["output"]))
    assert [name for name in left if left[name] != right.get(name)] == []


def test_alignment_reads_on_where_pretraining_stopped(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """The stages share no rows; full continual pretraining, which has no stage before it, starts at the first one."""
    asked: list[tuple[int, int]] = []
    plain = Mixture.rows

    def rows(self: Mixture, first: int, count: int) -> Any:
        asked.append((first, count))
        return plain(self, first, count)

    monkeypatch.setattr(Mixture, "rows", rows)
    assert elo("run", write_config(run_tree))[0] == 0
    assert asked == [(4 * step, 4) for step in range(9)], "six steps of pretraining, then three of alignment"
    asked.clear()
    assert elo("align", write_config(run_tree), f"output={tmp_path / 'full'}")[0] == 0
    assert asked == [(0, 4), (4, 4), (8, 4)]
