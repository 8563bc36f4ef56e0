"""The mixture is a pure function of the row, exact in its ratio, and its rows never leak between
documents.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixture import make_store_folder

from elo_engine.data.mixture import NO_LABEL, Mixture, RowBatch, sequential_rows
from elo_engine.data.rows import cut_rows
from elo_engine.data.store import TokenStore
from elo_engine.errors import FailedError, RefusedError, UsageError

MakeStore = Callable[..., TokenStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    def make(name: str, documents: list[list[int]], **options: object) -> TokenStore:
        return TokenStore(make_store_folder(tmp_path / name, documents, **options))

    return make


def random_documents(seed: int, count: int, longest: int = 40, low: int = 1, high: int = 300) -> list[list[int]]:
    """Documents of 1 .. `longest` tokens that end with id 0 and have it nowhere else."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest, count)
    return [[*random.integers(low, high, length).tolist(), 0] for length in lengths]


def numbered_documents(lengths: list[int]) -> list[list[int]]:
    """Documents in which every token of the whole store is another id."""
    ids = iter(range(1, sum(lengths) + 1))
    return [[next(ids) for _ in range(length)] for length in lengths]


def same(left: RowBatch, right: RowBatch) -> bool:
    arrays = ("ids_BT", "labels_BT", "positions_BT", "segment_starts")
    return left.languages == right.languages and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays
    )


def two_languages(make_store: MakeStore) -> dict[str, TokenStore]:
    return {
        "ja": make_store("ja", random_documents(1, 400, low=1, high=150), shard_documents=90),
        "en": make_store("en", random_documents(2, 150, low=150, high=300), shard_documents=40),
    }


