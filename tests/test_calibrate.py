"""The pass that a bridge is fitted to, against whole models, and runs with a bridge: fitted once, kept, read again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_bridge import random_bridges
from test_loop import interrupt_at

from elo_engine import calibrate as calibration
from elo_engine.calibrate import bridge_path, calibrate, obtain_bridge
from elo_engine.checkpoint import open_checkpoint, rewrite_checkpoint
from elo_engine.config import load_config
from elo_engine.corpora import make_mixture
from elo_engine.data import Mixture, TokenStore
from elo_engine.detach import open_source
from elo_engine.errors import FailedError, RefusedError
from elo_engine.model.bridge import Collector, GapStatistics, gaps
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import read_spec
from elo_engine.report import write_report
from elo_engine.run_dir import RunDir
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import whole_model_scorer
from elo_engine.summary import stage_summary
from elo_engine.train.loop import micro_batches, to_batch

CPU = torch.device("cpu")
Elo = Callable[..., tuple[int, str]]
Tree = dict[str, Any]
Write = Callable[..., Path]


# -- the pass


@pytest.fixture
def batches(shards: dict[str, str]) -> list[Batch]:
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    rows = Mixture(stores, {"ja": 9.0, "en": 1.0}, 32, 42).rows(0, 40)
    return [to_batch(piece, CPU) for piece in micro_batches(rows, 4)]


def statistics_of(folder: Path, layers: tuple[int, ...], dtype: torch.dtype, batches: list[Batch], held: int) -> Any:
    index = open_checkpoint(folder)
    weights = CheckpointWeights(index, read_spec(index.config), CPU, dtype)
    return calibrate(weights, layers, batches[:-held], batches[-held:], 1e-3, lambda share: None)


@pytest.mark.parametrize("layers", [(0, 3), (1, 2), (2,)])
@pytest.mark.parametrize(("source", "dtype"), [("tied", torch.float32), ("untied", torch.bfloat16)])
def test_calibration_is_of_the_whole_models_own_states(
    source: str, dtype: torch.dtype, layers: tuple[int, ...], request: pytest.FixtureRequest, batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To the last bit those that a resident decoder hands its observers, in one sweep or in several."""
    folder = request.getfixturevalue(source)
    index = open_checkpoint(folder)
    model, _ = load_full(index, read_spec(index.config), device=CPU, dtype=dtype, train=False)
    collector = Collector({gap: GapStatistics(model.spec.D, CPU) for gap in gaps(4, layers)})
    model.observers = dict(collector.observers)
    for batch in batches[:-2]:
        model.hidden_states(batch)
    found = statistics_of(folder, layers, dtype, batches, 2)
    unseen = Collector({gap: GapStatistics(model.spec.D, CPU) for gap in gaps(4, layers)})
    model.observers = dict(unseen.observers)
    for batch in batches[-2:]:
        model.hidden_states(batch)
    for fit in found.fits:
        expected = collector.statistics[fit.gap].state()
        assert all(torch.equal(total, expected[name]) for name, total in found.statistics[fit.gap].state().items())
        assert (fit.held_r2_change, fit.held_r2_output) == unseen.statistics[fit.gap].r2(fit.fit.bridge)
        assert fit.held_tokens == 2 * 4 * 32
    monkeypatch.setattr(calibration, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(calibration, "_HIDDEN_SHARE", (1 << 30) // (2 * model.spec.D * dtype.itemsize * 300))
    again = statistics_of(folder, layers, dtype, batches, 2)
    assert [fit.to_json() for fit in again.fits] == [fit.to_json() for fit in found.fits]
    monkeypatch.setattr(calibration, "free_bytes", lambda device: 1000)
    with pytest.raises(RefusedError, match="bridge"):
        statistics_of(folder, layers, dtype, batches, 2)


def test_calibration_is_of_transformers_hidden_states(tied: Path, batches: list[Batch]) -> None:
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float64)
    sums = GapStatistics(48, CPU)
    for batch in batches[:3]:
        starts = batch.packing.segment_starts
        pieces = [batch.ids_N[a:b] for a, b in pairwise(starts)]
        with torch.no_grad():
            hidden = [theirs(input_ids=ids[None], output_hidden_states=True).hidden_states for ids in pieces]
        sums.add(*(torch.cat([found[layer][0] for found in hidden]) for layer in (1, 3)))
    found = statistics_of(tied, (0, 3), torch.float32, batches[:4], 1).statistics[0, 3].state()
    for name, total in sums.state().items():
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-4 * float(total.abs().max()), msg=name)


