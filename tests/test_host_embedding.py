"""A frozen embedding in host memory: the same training, 2 V D bytes less on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elo_engine.config import load_config, make_config
from elo_engine.data import Mixture, TokenStore
from elo_engine.errors import UsageError
from elo_engine.levers import stage_setting
from elo_engine.measure.cards import find_card
from elo_engine.model.decoder import embedding_rows
from elo_engine.model.presets import preset_spec
from elo_engine.plan import Subject, Target, make_plan
from elo_engine.train.loop import to_batch

from .test_loop import shallow

Tree = dict[str, Any]
CPU = torch.device("cpu")
SPEC = preset_spec("llama-3.1-8b")
SAVED = 2 * SPEC.V * SPEC.D


def test_rows_that_come_with_the_batch_are_the_same_training(untied: Path, shards: dict[str, str]) -> None:
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    rows = Mixture(stores, {"ja": 9, "en": 1}, 32, 1).rows(0, 4)
    found = []
    for host in (False, True):
        model = shallow(untied)
        batch = to_batch(rows, CPU, model.embedding_VD if host else None)
        assert (batch.embedded_ND is not None) == host
        loss = model.loss_sum(batch)
        loss.backward()
        found.append([loss.detach(), *(leaf.tensor.grad for leaf in model.leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_of_a_table_on_another_device_come_to_the_ids() -> None:
    """As held-out text is scored; a meta tensor is the other device, so where they end is all that is seen."""
    with pytest.raises(NotImplementedError, match="meta"):  # ids of a device that the host must read first
        embedding_rows(torch.empty(12, dtype=torch.int64, device="meta"), torch.zeros(20, 4))
    rows_ND = embedding_rows(torch.arange(12), torch.arange(80.0).view(20, 4))
    assert torch.equal(rows_ND, torch.arange(48.0).view(12, 4))


@pytest.fixture
def config(run_tree: Tree, write_config: Callable[..., Path]) -> Path:
    run_tree["data"]["sequence_length"] = 8192
    for stage in ("pretrain", "align"):
        run_tree[stage] |= {"tokens": 2**19, "tokens_per_step": 2**18, "micro_batch": 1}
    run_tree |= {"device": "auto", "dtype": "auto"}
    run_tree["pretrain"] |= {"recompute": "layer", "optimizer": {"state": "8bit"}}
    return write_config(run_tree)


def planned(config: Path, card: str, *overrides: str) -> dict[str, Any]:
    return make_plan(load_config(config, list(overrides)), Subject.preset("llama-3.1-8b"), Target.card(find_card(card)))


def test_a_plan_for_a_card_has_the_embedding_on_the_host(config: Path) -> None:
    here, there = (
        planned(config, "rtx-4090", f"pretrain.embedding={where}")["pretrain"] for where in ("device", "host")
    )
    assert here["memory"]["components"]["weights"] - there["memory"]["components"]["weights"] == SAVED
    assert SAVED <= here["device_bytes"] - there["device_bytes"] <= 1.05 * SAVED  # and the allocator's slack on it
    assert there["host_parts"]["embedding"] == SAVED and "embedding" not in here["host_parts"]
    assert there["device_bytes"] < 6.2 * 2**30  # an 8 GB card, with room for CUDA itself


def test_a_plan_that_does_not_fit_names_the_lever(config: Path) -> None:
    advice = planned(config, "rtx-4060-ti-8gb", "pretrain.recompute=selective")["pretrain"]["advice"]
    levers = {lever["override"]: lever["saves_bytes"] for lever in advice["levers"]}
    assert SAVED <= levers["pretrain.embedding=host"] <= 1.05 * SAVED
    assert advice["fits_with"] == ["pretrain.embedding=host"]


def test_on_a_cpu_it_is_where_it_was(config: Path) -> None:
    loaded = load_config(config, ["pretrain.embedding=host"])
    assert not stage_setting(loaded, "pretrain", SPEC, "cpu", "fp32").host_embedding
    assert stage_setting(loaded, "pretrain", SPEC, "cuda", "bf16").host_embedding
    assert not stage_setting(loaded, "align", SPEC, "cuda", "bf16").host_embedding


def test_an_embedding_that_is_the_head_is_refused(config: Path) -> None:
    loaded = load_config(config, ["pretrain.embedding=host"])
    with pytest.raises(UsageError, match="its head, which the device needs"):
        stage_setting(loaded, "pretrain", preset_spec("llama-3.2-1b"), "cuda", "bf16")
    assert make_config(loaded.model_dump(mode="json")).pretrain.embedding == "host"
