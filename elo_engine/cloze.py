"""Cloze questions made from held-out text: which of a few continuations follows a context.

A token folder is cut into slots of context + continuation, laid end to end inside each document. A question is a slot
drawn at random; its wrong choices are the continuations of other slots, so that right and wrong ones come from one
distribution: a model that does not use the context is right as often as chance. A choice's score is the summed loss
of its tokens after the context; all choices have the same length, so nothing has to be normalised. The form is that
of multiple-choice benchmarks (HellaSwag, arXiv 1905.07830), without their filtering of choices.

Nothing here knows a model: `evaluate.cloze_store` scores the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elo_engine.data import NO_LABEL, RowBatch, TokenStore
from elo_engine.errors import UsageError

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
_DRAWS = 64  # for a wrong choice that differs from the others, before the slot is given up as a question
_SEED = 0x636C6F7A65  # beside the caller's, so that no other draw from the same seed is this one


@dataclass(frozen=True)
class ClozeShape:
    """Tokens of context, tokens of each continuation, and choices, the right one among them.

    64 tokens of context say language, register and topic, and a slot still fits a paragraph. Sixteen tokens of
    continuation are a clause: one or two would mostly ask for frequent words, and many make every question easy. With
    four choices chance is 1/4, which leaves three quarters of the scale.
    """

    context: int = 64
    continuation: int = 16
    choices: int = 4

    def __post_init__(self) -> None:
        if self.context < 1 or self.continuation < 1 or self.choices < 2:
            raise UsageError(
                f"cloze shape {self.context},{self.continuation},{self.choices}: at least 1 token of context, 1 of "
                "continuation and 2 choices are needed"
            )

    @classmethod
    def parse(cls, text: str) -> ClozeShape:
        """`64,16,4`. Raises UsageError for anything that is not three whole numbers in range."""
        try:
            context, continuation, choices = (int(part) for part in text.split(","))
        except ValueError:
            raise UsageError(
                f"cloze shape {text!r}: give context, continuation and choices as in 64,16,4 (tokens, tokens, number)"
            ) from None
        return cls(context, continuation, choices)

    @property
    def slot(self) -> int:
        """Tokens of a slot."""
        return self.context + self.continuation


@dataclass(frozen=True)
class Cloze:
    """Accuracy over the questions, with its Wilson 95 % interval, and what guessing would give."""

    accuracy: float
    low: float
    high: float
    chance: float
    right: int
    items: int
    choices: int
    context_tokens: int
    continuation_tokens: int
    seed: int


def wilson(right: int, items: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): inside [0, 1] and not empty where all or none are right."""
    share, z2 = right / items, _Z95 * _Z95
    middle = share + z2 / (2 * items)
    half = _Z95 * math.sqrt(share * (1 - share) / items + z2 / (4 * items * items))
    whole = 1 + z2 / items
    low, high = (middle - half) / whole, (middle + half) / whole
    return (low if right else 0.0), (high if right < items else 1.0)  # exact there, but for rounding


@dataclass(frozen=True)
class ClozeItems:
    """Questions as token ids: contexts [items, context] and choices [items, choices, continuation], of which the
    first is the true one.
    """

    shape: ClozeShape
    seed: int
    contexts: np.ndarray
    choices: np.ndarray

    @classmethod
    def draw(cls, store: TokenStore, items: int, shape: ClozeShape | None = None, seed: int = 0) -> ClozeItems:
        """At most `items` questions, a pure function of the store's content and the arguments; fewer where the text
        has no more slots. No two questions share a token of their contexts or of their right choices.

        Raises:
            UsageError: less than one item asked for, or text too short or too repetitive for a single question.
        """
        shape = shape or ClozeShape()
        if items < 1:
            raise UsageError(f"{items} cloze items are asked for; at least 1 is needed")
        store.check_unchanged()
        # the last token of a document is its end mark, which would tell a true continuation from the others
        ends = np.cumsum((store.lengths - 1) // shape.slot)
        total = int(ends[-1])
        if total < shape.choices:
            raise UsageError(
                f"{store.folder}: {total} places hold {shape.context} tokens of context and {shape.continuation} of "
                f"continuation inside one document, and a question of {shape.choices} choices needs {shape.choices}; "
                "give longer documents, or a shorter shape such as --cloze-shape 16,8,4"
            )
        rng = np.random.default_rng([_SEED, seed])

        def tokens(slot: int) -> np.ndarray:
            document = int(np.searchsorted(ends, slot, side="right"))
            begin = (slot - (int(ends[document - 1]) if document else 0)) * shape.slot
            return store.document(document)[begin : begin + shape.slot].astype(np.int64)

        contexts, choices = [], []
        for slot in np.sort(rng.choice(total, min(items, total), replace=False)).tolist():
            found = [tokens(slot)[shape.context :]]
            for other in rng.integers(0, total, _DRAWS * shape.choices).tolist():
                offered = tokens(other)[shape.context :]
                if not any(np.array_equal(offered, known) for known in found):
                    found.append(offered)
                if len(found) == shape.choices:
                    contexts.append(tokens(slot)[: shape.context])
                    choices.append(np.stack(found))
                    break
        if not contexts:
            raise UsageError(
                f"{store.folder}: its text repeats itself so much that no question with {shape.choices} different "
                "choices was found; give other text, or fewer choices"
            )
        return cls(shape, seed, np.stack(contexts), np.stack(choices))

    @property
    def rows(self) -> int:
        """Rows of all questions: one a choice."""
        return int(self.choices.shape[0] * self.choices.shape[1])

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: a slot without its last token, which predicts nothing."""
        return self.shape.slot - 1

    def batches(self, batch_rows: int) -> Iterator[RowBatch]:
        """Every choice after its context as a document of its own, choice by choice and question by question; labels
        are on the continuation alone.
        """
        shape, T = self.shape, self.row_tokens
        for first in range(0, self.rows, batch_rows):
            places = np.arange(first, min(self.rows, first + batch_rows))
            item, choice = places // shape.choices, places % shape.choices
            whole = np.concatenate((self.contexts[item], self.choices[item, choice]), axis=1)
            labels_BT = whole[:, 1:].copy()
            labels_BT[:, : shape.context - 1] = NO_LABEL
            B = len(places)
            positions_BT = np.tile(np.arange(T), (B, 1))
            yield RowBatch(whole[:, :-1].copy(), labels_BT, positions_BT, np.arange(B + 1) * T, ("",) * B)

    def judge(self, losses: np.ndarray) -> Cloze:
        """losses: nats of every row, summed over its continuation, in the order of `batches`. Right is a true choice
        below all others; a tie is wrong, or a model that finds everything equal would be right whenever the true one
        comes first.
        """
        nats = np.asarray(losses, dtype=np.float64).reshape(len(self.contexts), self.shape.choices)
        right, items = int((nats[:, :1] < nats[:, 1:]).all(axis=1).sum()), len(nats)
        low, high = wilson(right, items)
        shape = self.shape
        return Cloze(
            right / items, low, high, 1 / shape.choices, right, items, shape.choices, shape.context,
            shape.continuation, self.seed,
        )  # fmt: skip
