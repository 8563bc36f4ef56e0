"""The configuration: amounts, defaults, overrides, and that every key reaches the run."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import elo_engine
from elo_engine.config import RunConfig, changed_keys, load_config, make_config, parse_count
from elo_engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
TREE: dict[str, Any] = {"model": "m", "output": "o", "data": {"shards": {"ja": "x"}}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("900_000_000", 9 * 10**8), ("1e9", 10**9), ("900M", 9 * 10**8), ("2.5G", 25 * 10**8), (262144.0, 262144), (7, 7)],
)
def test_amounts(text: Any, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["many", "1.5", "-3", "8 apples", ""])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|whole"):
        parse_count(text)


def test_defaults_are_the_papers() -> None:
    config = make_config(TREE)
    assert config.data.sequence_length == 8192 and config.detach.layers == ["first", "last"]
    assert config.pretrain.micro_batch == 4 and config.align.micro_batch == 1 and config.seed == 42
    assert config.pretrain.tokens == 9 * config.align.tokens


def test_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = make_config(TREE | {"pretrain": {"tokens": "1e9", "optimizer": {"lr": "3e-4"}}})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "c.yaml")
    assert again == config and changed_keys(config, again) == []
    assert changed_keys(config, again.model_copy(update={"seed": 1})) == ["seed"]


def test_a_resumed_run_may_link_or_copy() -> None:
    """`hard_links` changes no number; it is off unless somebody asks."""
    config = make_config(TREE)
    assert config.hard_links is False
    assert changed_keys(config, make_config(TREE | {"hard_links": True, "output": "elsewhere"})) == []
    with pytest.raises(UsageError, match="hard_links"):
        make_config(TREE | {"hard_links": "perhaps"})


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(make_config(TREE).to_yaml())
    overrides = ["pretrain.optimizer.lr=3e-4", "detach.layers=[0, -2]", "data.mix={ja: 1}"]
    config = load_config(tmp_path / "c.yaml", overrides)
    assert config.pretrain.optimizer.lr == 3e-4 and config.detach.layers == [0, -2] and config.data.mix == {"ja": 1.0}


def test_every_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(TREE | {"sede": 1, "snapshot": {"evry": 3}})
    assert "'seed'" in str(caught.value) and "'every'" in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    load_config(path)


def leaf_keys(model: type[BaseModel]) -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaf_keys(kind)
        else:
            found.add(name)
    return found


def test_every_key_is_read_by_the_code() -> None:
    """A key that nothing reads would be an option that does nothing."""
    read: set[str] = set()
    package = Path(elo_engine.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "config.py":  # there, only what methods and validators use counts as reading
            continue
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    refused_unless_default = {"state", "engine", "when"}  # tests/test_bad_input.py holds the refusals
    assert leaf_keys(RunConfig) - read - refused_unless_default == set()
