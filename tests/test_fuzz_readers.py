"""Every reader of foreign bytes: whatever a file holds, it is read or refused with a typed error, and soon.

FUZZ_EXAMPLES=20000 takes that many inputs a reader (`make fuzz-readers`); an ordinary run takes a few hundred.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from family_cases import LLAMA3, SHAPE
from fuzz_fixture import mutated
from fuzz_readers import READERS, Case
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizer_fixture import make_tokenizer

from elo_engine.config import load_config
from elo_engine.data import build_tokens
from elo_engine.errors import RefusedError, UsageError
from elo_engine.model.spec import read_spec

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))
SOON_S = 20  # an input takes milliseconds; a reader that hangs is seen here


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(case: Case, examples: int, *, seed: int | None = None) -> dict[bool, int]:
    """How many inputs were accepted and refused. Every mutation follows from a number, which a failure names."""
    found = {True: 0, False: 0}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=seed is not None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**48))
    def run(number: int) -> None:
        with at_most(SOON_S):
            accepted = case.one(random.Random(number))
        found[accepted] += 1
        event("accepted" if accepted else "refused")

    run()
    return found


@pytest.mark.parametrize("name", READERS)
def test_only_typed_errors(name: str, tmp_path: Path) -> None:
    found = fuzz(READERS[name](tmp_path / "files"), EXAMPLES)
    print(f"{name}: {found[True]} read, {found[False]} refused")
    assert found[False] >= EXAMPLES // 10, "hardly any input was mutated"
    assert found[True] >= EXAMPLES // 1000, "no input gets through, so little of the reader is reached"


class Weak(READERS["snapshot"]):  # type: ignore[misc, valid-type]
    """The reader of state.json as one would write it first."""

    def read(self, chance: random.Random) -> None:
        (self.snapshot / "state.json").write_bytes(mutated(json.loads(self.valid["state.json"]), chance))
        state = json.loads((self.snapshot / "state.json").read_text(encoding="utf-8"))
        assert state["progress"]["step"] >= 0


class Slow(READERS["header"]):  # type: ignore[misc, valid-type]
    """A reader that waits for ever for some input."""

    def read(self, chance: random.Random) -> None:
        while chance.random() < 1:
            pass


def test_a_weak_reader_is_seen(tmp_path: Path) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, RecursionError, AssertionError, ExceptionGroup)):
        fuzz(Weak(tmp_path / "files"), 250, seed=0)


def test_a_reader_that_hangs_is_seen(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="hangs"), at_most(1):
        Slow(tmp_path / "files").one(random.Random(0))


FOUND = {  # what the first runs found, each as the shortest input that shows it
    "a key twice": ("model: a\nmodel: b\n", "line 2: the key 'model' is given twice"),
    "a date that is none": ("seed: 2001-99-99\n", "does not fit its tag or its form"),
    "a tag without its value": ("seed: !!bool x\n", "does not fit its tag or its form"),
    "base 16 without a digit": ("seed: 0x_\n", "does not fit its tag or its form"),
    "nested deeply": ("seed: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
    "a list within itself": ("seed: &a [*a]\n", "nested too deeply"),
    "anchors that multiply": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "too large, with what its anchors repeat",
    ),
    "an integer of thousands of digits": ("seed: 0x" + "f" * 6000, "24000 bits"),
    "no text": ('model: "\\ud800"\n', "that is no text"),
    "infinite": (
        "model: m\noutput: o\ndata: {shards: {a: x}}\ndetach: {ridge: .inf}\n", "ridge: Input should be a finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_configurations_that_came_through(name: str, tmp_path: Path) -> None:
    text, message = FOUND[name]
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_position_embeddings": [1]}, "max_position_embeddings is [1]; a int is needed"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, more than any model has"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false is needed"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; a positive number is needed"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor 4 of the rotary scaling is not below"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a small number is needed"),
    ],
)
def test_model_configurations_that_came_through(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(message)):
        read_spec({**SHAPE, "model_type": "llama", **change})


def test_a_place_to_go_on_from_that_was_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    """progress.json of `elo data`: a damaged digit would leave out text, and nobody would know."""
    make_tokenizer(tmp_path / "tokenizer")
    source = tmp_path / "a.txt"
    source.write_text("\n\f\n".join(f"document {number} of some words" for number in range(50)))

    def build(out: Path, *, stop: bool = False) -> dict[str, bytes]:
        def report(done: int, total: int) -> None:
            if stop:
                raise KeyboardInterrupt

        build_tokens([source], tmp_path / "tokenizer", out, shard_tokens=100, progress=report)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    wanted = build(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", stop=True)
    path = tmp_path / ".out.partial" / "progress.json"
    body = json.loads(path.read_text())
    assert body["offset"] < source.stat().st_size
    path.write_text(json.dumps(body | {"offset": source.stat().st_size}))
    assert build(tmp_path / "out") == wanted
