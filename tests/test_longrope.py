"""longrope: the tables that a document takes, against transformers' own computation of them, and what names it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import CASES, LONGROPE, SHAPE
from planner_cases import case, measured_peak, only_what_is_made_here
from test_families_plan import spec_of
from test_planner import MOST

from elo_engine.measure.planner import predict_memory
from elo_engine.model.layers import Packing, RopeTable
from elo_engine.model.spec import RopeSpec, read_spec

CPU = torch.device("cpu")
SHORT = 32  # original_max_position_embeddings
LENGTHS = (33, 32, 1, 50, 7)


def config_of(**changes: Any) -> Any:
    from transformers import AutoConfig

    family, fields = CASES["phi3, longrope"]
    return AutoConfig.for_model(family, **{**SHAPE, **fields, **changes})


def packing(lengths: tuple[int, ...] = LENGTHS) -> Packing:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Packing(starts, torch.cat([torch.arange(length) for length in lengths]))


def test_each_document_takes_the_tables_of_its_own_length() -> None:
    """As transformers computes them for the document by itself, also where the table grew by way of shorter ones."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = config_of()
    table = RopeTable(read_spec(config.to_dict()), CPU)
    for lengths in ((3, 8), (SHORT,), LENGTHS, (60,), LENGTHS):
        packed = packing(lengths)
        (rope,) = table.gather(packed, max(lengths))
        for tables_NR, which in ((rope.cos_NR, 0), (rope.sin_NR, 1)):
            for found, length in zip(tables_NR.split(lengths), lengths, strict=True):
                theirs = Phi3RotaryEmbedding(config)
                wanted = theirs(torch.zeros(1), torch.arange(length)[None])[which][0, :, : found.shape[1]]
                torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-6)


def test_the_comparison_would_see_the_other_factors() -> None:
    table = RopeTable(read_spec(config_of().to_dict()), CPU)
    (short,), (long,) = (table.gather(packing((length,)), length) for length in (SHORT, SHORT + 1))
    assert float((short.cos_NR - long.cos_NR[:SHORT]).abs().max()) > 0.1


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"factor": 4.0}, None), ({"attention_factor": 1.7}, 1.7)])
def test_factor_on_cosine_and_sine(given: dict[str, float], expected: float | None) -> None:
    import math

    config = config_of().to_dict()
    spec = read_spec(config | {"rope_parameters": None, "rope_scaling": LONGROPE | given})
    (rope,) = RopeTable(spec, CPU).gather(packing((1,)), 1)
    grown = given.get("factor", 256 / SHORT)
    wanted = expected or math.sqrt(1 + math.log(grown) / math.log(SHORT))
    assert float(rope.cos_NR[0, 0]) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_older_files_have_other_names_for_it(name: str) -> None:
    old = config_of().to_dict() | {"rope_parameters": None, "rope_scaling": LONGROPE | {"type": name}}
    assert read_spec(old).ropes == read_spec(config_of().to_dict()).ropes
    assert read_spec(old).rope.kind == "longrope"


def test_memory_of_its_tables_is_planned() -> None:
    from dataclasses import replace

    rope = RopeSpec(1e4, "longrope", {"original_max_position_embeddings": 200} | {
        name: [1.0] * 8 for name in ("short_factor", "long_factor")
    })  # fmt: skip
    with only_what_is_made_here():
        setting = case("elo_pretrain", replace(spec_of("phi3"), ropes=(rope,)), 256, 1)
        assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST
