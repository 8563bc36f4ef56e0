"""`elo search` on a tiny model: the losses of ordinary runs, the same rows for all, a source that stays as it is,
resume, failures, and the ranking and the finding from results that are made up.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import fingerprint

from elo_engine import search, search_trial
from elo_engine.config import make_config
from elo_engine.data import Mixture
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.machine import Room
from elo_engine.search_jobs import choose_candidates, default_candidates, target_of
from elo_engine.search_report import describe, draw, make_result

Elo = Callable[..., tuple[int, str]]
Tree = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_looked_through(tied: Path) -> Iterator[None]:
    """Every stage collects garbage; among what transformers and torch leave there is none, and looking takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tree(run_tree: Tree) -> Tree:
    """Two steps of either stage, held-out text of 128 tokens a language, and a bridge."""
    run_tree["pretrain"]["tokens"] = run_tree["align"]["tokens"] = 256
    run_tree["evaluate"] |= {"every": 0, "tokens": 128}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 256}
    return run_tree


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search.json").read_text())  # type: ignore[no-any-return]


def by_layers(found: dict[str, Any], *layers: int) -> dict[str, Any]:
    return next(one for one in found["candidates"] if one["layers"] == list(layers))


@pytest.mark.parametrize(
    ("kind", "layers", "seed", "bridge", "dtype"),
    [("tied", (1, 2), 42, "none", "bf16"), ("untied", (0, 3), 43, "linear", "fp32")],
)
def test_losses_are_those_of_an_ordinary_run_and_the_source_stays(
    kind: str, layers: tuple[int, int], seed: int, bridge: str, dtype: str, request: pytest.FixtureRequest, tree: Tree,
    write_config: Callable[..., Path], elo: Elo, tmp_path: Path,
) -> None:  # fmt: skip
    """`untied` is stored in bf16 and trained in fp32, so what is written back is rounded; `tied` is stored in fp32 and
    trained in bf16, so what is written back is the masters.
    """
    source: Path = request.getfixturevalue(kind)
    tree["model"], before, out, run = str(source), fingerprint(source), tmp_path / "found", tmp_path / "run"
    tree["dtype"] = dtype
    config, bridged = write_config(tree), f"detach.bridge={bridge}"
    status, shown = elo("search", config, bridged, "--layers", "0,last;1-2", "--seeds", seed - 41, "--out", out)
    assert status == 0, shown
    assert fingerprint(source) == before
    status, shown = elo("run", config, bridged, f"detach.layers={list(layers)}", f"seed={seed}", f"output={run}")
    assert status == 0, shown
    found, ran = found_in(out), json.loads((run / "results.json").read_text())["evaluations"]
    mine = next(one for one in by_layers(found, *layers)["runs"] if one["seed"] == seed)
    for moment in ("reattached", "aligned"):
        expected = {language: one["loss_nats"] for language, one in ran[moment].items()}
        assert mine["loss_nats"][moment] == expected, moment
    assert len(mine["bridge"]) == (bridge == "linear")
    assert found["base"] == {language: one["loss_nats"] for language, one in ran["base"].items()}
    losses = [one["runs"][0]["loss_nats"]["aligned"]["ja"] for one in (*found["candidates"], *found["controls"])]
    assert len(set(losses)) == 3, "what is detached makes a difference, and so does ELO pretraining"
    assert (out / "search.png").stat().st_size > 0 and (out / "config.resolved.yaml").exists()
    assert not any(path.suffix == ".safetensors" for path in out.rglob("*"))


