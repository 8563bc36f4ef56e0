"""Layer-major evaluation: losses equal to the last bit, live weights, memory, and what happens when reading fails."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from planner_cases import only_what_is_made_here

from elo_engine import evaluate
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, ranges, rewrite_checkpoint
from elo_engine.checkpoint.hub import resolve_model
from elo_engine.config import AlignConfig, OptimizerConfig, StageConfig
from elo_engine.corpora import Heldout
from elo_engine.data import Mixture, TokenStore, sequential_rows
from elo_engine.errors import FailedError
from elo_engine.evaluate import Stopped, choose_engine, evaluate_all, evaluate_folder
from elo_engine.measure.setting import Streaming
from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.model import names
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.stream import scoring
from elo_engine.stream.engine import StreamedEngine, open_streamed
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import (
    LayerMajorScorer,
    batch_bytes,
    checkpoint_scorer,
    layer_elements,
    store_scorer,
    whole_bytes,
    whole_model_scorer,
    why_not,
)
from elo_engine.train.loop import Hooks, Progress, to_batch, train
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

from .hub_server import HubServer

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def opened(folder: Path) -> tuple[CheckpointIndex, ModelSpec]:
    index = open_checkpoint(folder)
    return index, read_spec(index.config)


def resident(folder: Path, dtype: torch.dtype) -> Decoder:
    return load_full(*opened(folder), device=CPU, dtype=dtype, train=False)[0]


def streamed(folder: Path, dtype: torch.dtype) -> LayerMajorScorer:
    return checkpoint_scorer(*opened(folder), device=CPU, dtype=dtype)


def some_batches(shards: dict[str, str], count: int = 4) -> list[Batch]:
    rows = sequential_rows(TokenStore(Path(shards["en-heldout"])), 16, 2)
    return [to_batch(part, CPU) for part in islice(rows, count)]


def losses(scorer: LayerMajorScorer | Decoder, batches: list[Batch]) -> torch.Tensor:
    if isinstance(scorer, Decoder):
        return torch.cat([scorer.token_losses(batch) for batch in batches])
    return torch.cat(scorer.losses_of(batches, lambda share: None))


@pytest.fixture
def mixture(shards: dict[str, str]) -> Mixture:
    return Mixture({name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}, {"ja": 9.0, "en": 1.0},
                   32, 42)  # fmt: skip


@pytest.fixture
def heldout(shards: dict[str, str]) -> Heldout:
    return Heldout({name: TokenStore(Path(shards[f"{name}-heldout"])) for name in ("ja", "en")}, 32)


def section(**more: Any) -> AlignConfig:
    return AlignConfig(tokens=10**6, tokens_per_step=128, micro_batch=2, optimizer=OptimizerConfig(lr=1e-2), **more)


def some_steps(engine: Any, config: StageConfig, mixture: Mixture, progress: Progress, count: int) -> None:
    steps = progress.step + count
    train(engine, mixture, config, steps=steps, sequence_length=32, progress=progress, hooks=Hooks())


# -- equal losses


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equals_the_resident_evaluation(
    name: str, dtype: torch.dtype, request: pytest.FixtureRequest, shards: dict[str, str], heldout: Heldout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, batches = request.getfixturevalue(name), some_batches(shards)
    model, scorer = resident(folder, dtype), streamed(folder, dtype)
    shares: list[float] = []
    found = torch.cat(scorer.losses_of(batches, shares.append))
    assert torch.equal(found, losses(model, batches)) and found.dtype == FP32 and float(found.sum()) > 0
    assert shares == sorted(shares) and len(shares) == 5 * 4 and shares[-1] == 1.0
    whole = evaluate_all(scorer, heldout)
    assert whole == evaluate_all(model, heldout)
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 64)
    monkeypatch.setitem(scoring.GROUP_TOKENS, "cpu", 192)  # several groups of three batches, the last one of fewer
    assert evaluate_all(scorer, heldout) == evaluate_all(model, heldout)


@pytest.mark.parametrize(
    ("on_disk", "dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP32, BF16)], ids=lambda kind: str(kind)[6:]
)
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_live_layers_score_as_the_reattached_checkpoint(
    head: str, on_disk: torch.dtype, dtype: torch.dtype, make_checkpoint: Callable[..., Path], mixture: Mixture,
    shards: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    """Also where the checkpoint's type is the narrower one, so that writing rounds."""
    folder = make_checkpoint(tied=head == "tied", shards=3, dtype=on_disk)
    index, spec = opened(folder)
    model, _ = load_shallow(index, spec, (0, 3), device=CPU, dtype=dtype)
    optimizer, batches = MasterAdamW(model, section().optimizer), some_batches(shards)
    scorer = whole_model_scorer(index, model)
    before = losses(scorer, batches)
    assert torch.equal(before, losses(resident(folder, dtype), batches))
    progress = Progress()
    for number in range(2):  # the scorer sees the weights as they are at each time
        some_steps(ResidentEngine(model, optimizer, 2), section(), mixture, progress, 1 + number)
        out = tmp_path / f"reattached{number}"
        out.mkdir()
        rewrite_checkpoint(index, optimizer.weights(), out)
        now = losses(scorer, batches)
        assert torch.equal(now, losses(resident(out, dtype), batches))
        assert not torch.equal(now, before)
        before = now


