"""The whole method on every family: detach, pretrain, reattach, align; what comes out is a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases import CASES, make_family
from test_pipeline import fingerprint, raw, tensors

from elo_engine.checkpoint import open_checkpoint
from elo_engine.data import TokenStore
from elo_engine.model.names import layer_prefix

Elo = Callable[..., tuple[int, str]]


def documents_of(folder: str) -> list[torch.Tensor]:
    store = TokenStore(Path(folder))
    return [torch.from_numpy(store.document(number).astype("int64")) for number in range(store.documents)]


@pytest.mark.parametrize("case", CASES)
def test_five_steps_reattached_and_two_whole_steps(
    case: str, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    import json

    from transformers import AutoModelForCausalLM

    source = make_family(tmp_path / "source", case, shards=3)
    before = fingerprint(source)
    run_tree |= {"model": str(source)}
    run_tree["pretrain"]["tokens"], run_tree["align"]["tokens"] = 5 * 128, 2 * 128
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    assert fingerprint(source) == before, "the source's bytes and times never change"
    run = Path(run_tree["output"])

    old, reattached, aligned = tensors(source), tensors(run / "reattached"), tensors(run / "model")
    assert set(old) == set(reattached) == set(aligned)
    for name, tensor in old.items():
        trained = name.startswith((layer_prefix(0), layer_prefix(3)))
        assert (raw(tensor) != raw(reattached[name])) == trained, name
        if tensor.dim() > 1 and "embed" not in name and "lm_head" not in name:
            assert raw(reattached[name]) != raw(aligned[name]), f"{name}: alignment trains every layer"

    folder = run_tree["evaluate"]["shards"]["ja"]
    longest = max(map(len, documents_of(folder)))
    status, shown = elo(
        "eval", run / "model", "--tokens", folder, "--sequence-length", 256, "--dtype", "fp32", "--json"
    )
    assert status == 0, shown
    ours = json.loads(shown)[folder]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32, attn_implementation="eager")
    total, count, position = 0.0, 0, 0
    for ids in documents_of(folder):
        while len(ids):  # a document that crosses the end of a row of 256 starts anew in the next
            room = 256 - position % 256
            piece, following = ids[:room], ids[room : room + 1]
            labels = torch.cat([piece[1:], following if len(following) else torch.tensor([-100])])
            with torch.no_grad():
                logits = model(input_ids=piece[None], use_cache=False).logits[0]
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels >= 0).sum())
            position += len(piece)
            ids = ids[room:]
    assert longest > 12, "beyond the window"
    assert ours["loss_nats"] == pytest.approx(total / count, rel=1e-5)


STREAMED = [
    "gemma2, untied, low caps", "gemma3", "olmo2", "phi3, tied, longrope, partial rotary", "smollm3, untied, windows",
]  # fmt: skip


@pytest.mark.parametrize("vocabulary", ["whole", "sliced"])
@pytest.mark.parametrize("case", STREAMED)
def test_streamed_alignment_is_that_of_the_resident_engine(
    case: str, vocabulary: str, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    """Bit for bit; to rounding where embedding and head come in slices."""
    source = make_family(tmp_path / "source", case)
    run_tree |= {"model": str(source)}
    run_tree["pretrain"]["tokens"], run_tree["align"]["tokens"] = 128, 2 * 128
    made = {}
    for engine, streaming in (("resident", {}), ("streamed", {"stream": {"vocabulary": vocabulary}})):
        align = run_tree["align"] | {"engine": engine} | streaming
        tree = run_tree | {"output": str(tmp_path / engine), "align": align}
        status, shown = elo("run", write_config(tree))
        assert status == 0, shown
        made[engine] = tensors(tmp_path / engine / "model")
    if vocabulary == "whole":
        for name, tensor in made["resident"].items():
            assert raw(tensor) == raw(made["streamed"][name]), name
        return
    differences = torch.cat(
        [(tensor - made["streamed"][name]).abs().flatten() for name, tensor in made["resident"].items()]
    )
    # Adam's first steps are nearly lr x sign(gradient): of a gradient about zero, rounding decides the sign
    assert float(differences.max()) <= 2 * 2 * 1e-3 + 1e-5
    assert float((differences > 1e-5).float().mean()) < 1e-3


@pytest.mark.parametrize("case", ["gemma3", "olmo2", "smollm3, untied, windows"])
def test_bridge_and_interleaved_alignment(
    case: str, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    run_tree |= {"model": str(make_family(tmp_path / "source", case))}
    run_tree["detach"] = {"bridge": "linear", "bridge_tokens": 512}
    run_tree["align"]["when"] = "interleaved"
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    made = open_checkpoint(Path(run_tree["output"]) / "model")
    assert set(made.entries) == set(open_checkpoint(tmp_path / "source").entries)