def test_the_shallow_model_starts_nearer_to_the_whole_one(tied: Path, batches: list[Batch], tmp_path: Path) -> None:
    """A whole model that has learned something, cut down to its ends: with the bridge it has forgotten less."""
    index = open_checkpoint(tied)
    spec = read_spec(index.config)
    taught, _ = load_full(index, spec, device=CPU, dtype=torch.float32)
    optimizer = torch.optim.AdamW([leaf.tensor for leaf in taught.leaves], lr=1e-2)
    for number in range(60):
        batch = batches[number % 8]
        (taught.loss_sum(batch) / (batch.labels_N >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    rewrite_checkpoint(index, taught.trainable(), tmp_path)
    shutil.copy(tied / "config.json", tmp_path)
    found = statistics_of(tmp_path, (0, 3), torch.float32, batches, 2)

    def loss(model: Decoder) -> float:  # of rows that the bridge was fitted to, as the first step's are
        return sum(float(model.token_losses(batch).sum()) for batch in batches[:2]) / sum(
            int((batch.labels_N >= 0).sum()) for batch in batches[:2]
        )

    load_it = partial(load_shallow, open_checkpoint(tmp_path), spec, (0, 3), device=CPU, dtype=torch.float32)
    whole, cut, bridged = loss(taught), loss(load_it()[0]), loss(load_it(bridges=found.bridges)[0])
    assert cut - whole > 0.05
    assert bridged - whole < 0.5 * (cut - whole)


def test_the_whole_model_is_scored_without_its_bridge(tied: Path, batches: list[Batch]) -> None:
    index = open_checkpoint(tied)
    spec = read_spec(index.config)
    load_it: Callable[..., Any] = partial(load_shallow, index, spec, (0, 3), device=CPU, dtype=torch.float32)
    plain, bridged = load_it()[0], load_it(bridges=random_bridges(spec, (0, 3)))[0]
    assert not torch.equal(plain.token_losses(batches[0]), bridged.token_losses(batches[0]))
    scored = [whole_model_scorer(index, model).losses_of(batches[:1], lambda share: None) for model in (plain, bridged)]
    assert torch.equal(scored[0][0], scored[1][0])


# -- runs


@pytest.fixture
def bridged(run_tree: Tree) -> Tree:
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 1600}
    run_tree["evaluate"]["every"] = 0
    return run_tree


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("event") == kind]


def snapshot_of(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "pretrain").glob("step-*"))
    return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