def plain_cut(
    documents: list[list[int]], order: list[int], begin: int, rows: int, length: int, packing: str
) -> tuple[list[int], list[int], list[int], list[int]]:
    """What `cut_rows` must give, token by token: ids, labels, positions, segment starts."""
    stream = [(token, number) for number in order for token in documents[number]]
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    for at in range(begin, begin + rows * length):
        column = (at - begin) % length
        token, owner = stream[at] if at < len(stream) else (0, -1)
        before = stream[at - 1][1] if 0 < at <= len(stream) else -1
        new = column == 0 or (owner != before and (packing == "document" or owner == -1))
        # The same document may not follow itself: `order` is a permutation, so neighbours in it differ.
        after = stream[at + 1] if at + 1 < len(stream) else (0, -1)
        crosses = after[1] != owner
        known = at + 1 < len(stream) and (packing == "concat" or not crosses)
        ids.append(token)
        labels.append(after[0] if known else NO_LABEL)
        positions.append(0 if new else positions[-1] + 1)
        starts.append(int(new))
    return ids, labels, positions, starts


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_cut_rows_equals_the_token_by_token_definition(
    tmp_path_factory: pytest.TempPathFactory, make_store: MakeStore, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    documents = numbered_documents(lengths)
    total = sum(lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    length = data.draw(st.integers(1, 8))
    begin = data.draw(st.integers(0, total - 1))
    rows = data.draw(st.integers(1, -(-(total - begin) // length)))
    packing = data.draw(st.sampled_from(["document", "concat"]))
    name = tmp_path_factory.mktemp("cut").name
    store = make_store(name, documents, shard_documents=data.draw(st.integers(1, 5)))
    ends = np.cumsum(store.lengths[np.array(order)])
    got = cut_rows(store, np.array(order), ends, begin, rows, length, packing)
    expected = plain_cut(documents, list(order), begin, rows, length, packing)
    for array, values in zip(got, expected, strict=True):
        assert array.shape == (rows, length)
        assert array.ravel().astype(int).tolist() == values


@pytest.mark.parametrize("packing", ["document", "concat"])
def test_random_access_equals_sequential_access(make_store: MakeStore, packing: str) -> None:
    mixture = Mixture(two_languages(make_store), {"ja": 9, "en": 1}, 16, seed=42, packing=packing)
    rows = 2 * 10 * max(mixture.rows_per_epoch.values()) // 9 + 7
    whole = mixture.rows(0, rows)
    order = np.random.default_rng(0).permutation(rows)
    for row in order[:200].tolist():
        one = mixture.rows(row, 1)
        assert one.languages == (whole.languages[row],)
        for name in ("ids_BT", "labels_BT", "positions_BT"):
            assert np.array_equal(getattr(one, name)[0], getattr(whole, name)[row]), (row, name)
    for first, count in ((0, 3), (5, 31), (11, 10), (rows - 9, 9)):
        part = mixture.rows(first, count)
        assert np.array_equal(part.ids_BT, whole.ids_BT[first : first + count])
        begin, end = first * 16, (first + count) * 16
        inside = whole.segment_starts[(whole.segment_starts >= begin) & (whole.segment_starts <= end)]
        assert np.array_equal(part.segment_starts, inside - begin)


def test_two_fresh_objects_agree_and_the_batch_of_a_step_is_its_rows(make_store: MakeStore) -> None:
    stores = two_languages(make_store)
    reopened = {name: TokenStore(store.folder) for name, store in reversed(stores.items())}
    first = Mixture(stores, {"ja": 9, "en": 1}, 16, seed=7)
    second = Mixture(reopened, {"en": 0.1, "ja": 0.9}, 16, seed=7)
    first.rows(900, 40)  # what was asked before must not matter
    assert same(first.rows(3, 50), second.rows(3, 50))
    assert same(first.batch(5, 6), second.rows(30, 6))


def test_another_seed_gives_other_rows_and_another_block_order(make_store: MakeStore) -> None:
    stores = two_languages(make_store)
    one, other = (Mixture(stores, {"ja": 9, "en": 1}, 16, seed=seed).rows(0, 100) for seed in (1, 2))
    assert one.languages != other.languages
    assert not np.array_equal(one.ids_BT, other.ids_BT)
    assert np.mean([np.array_equal(a, b) for a, b in zip(one.ids_BT, other.ids_BT, strict=True)]) < 0.1


def test_known_rows_do_not_drift_between_versions(make_store: MakeStore) -> None:
    """A run resumed by a later version must see the data that the earlier one would have seen."""
    stores = {
        "ja": make_store("ja", numbered_documents([7, 5, 9, 4])),
        "en": make_store("en", numbered_documents([6, 6])),
    }
    got = Mixture(stores, {"ja": 2, "en": 1}, 4, seed=42).rows(0, 6)
    assert got.languages == ("ja", "en", "ja", "ja", "en", "ja")
    assert got.ids_BT.tolist() == [
        [8, 9, 10, 11],
        [7, 8, 9, 10],
        [12, 22, 23, 24],
        [25, 1, 2, 3],
        [11, 12, 1, 2],
        [4, 5, 6, 7],
    ]


@pytest.mark.parametrize(("weights", "share"), [((9, 1), (9, 1)), ((0.75, 0.25), (3, 1)), ((4, 6), (2, 3))])
def test_every_block_has_the_exact_ratio(
    make_store: MakeStore, weights: tuple[float, float], share: tuple[int, int]
) -> None:
    mixture = Mixture(two_languages(make_store), dict(zip(("ja", "en"), weights, strict=True)), 16, seed=3)
    block = sum(share)
    assert mixture.block_rows == block
    languages = mixture.rows(0, 60 * block).languages
    blocks = [languages[at : at + block] for at in range(0, len(languages), block)]
    assert all(Counter(part) == {"ja": share[0], "en": share[1]} for part in blocks)
    assert len(set(blocks)) > 1, "the order within a block is to be shuffled anew"


def test_the_ids_of_a_row_come_from_its_language(make_store: MakeStore) -> None:
    batch = Mixture(two_languages(make_store), {"ja": 9, "en": 1}, 16, seed=3).rows(0, 200)
    for ids, language in zip(batch.ids_BT, batch.languages, strict=True):
        text = ids[ids > 0]
        assert (text < 150).all() if language == "ja" else (text >= 150).all()


def test_a_language_has_the_same_rows_in_every_mix(make_store: MakeStore) -> None:
    stores = two_languages(make_store)
    mixed = Mixture(stores, {"ja": 2, "en": 1}, 16, seed=3).rows(0, 300)
    alone = Mixture({"ja": stores["ja"]}, {"ja": 1}, 16, seed=3).rows(0, 200)
    chosen = np.array([language == "ja" for language in mixed.languages])
    assert np.array_equal(mixed.ids_BT[chosen], alone.ids_BT)


def test_each_epoch_uses_the_tokens_of_its_rows_once_and_another_order(make_store: MakeStore) -> None:
    lengths = np.random.default_rng(4).integers(1, 30, 120).tolist()
    store = make_store("ja", numbered_documents(lengths), vocab_size=sum(lengths) + 1, shard_documents=17)
    mixture = Mixture({"ja": store}, {"ja": 1}, 16, seed=5)
    rows = mixture.rows_per_epoch["ja"]
    assert rows == sum(lengths) // 16
    epochs = [mixture.rows(epoch * rows, rows).ids_BT.ravel() for epoch in range(4)]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left_out = []
    for ids in epochs:
        counts = np.bincount(ids, minlength=sum(lengths) + 1)[1:]
        assert counts.max() == 1, "a token was used twice in an epoch"
        missing = np.flatnonzero(counts == 0)
        assert len(missing) == sum(lengths) % 16
        left_out.append(set(owner[missing].tolist()))
        # Whole documents in order: the ids of a document rise by one from token to token.
        same_document = owner[ids[1:] - 1] == owner[ids[:-1] - 1]
        assert (np.diff(ids)[same_document] == 1).all()
    assert not any(np.array_equal(epochs[0], other) for other in epochs[1:])
    assert len(set(map(frozenset, left_out))) > 1, "the same documents are left out of every epoch"


def test_labels_never_cross_documents_and_positions_restart(make_store: MakeStore) -> None:
    """Documents end with id 0 and have it nowhere else, which shows every boundary in the ids themselves."""
    mixture = Mixture(two_languages(make_store), {"ja": 9, "en": 1}, 16, seed=8)
    batch = mixture.rows(0, 300)
    ids, labels, positions = batch.ids_BT, batch.labels_BT, batch.positions_BT
    assert ids.dtype == labels.dtype == positions.dtype == batch.segment_starts.dtype == np.int64
    assert (labels[ids == 0] == NO_LABEL).all()
    assert (labels[ids != 0] != NO_LABEL).all()
    inside = ids[:, :-1] != 0
    assert np.array_equal(labels[:, :-1][inside], ids[:, 1:][inside])
    assert (positions[:, 0] == 0).all()
    assert np.array_equal(positions[:, 1:], np.where(inside, positions[:, :-1] + 1, 0))
    assert np.array_equal(batch.segment_starts, [*np.flatnonzero(positions.ravel() == 0), ids.size])
    assert batch.tokens_loss == (ids != 0).sum()


def test_the_last_label_of_a_row_is_the_next_token_of_its_document(make_store: MakeStore) -> None:
    store = make_store("ja", numbered_documents([40]))
    batch = Mixture({"ja": store}, {"ja": 1}, 8, seed=0).rows(0, 5)
    assert batch.labels_BT[:, -1].tolist() == [9, 17, 25, 33, NO_LABEL]


def test_concat_labels_run_on_and_a_row_is_one_segment(make_store: MakeStore) -> None:
    stores = {"ja": make_store("ja", random_documents(1, 100))}
    joined = Mixture(stores, {"ja": 1}, 16, seed=8, packing="concat")
    apart = Mixture(stores, {"ja": 1}, 16, seed=8)
    rows = joined.rows_per_epoch["ja"]
    batch = joined.rows(0, rows)
    assert np.array_equal(batch.ids_BT, apart.rows(0, rows).ids_BT)
    flat_ids, flat_labels = batch.ids_BT.ravel(), batch.labels_BT.ravel()
    assert np.array_equal(flat_labels[:-1], flat_ids[1:])
    assert np.array_equal(batch.segment_starts, np.arange(rows + 1) * 16)
    assert (batch.positions_BT == np.arange(16)).all()


def test_changing_one_document_leaves_all_others_alone(make_store: MakeStore) -> None:
    documents = random_documents(3, 80)
    changed = [list(ids) for ids in documents]
    longest = max(range(80), key=lambda number: len(documents[number]))
    changed[longest] = [310 for _ in documents[longest]]
    before, after = (
        Mixture({"ja": make_store(name, content)}, {"ja": 1}, 16, seed=6)
        for name, content in (("before", documents), ("after", changed))
    )
    rows = before.rows_per_epoch["ja"]
    left, right = before.rows(0, rows), after.rows(0, rows)
    assert np.array_equal(left.segment_starts, right.segment_starts)
    assert np.array_equal(left.positions_BT, right.positions_BT)
    touched = 0
    flat = [batch_array.ravel() for b in (left, right) for batch_array in (b.ids_BT, b.labels_BT)]
    for begin, end in zip(left.segment_starts[:-1], left.segment_starts[1:], strict=True):
        left_ids, left_labels, right_ids, right_labels = (array[begin:end] for array in flat)
        if (right_ids == 310).any():
            assert (right_ids == 310).all()
            touched += 1
        else:
            assert np.array_equal(left_ids, right_ids)
            assert np.array_equal(left_labels, right_labels)
    assert touched > 0


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_sequential_rows_cover_everything_once(make_store: MakeStore, batch_rows: int) -> None:
    lengths = np.random.default_rng(9).integers(1, 30, 50).tolist()
    store = make_store("en", numbered_documents(lengths), vocab_size=2000, shard_documents=7)
    batches = list(sequential_rows(store, 16, batch_rows, language="en"))
    assert all(len(batch.ids_BT) == batch_rows for batch in batches[:-1])
    ids = np.concatenate([batch.ids_BT.ravel() for batch in batches])
    labels = np.concatenate([batch.labels_BT.ravel() for batch in batches])
    total = sum(lengths)
    assert len(ids) == -(-total // 16) * 16
    assert ids[:total].tolist() == list(range(1, total + 1))
    firsts = set((np.cumsum([0, *lengths[:-1]]) + 1).tolist())
    used = labels[labels != NO_LABEL].tolist()
    assert sorted(used) == sorted(set(range(1, total + 1)) - firsts)
    assert (labels[total:] == NO_LABEL).all() and (ids[total:] == 0).all()
    last = batches[-1]
    padding = len(ids) - total
    assert padding > 0
    assert last.segment_starts[-2:].tolist() == [last.ids_BT.size - padding, last.ids_BT.size]
    assert last.positions_BT.ravel()[-padding:].tolist() == list(range(padding))
    assert last.languages == ("en",) * len(last.ids_BT)


def test_sequential_rows_pad_a_store_shorter_than_a_row(make_store: MakeStore) -> None:
    (batch,) = sequential_rows(make_store("en", [[5, 6, 7]]), 8, 4)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch.labels_BT.tolist() == [[6, 7] + [NO_LABEL] * 6]
    assert batch.segment_starts.tolist() == [0, 3, 8]


def test_a_store_shorter_than_one_row_is_a_usage_error(make_store: MakeStore) -> None:
    store = make_store("ja", [[1] * 7])
    with pytest.raises(UsageError, match=r"ja: 7 tokens .* fewer than one row of 8"):
        Mixture({"ja": store}, {"ja": 1}, 8, seed=0)


def test_weights_and_stores_must_name_the_same_languages(make_store: MakeStore) -> None:
    stores = two_languages(make_store)
    with pytest.raises(UsageError, match=r"data\.mix names 'de', which has no token folder"):
        Mixture(stores, {"ja": 8, "en": 1, "de": 1}, 16, seed=0)
    with pytest.raises(UsageError, match=r"data\.shards names 'en', which has no weight"):
        Mixture(stores, {"ja": 9}, 16, seed=0)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "9", 0.123456789, 123_457])
def test_weights_that_cannot_be_exact_are_usage_errors(make_store: MakeStore, weight: object) -> None:
    with pytest.raises(UsageError, match=r"data\.mix"):
        Mixture(two_languages(make_store), {"ja": weight, "en": 1}, 16, seed=0)  # type: ignore[dict-item]


def test_arguments_out_of_range_are_usage_errors(make_store: MakeStore) -> None:
    stores, weights = two_languages(make_store), {"ja": 9, "en": 1}
    with pytest.raises(UsageError, match="packing is 'documents'"):
        Mixture(stores, weights, 16, seed=0, packing="documents")
    with pytest.raises(UsageError, match="sequence_length is 0"):
        Mixture(stores, weights, 0, seed=0)
    mixture = Mixture(stores, weights, 16, seed=0)
    for first, count in ((-1, 4), (0, 0)):
        with pytest.raises(UsageError, match="first row"):
            mixture.rows(first, count)
    with pytest.raises(UsageError, match="batch_rows is 0"):
        next(sequential_rows(stores["ja"], 16, 0))


def test_folders_of_different_tokenizers_are_refused(make_store: MakeStore) -> None:
    stores = {
        "ja": make_store("ja", random_documents(1, 20)),
        "en": make_store("en", random_documents(2, 20), tokenizer_sha256="f" * 64),
    }
    with pytest.raises(RefusedError, match="different tokenizers"):
        Mixture(stores, {"ja": 1, "en": 1}, 16, seed=0)


def test_a_shard_truncated_under_the_mapping_is_an_error_and_no_crash(make_store: MakeStore) -> None:
    store = make_store("ja", random_documents(1, 5000))
    mixture = Mixture({"ja": store}, {"ja": 1}, 16, seed=0)
    mixture.rows(0, 4)
    with (store.folder / "tokens-00000.bin").open("r+b") as file:
        file.truncate(0)
    with pytest.raises(FailedError, match=r"tokens-00000\.bin: changed while in use"):
        mixture.rows(4, 4)
    with pytest.raises(FailedError, match="changed while in use"):
        next(sequential_rows(store, 16, 4))


def test_rows_cost_well_under_a_millisecond_each(make_store: MakeStore) -> None:
    """1 ms a row of 512 tokens is the promise; the best of some batches keeps a busy machine out of the
    number.
    """
    stores = {
        "ja": make_store("ja", random_documents(1, 4000, longest=600), shard_documents=900),
        "en": make_store("en", random_documents(2, 4000, longest=60), shard_documents=900),
    }
    mixture = Mixture(stores, {"ja": 9, "en": 1}, 512, seed=0)
    mixture.rows(0, 64)  # plans the epoch
    seconds = []
    for step in range(8):
        begin = time.perf_counter()
        mixture.batch(step, 64)
        seconds.append((time.perf_counter() - begin) / 64)
    assert min(seconds) < 0.3e-3