def test_outer_weights_that_are_there_and_live_layers_are_not_read(tied: Path) -> None:
    index, spec = opened(tied)
    model, _ = load_shallow(index, spec, (0, 2), device=CPU, dtype=FP32)
    weights = whole_model_scorer(index, model).weights
    assert isinstance(weights, CheckpointWeights)
    assert weights.wanted() == [names.layer_names(spec, 1), names.layer_names(spec, 3)]


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("update", ["lazy", "at_once"])
def test_a_streamed_engine_is_scored_as_it_is_and_trains_on(
    name: str, update: str, request: pytest.FixtureRequest, mixture: Mixture, shards: dict[str, str]
) -> None:
    index, spec = opened(request.getfixturevalue(name))
    batches, config = some_batches(shards), section(recompute="layer")

    def engine() -> StreamedEngine:
        made = open_streamed(spec, FP32, config, CPU, Streaming(update=update), 32)  # type: ignore[arg-type]
        made.store.load(index)
        return made

    scored, plain, progress, other = engine(), engine(), Progress(), Progress()
    scorer = store_scorer(scored)
    some_steps(scored, config, mixture, progress, 2)
    after_two = losses(scorer, batches)
    some_steps(scored, config, mixture, progress, 1)
    some_steps(plain, config, mixture, other, 3)
    for key, weight in plain.optimizer.weights().items():
        assert torch.equal(weight, scored.optimizer.weights()[key]), key
    assert not torch.equal(losses(scorer, batches), after_two)
    if update == "lazy":
        model = load_full(index, spec, device=CPU, dtype=FP32, recompute="layer")[0]
        some_steps(ResidentEngine(model, MasterAdamW(model, config.optimizer), 2), config, mixture, Progress(), 2)
        assert torch.equal(after_two, losses(model, batches))


def test_a_pass_over_a_store_may_be_left_in_its_middle(untied: Path, shards: dict[str, str]) -> None:
    index, spec = opened(untied)
    engine = open_streamed(spec, FP32, section(), CPU, Streaming(), 32)
    engine.store.load(index)
    batches, scorer = some_batches(shards), store_scorer(engine)
    with pytest.raises(Stopped):
        scorer.losses_of(batches, stop_at(0.3))
    assert torch.equal(losses(scorer, batches), losses(resident(untied, FP32), batches))
    engine.broken = "a step was left half-way"
    with pytest.raises(FailedError, match="half-way"):
        losses(scorer, batches)