def test_stopped_and_resumed_a_run_ends_as_one_that_was_not(
    bridged: Tree, write_config: Write, elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the calibration pass and after three steps; the bridge is fitted once and never again."""
    straight = dict(bridged, output=str(tmp_path / "straight"))
    assert elo("pretrain", write_config(straight, "straight.yaml"))[0] == 0
    config, run = write_config(bridged), Path(bridged["output"])
    plain, calls = calibration.decoder_layer, [0]

    def interrupted(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "decoder_layer", interrupted)
        status, shown = elo("pretrain", config)
    assert status == 130 and "--resume auto" in shown and not (run / "pretrain").exists(), shown
    assert calls[0] == 2, "the stop is asked for after every batch of a layer"
    interrupt_at(monkeypatch, [("pretrain", 3)])
    assert elo("pretrain", config, "--resume", "auto")[0] == 130
    before = (run / "pretrain" / "bridge.safetensors").stat().st_mtime_ns
    status, shown = elo("pretrain", config, "--resume", "auto")
    assert status == 0 and "bridge: read from" in shown
    left, right = snapshot_of(tmp_path / "straight"), snapshot_of(run)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert (run / "pretrain" / "bridge.safetensors").stat().st_mtime_ns == before
    assert len(events(run, "bridge")) == 1

    # what comes out: the middle of the model untouched, and the fit told
    assert elo("reattach", run)[0] == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (Path(bridged["model"]), run / "reattached"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]) != (".layers.0." in name or ".layers.3." in name), name
    summary = stage_summary(run, "pretrain")
    fit = summary["bridge"]["gaps"]
    assert fit == events(run, "bridge")[0]["gaps"] and fit[0]["gap"] == [0, 3]
    assert 0 < fit[0]["held_r2_change"] < fit[0]["r2_change"] < 1
    assert (fit[0]["tokens"] + fit[0]["left_out"], fit[0]["held_tokens"]) == (45 * 32, 5 * 32)
    write_report(run, {"evaluations": {}, "stages": {"pretrain": summary}})
    assert f"| 0 to 3 | {fit[0]['r2_change']:.3f} | {fit[0]['held_r2_change']:.3f} |" in (run / "report.md").read_text()


def test_a_bridge_that_is_gone_damaged_or_anothers_is_not_replaced(
    bridged: Tree, write_config: Write, tmp_path: Path
) -> None:
    config = load_config(write_config(bridged))
    source = open_source(config)
    mixture = make_mixture(config, source.folder, source.spec.V)
    with RunDir.create(config) as run:
        fitted = obtain_bridge(run, source, mixture)
        path = bridge_path(run)
        whole = path.read_bytes()
        (path.parent / "step-00000002").mkdir()
        for content, fragment in (
            (whole[:-1] + bytes([whole[-1] ^ 1]), "not those that were written"),
            (whole[:100], "cannot be read"),
            (None, "is gone"),
        ):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(FailedError, match=fragment):
                obtain_bridge(run, source, mixture)
            path.write_bytes(whole)
        again = obtain_bridge(run, source, mixture)
    assert fitted is not None and again is not None and again.statistics == {}
    assert torch.equal(fitted.bridges[0, 3].matrix_DD, again.bridges[0, 3].matrix_DD)
    assert torch.equal(fitted.bridges[0, 3].bias_D, again.bridges[0, 3].bias_D)
    with RunDir.create(config.model_copy(update={"output": str(tmp_path / "other")})) as other:
        bridge_path(other).parent.mkdir()
        shutil.copy(path, bridge_path(other))
        with pytest.raises(RefusedError, match="run_id"):
            obtain_bridge(other, source, mixture)


def test_rows_and_statistics_of_a_run(bridged: Tree, write_config: Write) -> None:
    config = load_config(write_config(bridged))
    source = open_source(config)
    mixture = make_mixture(config, source.folder, source.spec.V)
    with RunDir.create(config) as run:
        first = obtain_bridge(run, source, mixture, keep_statistics=True)
        again = obtain_bridge(run, source, mixture, keep_statistics=True)
    assert first is not None and again is not None
    assert [fit.to_json() for fit in first.fits] == [fit.to_json() for fit in again.fits]
    left, right = (found.statistics[0, 3].state() for found in (first, again))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(again.statistics[0, 3].fit(config.detach.ridge).bridge.matrix_DD, first.bridges[0, 3].matrix_DD)
    # the rows: the first 45 of training, and the 5 after them held out
    weights = CheckpointWeights(source.index, source.spec, CPU, source.dtype)
    fitted, held = (to_batch(mixture.rows(begin, count), CPU) for begin, count in ((0, 45), (45, 5)))
    by_hand = calibrate(weights, source.layers, [fitted], [held], config.detach.ridge, lambda share: None)
    assert [fit.to_json() for fit in by_hand.fits] == [fit.to_json() for fit in first.fits]


def test_too_few_tokens_and_no_gap(bridged: Tree, write_config: Write, elo: Elo, tmp_path: Path) -> None:
    status, shown = elo("pretrain", write_config(bridged), "detach.bridge_tokens=64")
    assert status == 2 and "detach.bridge_tokens" in shown and "48 features" in shown
    tree = dict(bridged, output=str(tmp_path / "all"))
    status, shown = elo("pretrain", write_config(tree, "all.yaml"), "detach.layers=[0-3]")
    assert status == 0 and "no gap to bridge" in shown and not list((tmp_path / "all" / "pretrain").glob("bridge*"))


def test_the_plan_has_it(bridged: Tree, write_config: Write, elo: Elo) -> None:
    config = write_config(bridged)
    plans = []
    for kind in ("linear", "none"):
        status, shown = elo("plan", config, f"detach.bridge={kind}", "--json")
        plans.append(json.loads(shown[shown.index("{") :]))
        assert status == 0
    with_it, without = plans
    part = with_it["pretrain"]["bridge"]
    assert (part["gaps"], part["bytes"], part["calibration_tokens"]) == (1, 4 * 49 * 48, 1600)
    assert with_it["pretrain"]["flops_per_token"] - without["pretrain"]["flops_per_token"] == 4 * 48 * 48
    assert with_it["ideal_pipeline_speedup"] < without["ideal_pipeline_speedup"]
    assert with_it["disk"]["total_bytes"] - without["disk"]["total_bytes"] == with_it["disk"]["bridge"] == 4 * 49 * 48
    assert without["pretrain"]["bridge"] is None and "bridge" not in without["disk"]
    assert "pretrain's bridge: 1 frozen" in elo("plan", config)[1].replace("\n", " ")
