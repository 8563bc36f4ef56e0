"""`elo demo` with a model and text of one's own: the whole path with the tiny checkpoint, baseline process included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SYLLABLES, WORDS

from elo_engine import demo
from elo_engine.checkpoint import ranges
from elo_engine.errors import RefusedError

from .hub_server import HubServer


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe at the tiny model's size."""
    monkeypatch.setattr(demo, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(demo, "HELDOUT_TOKENS", 512)
    monkeypatch.setattr(demo, "DETACH", demo.DETACH | {"bridge_tokens": 512})
    monkeypatch.setattr(demo, "PRETRAIN", demo.PRETRAIN | {"tokens": 256 * 6, "tokens_per_step": 256})
    monkeypatch.setattr(demo, "ALIGN", demo.ALIGN | {"tokens": 128 * 3, "tokens_per_step": 128, "micro_batch": 2})


def write_text(path: Path, words: Any, glue: str) -> Path:
    paragraphs = [glue.join(words[(start + 7 * step) % len(words)] for step in range(60)) for start in range(80)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def test_demo_with_own_model_and_text(
    tied: Path, tmp_path: Path, elo: Callable[..., tuple[int, str]], small_demo: None, draws: None
) -> None:
    ja, en = write_text(tmp_path / "ja.txt", SYLLABLES, ""), write_text(tmp_path / "en.txt", WORDS, " ")
    arguments = ("demo", "--output", tmp_path / "demo", "--model", tied, "--text", f"ja={ja}", "--text", f"en={en}")
    status, shown = elo(*arguments)
    assert status == 0, shown
    results = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(results["evaluations"]) == {"base", "aligned"}
    assert results["stages"]["pretrain"]["bridge"]["gaps"], "the recipe has a bridge"
    assert set(results["evaluations"]["base"]) == {"ja", "en"}
    base, speed = results["baseline"], results["speedup"]
    stages = results["stages"]
    expected = (1 / base["tokens_per_s"]) / (
        0.9 / stages["pretrain"]["tokens_per_s"] + 0.1 / stages["align"]["tokens_per_s"]
    )
    assert speed["paper_split"] == pytest.approx(expected)
    assert base["parameters_trained"] == 86_448 and len(base["step_s"]) == demo.BASELINE_STEPS
    assert results["samples"]["prompt"] and "Pipeline speedup" in (tmp_path / "demo" / "report.md").read_text()
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert (tmp_path / "demo" / "report.png").stat().st_size > 10_000
    assert "![loss](report.png)" in (tmp_path / "demo" / "report.md").read_text()
    finished = (tmp_path / "demo" / "metrics.jsonl").read_text()
    status, shown = elo(*arguments)
    assert status == 0 and (tmp_path / "demo" / "metrics.jsonl").read_text() == finished, (
        "a finished demo trains nothing"
    )


def test_demo_with_a_model_from_a_hub(
    tied: Path, tmp_path: Path, elo: Callable[..., tuple[int, str]], small_demo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit, named by its hub id, whole when transformers reads it."""
    ja, en = write_text(tmp_path / "ja.txt", SYLLABLES, ""), write_text(tmp_path / "en.txt", WORDS, " ")
    texts = ("--text", f"ja={ja}", "--text", f"en={en}")
    arguments = ("demo", "--output", tmp_path / "demo", "--model", "some/model", *texts, "--no-baseline")
    files = {path.name: path.read_bytes() for path in tied.iterdir()}
    with HubServer({"some/model": files}) as hub:
        hub.point_to(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(ranges.TRANSFER, "header_bytes", 4096)
        first = hub.branches["some/model"]["main"]
        status, shown = elo(*arguments)
        assert status == 0, shown
        assert f"revision: {first}" in (tmp_path / "demo" / "config.resolved.yaml").read_text()
        assert "base_model: some/model\n" in (tmp_path / "demo" / "model" / "README.md").read_text()
        results = json.loads((tmp_path / "demo" / "results.json").read_text())
        samples = results.pop("samples")
        (tmp_path / "demo" / "results.json").write_text(json.dumps(results))
        shutil.rmtree(tmp_path / "cache")  # nothing but the samples needs the weights again
        hub.push("some/model", files | {"LICENSE": b"another"})
        status, shown = elo(*arguments)
        assert status == 0, shown
        assert [path.name for path in (tmp_path / "cache" / "elo" / "hub" / "some--model").glob("?" * 40)] == [first]
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["samples"] == samples


@pytest.mark.parametrize("text", ["ja", "=x", "ja=/no/such/file"])
def test_text_that_is_not_language_and_file(
    tied: Path, tmp_path: Path, elo: Callable[..., tuple[int, str]], text: str
) -> None:
    status, shown = elo("demo", "--output", tmp_path / "demo", "--model", tied, "--text", text)
    assert status == 2 and "LANG=FILE" in shown


def test_held_out_documents_are_not_trained_on(tied: Path, tmp_path: Path) -> None:
    documents = {"ja": [f"{number} " + "かきくけこ" * 5 for number in range(100)]}
    shards, heldout = demo._prepare(documents, tied, tmp_path)
    trained = {json.loads(line)["text"] for line in (tmp_path / "ja-train.jsonl").read_text().splitlines()}
    aside = [json.loads(line)["text"] for line in (tmp_path / "ja-heldout.jsonl").read_text().splitlines()]
    assert len(aside) == 1 and len(trained) == 99
    assert not any(text.startswith(aside[0][:2]) for text in trained)
    assert (Path(shards["ja"]) / "manifest.json").exists() and (Path(heldout["ja"]) / "manifest.json").exists()


def test_the_example_is_the_demos_own_recipe() -> None:
    from elo_engine.config import load_config

    example = load_config(Path(demo.__file__).parents[1] / "examples" / "demo.yaml")
    made = demo._configuration("m", Path("o"), example.data.shards, example.evaluate.shards)
    for section in ("pretrain", "align", "evaluate", "detach"):
        assert getattr(example, section) == getattr(made, section), section
    assert example.data == made.data and example.seed == made.seed


def test_other_text_at_the_same_output_is_refused(tied: Path, tmp_path: Path) -> None:
    first = {"ja": [f"{number} かきくけこ" for number in range(10)]}
    demo._prepare(first, tied, tmp_path)
    demo._prepare(first, tied, tmp_path)
    with pytest.raises(RefusedError, match="other text"):
        demo._prepare({"ja": [*first["ja"][:-1], "さしすせそ"]}, tied, tmp_path)
