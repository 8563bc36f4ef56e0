"""Every key of the configuration does something: changed alone, it changes the plan, the run or what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from elo_engine.config import RunConfig

Tree = dict[str, Any]
Elo = Callable[..., tuple[int, str]]


class Case(NamedTuple):
    """What is changed, and what must be another for it.

    verb: plan (nothing is written), pretrain, align (of the source model) or run. seen: what must differ, a prefix of
    the names that `observed` gives. beside: overrides of both sides, where the key has a meaning only with them.
    """

    change: str
    verb: str
    seen: str
    beside: tuple[str, ...] = ()


STREAMED = ("align.engine=streamed",)
EIGHT = ("dtype=bf16", "{stage}.optimizer.state=8bit")
STAGE = {
    "tokens": Case("{stage}.tokens=256", "plan", "plan {stage} steps"),
    "tokens_per_step": Case("{stage}.tokens_per_step=64", "plan", "plan {stage} steps"),
    "micro_batch": Case("{stage}.micro_batch=1", "plan", "plan {stage} memory"),
    "recompute": Case("{stage}.recompute={other}", "plan", "plan {stage} memory"),
    "optimizer.lr": Case("{stage}.optimizer.lr=0.0123", "{stage}", "metric {stage} 1 lr"),
    "optimizer.betas": Case("{stage}.optimizer.betas=[0.5, 0.95]", "{stage}", "weights {stage}"),
    "optimizer.eps": Case("{stage}.optimizer.eps=0.1", "{stage}", "weights {stage}"),
    "optimizer.weight_decay": Case("{stage}.optimizer.weight_decay=0.5", "{stage}", "weights {stage}"),
    "optimizer.state": Case("{stage}.optimizer.state=8bit", "plan", "plan {stage} memory"),
    "optimizer.master": Case("{stage}.optimizer.master=24", "plan", "plan {stage} memory", EIGHT),
    "optimizer.clip": Case(
        "{stage}.optimizer.clip=0.001", "{stage}", "weights {stage}", ("{stage}.optimizer.eps=0.1",)
    ),
    "graph": Case("{stage}.graph=on", "plan", "status"),  # there is no GPU in this plan
    "schedule.warmup": Case("{stage}.schedule.warmup=0.9", "{stage}", "metric {stage} 1 lr"),
    "schedule.decay": Case("{stage}.schedule.decay=constant", "{stage}", "metric {stage} 3 lr"),
    "schedule.final": Case("{stage}.schedule.final=0.9", "{stage}", "metric {stage} 3 lr"),
}
CASES = {
    "model": Case("model={elsewhere}", "plan", "status"),
    "revision": Case("revision=abc", "plan", "status"),
    "output": Case("output={output}-other", "pretrain", "at"),
    "device": Case("device=cuda", "plan", "" if torch.cuda.is_available() else "status"),
    "dtype": Case("dtype=bf16", "plan", "plan pretrain memory"),
    "kernels": Case("kernels=reference", "pretrain", "numerics kernels"),
    "seed": Case("seed=7", "pretrain", "weights pretrain"),
    "hard_links": Case("hard_links=true", "run", "links", ("detach.layers=[0]", "model={sharded}", "align.tokens=128")),
    "data.shards": Case("data.shards.ja={heldout}", "pretrain", "weights pretrain"),
    "data.mix": Case("data.mix={{ja: 1, en: 9}}", "pretrain", "weights pretrain"),
    "data.sequence_length": Case("data.sequence_length=64", "plan", "plan pretrain memory"),
    "data.packing": Case("data.packing=concat", "pretrain", "weights pretrain"),
    "detach.layers": Case("detach.layers=[0]", "plan", "plan pretrain memory"),
    "detach.bridge": Case("detach.bridge=linear", "plan", "plan pretrain memory"),
    "detach.bridge_tokens": Case("detach.bridge_tokens=640", "pretrain", "weights pretrain", ("detach.bridge=linear",)),
    "detach.ridge": Case("detach.ridge=5", "pretrain", "weights pretrain", ("detach.bridge=linear",)),
    "pretrain.embedding": Case("pretrain.embedding=host", "plan", "status"),  # the model here is tied
    "pretrain.fp8": Case("pretrain.fp8=head", "plan", "plan pretrain memory"),
    "align.engine": Case("align.engine=streamed", "plan", "plan align engine"),
    "align.stream.store": Case("align.stream.store=disk", "plan", "plan align engine", STREAMED),
    "align.stream.inputs": Case("align.stream.inputs=host", "plan", "plan align engine", STREAMED),
    "align.stream.update": Case("align.stream.update=at_once", "plan", "plan align", STREAMED),
    "align.stream.vocabulary": Case("align.stream.vocabulary=sliced", "plan", "plan align", STREAMED),
    "align.when": Case("align.when=interleaved", "align", "metric pretrain"),
    "evaluate.every": Case("evaluate.every=2", "pretrain", "metric pretrain 2 ja"),
    "evaluate.whole": Case("evaluate.whole=false", "pretrain", "metric pretrain 3 ja whole"),
    "evaluate.shards": Case("evaluate.shards={{}}", "pretrain", "metric pretrain 3 ja"),
    "evaluate.tokens": Case(
        "evaluate.tokens=40", "pretrain", "metric pretrain 3 ja", ("evaluate.shards={{ja: {train}}}",)
    ),
    "snapshot.every": Case("snapshot.every=3", "pretrain", "file pretrain"),
    "snapshot.keep": Case("snapshot.keep=1", "pretrain", "file pretrain"),
    **{f"pretrain.{key}": case for key, case in STAGE.items()},
    **{f"align.{key}": case for key, case in STAGE.items()},
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section and all below it."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def walk(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from walk(value, f"{name} {key}")
    else:
        yield name, node


# Of this machine at this moment, or of how long something took.
_MOMENT = re.compile(
    r"room|seconds|_s$|per_s|host|fits|advice|disk|why|measured|peak_bytes$|resident_bytes|device_bytes|refusal"
)


def observed(elo: Elo, config: Path, verb: str, overrides: list[str], output: Path) -> dict[str, Any]:
    """All that a command showed and left which is neither a time nor this moment's free memory, by name."""
    options = ["--json"] if verb == "plan" else []
    status, shown = elo(verb, config, *overrides, *options)
    found: dict[str, Any] = {"status": status}
    if status:
        return found
    if verb == "plan":
        planned = json.loads(shown[shown.index("{") :])
        planned["pretrain"]["memory"]["moment"] = None
        return found | {name: value for name, value in walk(planned, "plan") if not _MOMENT.search(name)}
    moved = next((Path(one[7:]) for one in overrides if one.startswith("output=")), output)
    found["at"] = sorted(path.name for path in (moved, output) if path.exists())
    for path in sorted(moved.rglob("*")):
        name = " ".join(path.relative_to(moved).parts)
        if path.is_file() and "tensorboard" not in name and "resolved" not in name:
            found[f"file {name}"] = True
        if path.suffix == ".safetensors" and "model" in name and path.stat().st_nlink > 1:
            found[f"links {name}"] = path.stat().st_nlink
    for stage in ("pretrain", "align"):
        for folder in sorted((moved / stage).glob("step-*"))[-1:]:
            for key, tensor in load_file(folder / "weights.safetensors").items():
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[f"weights {stage} {key}"] = hashlib.sha256(data).hexdigest()
            numerics = json.loads((folder / "state.json").read_text())["numerics"]
            found |= {f"numerics {key}": value for key, value in numerics.items() if key != "configuration"}
    for line in (moved / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "step" in record and "stage" in record and "event" not in record:
            name = " ".join(str(record[key]) for key in ("stage", "step", "language", "model") if key in record)
            kept = {key: value for key, value in record.items() if not key.endswith("_s")}
            found |= dict(walk(kept, f"metric {name}"))
    return found


def filled(text: str, stage: str, places: dict[str, str]) -> str:
    # the run that is changed says none in pretraining and layer in alignment
    return text.format(stage=stage, other="none" if stage == "align" else "layer", **places)


@pytest.fixture(scope="module")
def sharded(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tied=False, shards=4)


def test_every_key_has_a_case() -> None:
    assert set(CASES) == set(leaves(RunConfig))


def test_nothing_changed_is_nothing_seen(elo: Elo, run_tree: Tree, write_config: Callable[..., Path]) -> None:
    """What is compared repeats itself: else a key that does nothing could seem to do something."""
    config, output = write_config(run_tree), Path(run_tree["output"])
    for verb in ("plan", "run"):
        once = observed(elo, config, verb, [], output)
        again = observed(elo, config, verb, [f"output={output}-2"] if verb == "run" else [], output)
        assert len(once) > 30 and once.pop("at", 0) is not None and again.pop("at", 0) is not None
        assert {key for key in once.keys() | again.keys() if once.get(key) != again.get(key)} == set()


@pytest.mark.parametrize("key", sorted(CASES))
def test_a_key_that_is_changed_changes_something(
    key: str, elo: Elo, run_tree: Tree, write_config: Callable[..., Path], shards: dict[str, str], sharded: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    case, stage = CASES[key], key.partition(".")[0]
    places = {"elsewhere": str(tmp_path / "none"), "sharded": str(sharded), "heldout": shards["ja-heldout"],
              "train": shards["ja-train"], "output": run_tree["output"]}  # fmt: skip
    for section in ("pretrain", "align"):  # fewer steps than the whole pipeline's
        run_tree[section]["tokens"] = 512 if section == "pretrain" else 384
    verb, seen = filled(case.verb, stage, places), filled(case.seen, stage, places)
    beside = [filled(one, stage, places) for one in case.beside]
    change = filled(case.change, stage, places)
    config, output = write_config(run_tree), Path(run_tree["output"])
    before = observed(elo, config, verb, beside, output)
    assert before["status"] == 0
    other = [] if key == "output" or verb == "plan" else [f"output={output}-changed"]
    after = observed(elo, config, verb, [*beside, change, *other], output)
    different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - {
        "at" if key != "output" else ""
    }
    assert any(name.startswith(seen) for name in different), f"{change}: {seen!r} is not among {sorted(different)[:20]}"
