"""`elo bench traffic`: what streaming a whole model's layers moves over the link in one optimizer step, and the least
time of a step on named cards, beside ZeRO-Offload and streaming per micro-batch. Computed from shapes and published
rates (`measure/traffic.py`): nothing is run and nothing is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isinf

from elo_engine.benchmarks.models import open_model
from elo_engine.benchmarks.tables import number
from elo_engine.errors import UsageError
from elo_engine.measure.cards import Card, find_card
from elo_engine.measure.expected import PEAK_SHARE
from elo_engine.measure.traffic import LINK_SHARE, LINKS, Traffic, fits, ways_of
from elo_engine.report import markdown_table

LONGEST_ROW = 8192  # tokens of a document, where a micro-batch has more


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `link` None: each card's own."""

    model: str
    gpus: tuple[str, ...]
    tokens_per_step: int = 65536
    micro_batch_tokens: int = 8192
    link: str | None = None


def traffic_text(options: Options) -> list[str]:
    """Markdown blocks: the assumptions, then a table for each card.

    Raises:
        UsageError: an unknown model, card or link, or micro-batches larger than the step.
    """
    cards = [find_card(gpu) for gpu in options.gpus]
    if options.link is not None and options.link not in LINKS:
        raise UsageError(f"--link {options.link!r}: it is one of {', '.join(LINKS)}")
    if options.micro_batch_tokens > options.tokens_per_step:
        raise UsageError(
            f"--micro-batch-tokens {options.micro_batch_tokens}: a step has {options.tokens_per_step} tokens "
            "(--tokens-per-step)"
        )
    model = open_model(options.model)
    T = min(LONGEST_ROW, options.micro_batch_tokens)
    ways = ways_of(model.spec, T, options.tokens_per_step, options.micro_batch_tokens)
    count = ceil(options.tokens_per_step / options.micro_batch_tokens)
    blocks = [
        f"Computed, not measured: {model.name}, bf16, {options.tokens_per_step} tokens a step in {count} "
        f"micro-batches, documents of {T}. Seconds are the least that a step takes: in every phase the longest of "
        "computing, copies down and copies up. Computing at the card's published peak, and at "
        f"{PEAK_SHARE:g} of it, which plans assume; "
        f"copies at {LINK_SHARE:g} of the link's standard rate, an assumption. AdamW's time is in none of them: "
        "ZeRO-Offload and streaming per micro-batch run it on the host, so their bounds are too good by that. Layers "
        "run again in the backward pass in all of them."
    ]
    return blocks + [_table(card, options.link, ways) for card in cards]


def _table(card: Card, link: str | None, ways: list[Traffic]) -> str:
    own = next((name for name, rate in LINKS.items() if rate == card.link_bytes_per_s), "its own link")
    rate = LINK_SHARE * (LINKS[link] if link else card.link_bytes_per_s)
    shares = (1.0, PEAK_SHARE)
    rows = []
    for way in ways:
        seconds = [way.seconds(share * card.flop_per_s, rate) for share in shares]
        least = [ways[0].seconds(share * card.flop_per_s, rate) for share in shares]
        hidden = way.hidden_from(card.flop_per_s, rate)
        rows.append([
            way.way, _gb(way.down), _gb(way.up),
            *(f"{number(s)} ({number(way.tokens / s)})" for s in seconds),
            *(f"{s / ours:.2f}x" for s, ours in zip(seconds, least, strict=True)),
            "never" if isinf(hidden) else f"{number(hidden)}",
            _gb(way.device_bytes) + ("" if fits(way, card) else ": does not fit"),
        ])  # fmt: skip
    header = [
        f"{card.name}, {card.memory_gb} GB, {link or own}", "GB down a step", "GB up a step",
        "s a step (tokens/s), at peak", f"at {PEAK_SHARE:g} of it",
        "time over lazy's, at peak", f"at {PEAK_SHARE:g} of it",
        "tokens a layer's visit that hide the link, at peak", "GB of weights on the card, at least",
    ]  # fmt: skip
    return markdown_table(header, rows)


def _gb(count: float) -> str:
    return number(count / 1e9)