def test_every_candidate_of_a_seed_reads_the_same_rows(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["detach"] = {"bridge": "none"}
    read: list[tuple[int, int, bytes]] = []
    rows = Mixture.rows

    def noted(self: Mixture, first: int, count: int) -> Any:
        found = rows(self, first, count)
        read.append((first, count, found.ids_BT.tobytes()))
        return found

    monkeypatch.setattr(Mixture, "rows", noted)
    arguments = ("--layers", "0,3;1,2", "--seeds", 2, "--out", tmp_path / "found")
    assert elo("search", write_config(tree), *arguments)[0] == 0
    align, whole = [8, 12], [0, 4, 8, 12]  # first rows of the steps, of four rows each
    assert [first for first, _, _ in read] == 2 * (align + whole + whole)
    one, other = read[:10], read[10:]
    for seed in (one, other):
        assert seed[0:2] == seed[4:6] == seed[8:10] and seed[2:6] == seed[6:10]
    assert one[2][2] != other[2][2], "another seed, another order"


def test_resume_goes_on_and_refuses_other_settings(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    config, out = write_config(tree), tmp_path / "found"
    first = elo("search", config, "--layers", "0,3", "--seeds", 1, "--out", out)
    assert first[0] == 0, first[1]
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert set(kept) == {"base.json", "alignment-alone-seed42.json", "layers-0-3-seed42.json"}
    assert elo("search", config, "--layers", "0,3", "--seeds", 1, "--out", out)[0] == 3, "nothing is written over"
    before = found_in(out)
    status, shown = elo("search", config, "--layers", "0,3;1", "--seeds", 1, "--out", out, "--resume")
    assert status == 0 and "1 of 4 jobs to do" in shown, shown
    assert {name: (out / "results" / name).stat().st_mtime_ns for name in kept} == kept
    after = found_in(out)
    assert by_layers(after, 0, 3)["runs"] == by_layers(before, 0, 3)["runs"] and len(after["candidates"]) == 2
    status, shown = elo(
        "search", config, "pretrain.optimizer.lr=1e-3", "--layers", "0,3", "--seeds", 1, "--out", out, "--resume"
    )
    assert status == 3 and "results/base.json" in shown and "pretrain.optimizer.lr: then 0.003, now 0.001" in shown
    status, shown = elo("search", config, "--align-tokens", "1K", "--seeds", 1, "--out", out, "--resume")
    assert status == 3 and "align.tokens: then 256, now 1000" in shown
    (out / "results" / "base.json").write_text("{")
    status, shown = elo("search", config, "--layers", "0,3", "--seeds", 1, "--out", out, "--resume")
    assert status == 1 and "base.json: cannot be read" in shown


def test_a_candidate_that_fails_is_kept_and_the_others_go_on(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 2 gets weights that are not finite after ELO pretraining, so its held-out loss is not."""
    tree["detach"] = {"bridge": "none"}
    trained = search_trial._pretrain

    def spoiled(shared: Any, config: Any, layers: Any, *rest: Any) -> Any:
        found = trained(shared, config, layers, *rest)
        return {name: tensor / 0 if layers == (2,) else tensor for name, tensor in found.items()}

    monkeypatch.setattr(search_trial, "_pretrain", spoiled)
    out = tmp_path / "found"
    arguments = ("search", write_config(tree), "--layers", "2;0,3", "--seeds", 1, "--out", out)
    status, shown = elo(*arguments)
    assert status == 0 and "failed: the reattached model's held-out loss of en is not finite" in shown, shown
    found = found_in(out)
    assert [one["layers"] for one in found["candidates"]] == [[0, 3], [2]]
    assert [one["rank"] for one in found["candidates"]] == [1, None]
    assert by_layers(found, 2)["failed"][0]["seed"] == 42 and by_layers(found, 2)["runs"] == []
    assert by_layers(found, 0, 3)["runs"][0]["loss_nats"]["aligned"]["ja"] > 0
    kept = (out / "results" / "layers-2-seed42.json").stat().st_mtime_ns
    assert elo(*arguments, "--resume")[0] == 0
    assert (out / "results" / "layers-2-seed42.json").stat().st_mtime_ns == kept, "a failure is a result"


def test_gradients_that_are_not_finite_are_a_failure_too(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    tree["pretrain"] |= {"tokens": 1280, "optimizer": {"lr": 1e30, "clip": None}, "schedule": {"warmup": 0.0}}
    out = tmp_path / "found"
    status, shown = elo("search", write_config(tree), "--layers", "0,3", "--seeds", 1, "--out", out)
    assert status == 0, shown
    found = found_in(out)
    assert found["candidates"][0]["failed"] and found["controls"][0]["runs"], "alignment alone is not concerned"
    assert "not tested" in found["finding"]["text"]


def test_an_interrupt_keeps_what_is_done(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the first step of the second candidate."""
    train, out, calls = search_trial.train, tmp_path / "found", [0]

    def interrupted(*arguments: Any, **more: Any) -> bool:
        calls[0] += 1
        if calls[0] == 4:  # alignment alone, then two stages of the first candidate
            os.kill(os.getpid(), signal.SIGINT)
        return train(*arguments, **more)

    monkeypatch.setattr(search_trial, "train", interrupted)
    arguments = ("search", write_config(tree), "--layers", "0,3;1,2", "--seeds", 1, "--out", out)
    status, shown = elo(*arguments)
    assert status == 130 and "SIGINT: 3 of 4 jobs are done" in shown and "--resume" in shown, shown
    assert not (out / "search.json").exists() and not (out / "results" / "layers-1-2-seed42.json").exists()
    assert json.loads((out / "STATUS").read_text())["state"] == "interrupted"
    status, shown = elo(*arguments, "--resume")
    assert status == 0 and "1 of 4 jobs to do" in shown, shown
    assert calls[0] == 6, "the second candidate alone is made again"


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (("--layers", "0,3;0,9"), 2, "candidate '0,9': detach.layers: layer 9 does not exist"),
        (("--layers", "0,3;x"), 2, "candidate 'x': detach.layers: 'x' cannot be read"),
        (("--layers", "0,3;first,-1"), 2, "'first,-1' and '0,3' are the same layers, [0, 3]"),
        (("align.when=interleaved",), 2, "add align.when=after"),
        (("align.engine=streamed",), 2, "add align.engine=auto"),
        (("evaluate.shards={}",), 2, "evaluate.shards has nothing; add evaluate.shards.ja=DIR"),
        (("--pretrain-tokens", "some"), 2, "pretrain.tokens: 'some' is not an amount of tokens"),
        (("--align-tokens", "64"), 2, "align.tokens 64 is less than one step"),
        (("--seeds", "0"), 2, "--seeds"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    more: tuple[str, ...], status: int, said: str, tree: Tree, write_config: Callable[..., Path], elo: Elo,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "found"
    overrides, options = ([one] for one in (more[0], "")) if "=" in more[0] else ([], list(more))
    got, shown = elo("search", write_config(tree), *filter(None, overrides), "--out", out, *filter(None, options))
    assert got == status and said in shown, shown
    assert not out.exists()


def test_what_does_not_fit_is_refused_with_the_planned_bytes(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model's weights count beside what an alignment takes: room for the latter alone is not enough."""
    config = make_config(tree)
    source = search.open_source(config)
    need = search_trial.require_room(source, {(): config})
    base = search_trial.whole_bytes(source.spec, source.dtype)
    assert need > base > 4 * source.spec.parameters - 1

    monkeypatch.setattr(search_trial, "device_room", lambda device: Room(need, "here"))
    assert search_trial.require_room(source, {(): config}) == need
    monkeypatch.setattr(search_trial, "device_room", lambda device: Room(need - 1, "here"))
    with pytest.raises(RefusedError, match=r"does not fit.*alignment of a trial .alignment alone. .*elo run"):
        search_trial.require_room(source, {(): config})
    status, shown = elo("search", write_config(tree), "--layers", "0", "--out", tmp_path / "found")
    assert status == 3 and "does not fit" in shown and not (tmp_path / "found").exists()


def test_candidates_by_default() -> None:
    assert default_candidates(30) == ((0, 29), (0, 1), (28, 29), (14, 15), (0, 15), (15, 29), (0, 1, 28, 29))
    assert default_candidates(4) == ((0, 3), (0, 1), (2, 3), (1, 2), (0, 2), (0, 1, 2, 3))
    for layers in (1, 2, 3, 5):
        found = default_candidates(layers)
        assert len(set(found)) == len(found) and all(0 <= min(one) <= max(one) < layers for one in found)
    assert choose_candidates("29,0; 0-1 ;-2,last", 30) == ((0, 29), (0, 1), (28, 29))


def test_the_target_has_the_largest_share(tree: Tree) -> None:
    assert target_of(make_config(tree)) == "ja"
    tree["data"]["mix"] = {"ja": 1, "en": 9}
    assert target_of(make_config(tree)) == "en"
    tree["data"]["mix"] = None
    assert target_of(make_config(tree)) == next(iter(tree["data"]["shards"]))
    del tree["evaluate"]["shards"]["ja"]
    with pytest.raises(UsageError, match=r"held-out loss of ja, and evaluate\.shards has en"):
        target_of(make_config(tree))


# -- the ranking and the finding, from made-up results


def result(losses: dict[tuple[int, ...], list[float | None]], alone: float = 2.7) -> dict[str, Any]:
    """Aligned target losses of each candidate by seed, None: failed; a model of 30 layers."""

    def found(loss: float | None, moments: tuple[str, ...]) -> dict[str, Any]:
        if loss is None:
            return {"failed": "not finite"}
        each = {"ja": {"loss_nats": loss}, "en": {"loss_nats": 3.1}}
        return {"failed": None, "evaluations": dict.fromkeys(moments, each), "bridge": [], "seconds": {}}

    rows: list[Any] = [("base", (), 1, found(3.0, ("base",)))]
    for seed in range(1, 1 + len(next(iter(losses.values())))):
        rows.append(("alone", (), seed, found(alone, ("aligned",))))
        for layers, each in losses.items():
            rows.append(("candidate", layers, seed, found(each[seed - 1], ("reattached", "aligned"))))
    conditions = {"target": "ja", "layers_total": 30, "tokens": {"shallow": 147_456, "whole": 16_384}}
    return make_result(conditions, {layers: len(layers) / 2 for layers in losses}, rows)


ENDS, FIRST, LAST, FOUR = (0, 29), (0, 1), (28, 29), (0, 1, 28, 29)


@pytest.mark.parametrize(
    ("losses", "verdict", "said"),
    [
        ({ENDS: [2.5, 2.6], FIRST: [2.7, 2.8], LAST: [2.65, 2.9]}, "confirmed", "below all of theirs. Were all equal"),
        ({ENDS: [2.5, 2.6], FIRST: [2.3, 2.4], LAST: [2.65, 2.9]}, "contradicted", "Wholly below it: layers 0, 1."),
        ({ENDS: [2.5, 2.6], FIRST: [2.6, 2.8], LAST: [2.7, 2.8]}, "not told apart", "ranges of layers 0, 1 overlap"),
        ({ENDS: [2.5, 2.6], FIRST: [2.4, 2.5]}, "not told apart", "ranges of layers 0, 1 overlap"),
        ({ENDS: [2.5], FIRST: [2.9]}, "not told apart", "One seed cannot tell"),
        ({ENDS: [2.5, None], FIRST: [2.7, 2.8]}, "not told apart", "failed with some seeds"),
        ({ENDS: [2.5, 2.6], FIRST: [2.7, 2.8], LAST: [None, 2.9]}, "not told apart", "Some of the others failed"),
        ({ENDS: [2.5, 2.6], FIRST: [2.3, 2.4], LAST: [None, 2.9]}, "contradicted", "Wholly below it: layers 0, 1."),
        ({ENDS: [2.5, 2.6], FIRST: [2.3, 2.4], LAST: [2.6, 2.7]}, "contradicted", "up to 33 % of searches"),
        ({ENDS: [2.5, 2.6, 2.5], FIRST: [2.7, 2.8, 2.9]}, "confirmed", "up to 5 % of searches"),  # 1 of C(6, 3)
        ({FIRST: [2.5, 2.6], LAST: [2.7, 2.8]}, "not tested", "is not among the candidates"),
        ({ENDS: [None, None], LAST: [2.7, 2.8]}, "not tested", "layers 0, 29 (first and last) failed"),
        ({ENDS: [2.5, 2.6], FOUR: [2.1, 2.2]}, "not tested", "nothing to compare"),
        ({ENDS: [2.5, 2.6], LAST: [2.7, 2.8], FOUR: [2.1, 2.2]}, "confirmed", "At 2.00x the cost a token layers 0, 1"),
    ],
)
def test_the_finding_goes_no_further_than_the_spread(
    losses: dict[tuple[int, ...], list[float | None]], verdict: str, said: str
) -> None:
    found = result(losses)["finding"]
    assert found["verdict"] == verdict and said in found["text"] and f": {verdict}." in found["text"], found


def test_ranking_table_and_plot(tmp_path: Path) -> None:
    found = result({FOUR: [2.6, 2.8], LAST: [2.1, None], ENDS: [2.5, 2.7], FIRST: [None, None]})
    assert [one["layers"] for one in found["candidates"]] == [[0, 29], [0, 1, 28, 29], [28, 29], [0, 1]]
    assert [one["rank"] for one in found["candidates"]] == [1, 2, 3, None], "who failed with a seed comes after"
    first = found["candidates"][0]
    assert first["loss_nats"]["aligned"]["ja"] == {"mean": pytest.approx(2.6), "low": 2.5, "high": 2.7}
    assert first["change_nats"] == {"ja": pytest.approx(-0.4), "en": pytest.approx(0.0)}
    lines = describe(found)
    assert lines[1].startswith("1") and "147,456 + 16,384  1.00x" in lines[1]
    assert "2.6000 (2.5000 to 2.7000)" in lines[1] and lines[1].endswith("+0.0000")
    assert lines[5].startswith("-  alignment alone") and "0 + 16,384" in lines[5]
    assert lines[6].startswith("-  base") and "3.0000" in lines[6]
    assert any(line == "layers 28, 29, seed 2, failed: not finite" for line in lines)
    assert any("-0.1000 nats/token from alignment alone, which the seeds do not tell apart" in line for line in lines)
    assert lines[-1] == found["finding"]["text"]
    assert draw(found, tmp_path / "search.png") and (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failure_of_the_base_model_ends_the_search(
    tree: Tree, write_config: Callable[..., Path], elo: Elo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise FailedError("broken")

    monkeypatch.setattr(search, "score_base", broken)
    assert elo("search", write_config(tree), "--layers", "0", "--out", tmp_path / "found")[0] == 1