def stop_at(least: float) -> Callable[[float], None]:
    def told(share: float) -> None:
        if share >= least:
            raise Stopped

    return told


# -- memory


class AtOnce(Executor):
    """Reads when it is told to begin, on this thread, whose memory is traced: the reading is then as early as the
    fastest disk would have it, so no order of the two threads holds more.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def deep(make_checkpoint: Callable[..., Path]) -> dict[int, Path]:
    """4 and 8 layers of 1.4 MB each; everything else is small beside them."""
    shape = {"hidden_size": 128, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 32}
    return {
        count: make_checkpoint(tied=True, num_hidden_layers=count, num_key_value_heads=4, **shape) for count in (4, 8)
    }


@pytest.fixture
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


def peak(work: Callable[[], Any]) -> int:
    work()  # whatever is made once
    with traced_tensor_bytes() as trace:
        work()
    return trace.peak_bytes - trace.base_bytes


@pytest.mark.usefixtures("_bounded_search")
def test_memory_is_that_of_two_layers_whatever_the_depth(deep: dict[int, Path], shards: dict[str, str]) -> None:
    batches = some_batches(shards, 2)
    found, live, whole = {}, {}, {}
    for count, folder in deep.items():
        index, spec = opened(folder)
        layer = 4 * layer_elements(spec)
        outer = 4 * spec.V * spec.D
        scorer = LayerMajorScorer(CheckpointWeights(index, spec, CPU, FP32, executor=AtOnce))
        found[count] = peak(lambda scorer=scorer: losses(scorer, batches))
        shallow, _ = load_shallow(index, spec, (0, count - 1), device=CPU, dtype=FP32)
        given = whole_model_scorer(index, shallow).weights
        assert isinstance(given, CheckpointWeights)
        given.executor = AtOnce
        scorer = LayerMajorScorer(given)
        live[count] = peak(lambda scorer=scorer: losses(scorer, batches))
        whole[count] = peak(lambda folder=folder: losses(resident(folder, FP32), batches))
    hidden = sum(4 * spec.D * len(batch.ids_N) for batch in batches)
    activations = batch_bytes(spec, max(len(batch.ids_N) for batch in batches))
    small = hidden + activations
    assert outer + small < layer
    assert found[4] == found[8] and live[4] == live[8]
    assert 2 * layer < found[8] < 2 * layer + outer + small
    assert 2 * layer < live[8] < 2 * layer + small
    assert whole[8] - whole[4] == 4 * layer  # such a difference would have been seen


@pytest.mark.usefixtures("_bounded_search")
def test_a_store_is_scored_in_the_slots_of_the_training(deep: dict[int, Path], shards: dict[str, str]) -> None:
    """What comes on top is an end of the model, and the batches: not another layer."""
    batches, found = some_batches(shards, 2), {}
    for count, folder in deep.items():
        index, spec = opened(folder)
        engine = open_streamed(spec, FP32, section(), CPU, Streaming(), 32)
        engine.store.load(index)
        scorer = store_scorer(engine)
        found[count] = peak(lambda scorer=scorer: losses(scorer, batches))
    assert found[4] == found[8] < 4 * spec.V * spec.D + 4 * layer_elements(spec) / 2


def test_the_group_follows_the_free_memory(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = streamed(tied, BF16)
    assert scorer.tokens_at_once == scoring.GROUP_TOKENS["cpu"]
    monkeypatch.setattr(scoring, "free_bytes", lambda device: 4 * 100 * 2 * 48)
    assert scorer.tokens_at_once == 100
    reason = why_not(scorer, 2048)
    assert "it takes" in reason and "are free" in reason


def test_the_engine_is_chosen_by_memory(tied: Path, heldout: Heldout, monkeypatch: pytest.MonkeyPatch) -> None:
    index, spec = opened(tied)
    assert whole_bytes(spec, FP32) == index.total_bytes
    need = int(1.1 * (whole_bytes(spec, FP32) + batch_bytes(spec, 2048)))
    found = {}
    for room in (need, need - 1):
        monkeypatch.setattr(evaluate, "free_bytes", lambda device, room=room: room)
        said: list[str] = []
        engine, why = choose_engine(spec, CPU, FP32, 32)
        found[engine] = evaluate_folder(tied, heldout, device=CPU, dtype=FP32, say=said.append)
        assert said == [f"evaluate {tied}: {engine}, {why}"] and "are free on the cpu" in why
    assert list(found) == ["resident", "streamed"] and found["resident"] == found["streamed"]


# -- what goes wrong


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def copy(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


def test_a_shard_that_shrinks_on_the_way_is_an_error_here(copy: Path, shards: dict[str, str]) -> None:
    scorer, batches = streamed(copy, FP32), some_batches(shards)
    losses(scorer, batches)  # opens what stays open: the ring
    before, last = descriptors(), sorted(copy.glob("*.safetensors"))[-1]

    def told(share: float) -> None:
        if share == 0.2:  # the first of four layers and the end is done
            os.truncate(last, last.stat().st_size // 2)

    with pytest.raises(FailedError, match=f"{last.name}.*truncated"):
        scorer.losses_of(batches, told)
    assert descriptors() == before and not any(name.startswith("elo-read") for name in threads())
    with pytest.raises(FailedError, match="truncated"):
        losses(scorer, batches)
    assert descriptors() == before


def test_an_interrupt_leaves_nothing_behind(copy: Path, shards: dict[str, str]) -> None:
    scorer, batches = streamed(copy, FP32), some_batches(shards)
    right = losses(scorer, batches)
    before = descriptors()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of the background
    try:
        with pytest.raises(KeyboardInterrupt):
            scorer.losses_of(batches, lambda share: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert descriptors() == before and not any(name.startswith("elo-read") for name in threads())
    assert torch.equal(losses(scorer, batches), right)


def test_a_missing_tensor_is_named_before_anything_is_read(tied: Path) -> None:
    index, spec = opened(tied)
    del index.entries["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(FailedError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*missing"):
        checkpoint_scorer(index, spec, device=CPU, dtype=FP32)


def test_an_evaluation_can_be_stopped_between_its_parts(tied: Path, heldout: Heldout) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(Stopped):
        evaluate_all(streamed(tied, FP32), heldout, stop)
    assert asked == 4
    asked = 3
    with pytest.raises(Stopped):
        evaluate_all(resident(tied, FP32), heldout, stop)


def test_a_hubs_checkpoint_that_is_not_all_there(
    untied: Path, heldout: Heldout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "header_bytes", 4096)
    monkeypatch.setattr(ranges.TRANSFER, "join_bytes", 0)
    with HubServer({"some/model": {path.name: path.read_bytes() for path in untied.iterdir()}}) as hub:
        hub.point_to(monkeypatch, tmp_path / "cache")
        folder = resolve_model("some/model")
        index, spec = opened(folder)
        model, _ = load_shallow(index, spec, (0, 3), device=CPU, dtype=FP32)
        scorer, fetched = whole_model_scorer(index, model), hub.sent()
        middle = index.bytes_of([*names.layer_names(spec, 1), *names.layer_names(spec, 2)])
        weights = scorer.weights
        assert isinstance(weights, CheckpointWeights)
        assert 0.9 * middle < weights.missing_bytes <= middle
        assert "of the model's other layers have not been fetched" in why_not(scorer, 2048)
        assert hub.sent() == fetched
        found = evaluate_folder(folder, heldout, device=CPU, dtype=FP32, engine="streamed", say=lambda text: None)
        assert hub.sent() >= fetched + weights.missing_bytes
        assert weights.missing_bytes == 0 and why_not(scorer, 2048) == ""
    assert found == evaluate_all(resident(untied, FP32), heldout) == evaluate_all(scorer, heldout)
