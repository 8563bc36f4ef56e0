"""Two records against each other; and the synthetic results that the tests of records, tables and pictures share: their
figures are made up, so that what formats them can be tested. Nothing in them was measured.
"""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from elo_engine.benchmarks.compare import compare, verdict
from elo_engine.benchmarks.intervals import pipeline_speedup, rounds_of, stage_ratio
from elo_engine.benchmarks.recording import withdraw, write_record
from elo_engine.benchmarks.tables import BASELINES
from elo_engine.errors import UsageError
from elo_engine.measure.meter import spread

LABELS = {
    "transformers_full": ("a", "full CP, transformers Trainer", 100.0),
    "liger_full": ("b", "full CP, Liger kernels", 80.0),
    "engine_full": ("c", "full CP, this engine", 70.0),
    "lora": ("d", "LoRA r16, peft", 60.0),
    "outer_unfrozen": ("e", "first and last layer unfrozen", 50.0),
    "elo_pretrain": ("f", "ELO pretraining, this engine", 7.0),
    "elo_align": ("g", "alignment, this engine", 68.0),
    "transformers_shallow": ("x", "two layers, transformers", 12.0),
    "transformers_full_kept": ("k", "full CP, memory kept", 90.0),
}
PREDICTED = {"weights": 400, "gradients": 100, "optimizer": 200, "activations": 250, "loss workspace": 60, "slack": 10}
ENVIRONMENT = {
    "cpu": "Imaginary CPU", "cpu_cores": 2, "cpu_threads_used": 2, "gpus": [],
    "packages": {"torch": "0.0.1", "transformers": "0.0.2"},
}  # fmt: skip


SETTINGS = {
    "weights": "random", "rows_a_step": 2, "state": "8bit", "arms_alive_together": True, "interrupted": False,
}  # fmt: skip


def speedup(
    *, model: str = "imaginary-1b", slower: float = 1.0, rounds: int = 7, seed: int = 0, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, raw) of a run that never was; `slower` multiplies elo_pretrain's seconds."""
    order = random.Random(seed)
    tokens = {arm: 4096 if arm == "elo_pretrain" else 1024 for arm in LABELS}
    raw: dict[str, Any] = {"rounds": []}
    ran = [arm for arm in LABELS if arm not in ("liger_full", "outer_unfrozen")]
    for _ in range(rounds):
        drift = order.uniform(1.0, 1.3)
        turn = {}
        for arm in ran:
            base = LABELS[arm][2] / 1e3 * tokens[arm] / 1024 * drift * (slower if arm == "elo_pretrain" else 1)
            turn[arm] = {"seconds": [base * order.lognormvariate(0, 0.02) for _ in range(3)], "losses": [9.5, 9.4, 9.3]}
        raw["rounds"].append(turn)
    times = rounds_of(raw)
    arms: dict[str, Any] = {
        "liger_full": _not_ran("liger_full", "not here", "Liger's kernels need a GPU | CUDA"),
        "outer_unfrozen": _not_ran("outer_unfrozen", "failed", "out of memory"),
    }
    gpu = device == "cuda"
    for number, arm in enumerate(ran):
        steps = [second for turn in times for second in turn[arm]]
        found = spread(steps)
        assert found is not None
        size = 2**20 * (12 if arm in ("elo_pretrain", "transformers_shallow") else 60)
        memory = {name: share * size // 10 for name, share in PREDICTED.items()}
        total = sum(memory.values())
        arms[arm] = {
            "letter": LABELS[arm][0], "label": LABELS[arm][1], "status": "ran", "why": "",
            "tokens_per_step": tokens[arm], "step_s": vars(found),
            "tokens_per_s": {
                "median": tokens[arm] / found.median, "p10": tokens[arm] / found.p90, "p90": tokens[arm] / found.p10
            },
            "model_gflop_per_token": 2.0, "executed_gflop_per_token": 2.7, "mfu": 0.31 if gpu else None,
            "ceiling_share": 0.4,
            "memory": {
                "peak_allocated_bytes": total - 9 if gpu else None, "peak_reserved_bytes": total + 99 if gpu else None,
                "host_peak_bytes": 2 * total, "tensor_peak_bytes": None if gpu else int(total / 1.03),
                "predicted_bytes": total, "predicted": memory,
            },
            "energy_j_per_token": 0.5 if gpu else None, "loss_first": 9.5, "loss_last": 9.3,
            "parameters_trained": 1000 + number,
            "options": {"recompute": "layer" if arm in ("transformers_full", "engine_full", "lora") else "none"},
        }  # fmt: skip
    over = [arm for arm in BASELINES if arm in ran]
    result = {
        "schema": 1, "theme": "speedup",
        "device": {"type": device, "name": "Imaginary Card" if gpu else "Imaginary CPU"},
        "model": {"name": model, "parameters": 10**9, "layers": 16, "V": 32000, "D": 2048, "F": 8192, "H": 32, "K": 8,
                  "E": 64, "tied": True},
        "dtype": "bf16" if gpu else "fp32", "sequence_length": 8192 if gpu else 512,
        "micro_batch": {"elo_pretrain": 4, "others": 1}, "split": 0.9, "rounds": rounds, "warmup_steps": 2,
        "ceilings": {"matmul_flop_per_s": 1.5e11, "copy_bytes_per_s": 2.8e10},
        "peak_flop_per_s": 9.89e14 if gpu else None, "arms": arms,
        "stage_ratio": {arm: stage_ratio(times, tokens, arm).to_json() for arm in over},
        "pipeline_speedup": {arm: pipeline_speedup(times, tokens, arm).to_json() | {"ideal": 5.25} for arm in over},
        "checks": ["what trains is what should", "first losses agree"],
    }  # fmt: skip
    return result, raw


def _not_ran(arm: str, status: str, why: str) -> dict[str, Any]:
    return {"letter": LABELS[arm][0], "label": LABELS[arm][1], "status": status, "why": why}


def memory() -> dict[str, Any]:
    """A memory result that was never measured."""
    points, caps = [], []
    order = random.Random(0)
    for arm, share in (("transformers_full", 40), ("lora", 12), ("elo_pretrain", 6), ("elo_align", 44)):
        for T in (2048, 8192):
            for B in (1, 4):
                measured = share * 2**28 + share * 2**16 * T * B // 16
                predicted = int(measured * order.uniform(1.0, 1.07))
                ran = arm != "elo_align" or B == 1
                points.append(
                    {"arm": arm, "sequence_length": T, "micro_batch": B, "predicted_bytes": predicted,
                     "predicted": {"weights": predicted}, "measured_bytes": measured if ran else None,
                     "measured_what": "traced tensor bytes" if ran else None,
                     "status": "ran" if ran else "out of memory", "recompute": "layer", "state": "8bit"}
                )  # fmt: skip
        points[-1]["cap_bytes"] = 24 * 2**30
        for gib in (8, 16, 24):
            largest = {str(T): max(0, (gib - share // 2) * 4096 // T) for T in (1024, 2048, 4096, 8192)}
            caps.append({"cap_bytes": gib * 2**30, "arm": arm, "largest": largest})
    model = speedup()[0]["model"]
    device = {"type": "cpu", "name": "Imaginary CPU"}
    return {"schema": 1, "theme": "memory", "device": device, "model": model, "points": points, "caps": caps}


def kernels(*, slower: float = 1.0) -> dict[str, Any]:
    """A kernels result that was never measured, its rows as contest.measure() returns them."""
    order = random.Random(0)

    def row(base: float) -> dict[str, Any]:
        raw = [base * order.lognormvariate(0, 0.02) for _ in range(7)]
        return {"peak_bytes": None, "median_ms": statistics.median(raw), "p20_ms": min(raw), "p80_ms": max(raw),
                "floor_share": 0.5, "raw_ms": raw}  # fmt: skip

    contest = {
        "contest": "rotary", "shape": "N 2048 | D 576", "flops": 0.0, "bytes": 1e6, "floor_ms": 0.9, "rounds": 7,
        "arms": {"torch": row(5.0), "engine": row(2.5 * slower), "liger": {"skipped": "needs a GPU"}},
    }  # fmt: skip
    best = {"matmul_flop_per_s": 1.5e11, "copy_bytes_per_s": 2.8e10}
    device = {"type": "cpu", "name": "Imaginary CPU"}
    return {"schema": 1, "theme": "kernels", "device": device, "ceilings": best, "contests": [contest]}


def loss() -> dict[str, Any]:
    """Held-out losses that were never measured."""
    series = []
    for label, pace in (("ELO, then alignment", 1.0), ("full CP, this engine", 4.0), ("full CP, transformers", 5.5)):
        points = [
            {"seconds": pace * 60 * step, "tokens": 10_000 * step, "language": language,
             "loss_nats": start - drop * (1 - math.exp(-step / 4)),
             "stage": "alignment" if label.startswith("ELO") and step > 8 else "training"}
            for step in range(0, 11, 2)
            for language, start, drop in (("ja", 3.25, 0.5), ("en", 2.9, 0.02))
        ]  # fmt: skip
        series.append({"label": label, "points": points})
    return {"schema": 1, "theme": "loss", "conditions": "imaginary-1b, 100,000 tokens, one seed", "series": series}


def keep(records: Path, result: dict[str, Any], raw: dict[str, Any] | None = None, **more: Any) -> Path:
    """`write_record` with what the tests do not look at."""
    gpu = result.get("device", {}).get("type") == "cuda"
    settings = SETTINGS | ({"rows_a_step": 4} if gpu else {})
    fields = {"card": "imaginary", "environment": ENVIRONMENT, "settings": settings, "command": ["elo", "bench"]}
    return write_record(records, result=result, raw=raw or {}, **(fields | more))


def lines_of(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.startswith(f"  {name}: ")]
    return found


def test_the_same_code_shows_no_difference(tmp_path: Path) -> None:
    a, b = keep(tmp_path, *speedup(seed=1, rounds=15)), keep(tmp_path, *speedup(seed=4, rounds=15))
    lines = compare(a, b)
    assert lines[:2] == [f"A: {a.name}", f"B: {b.name}"] and "NOT THE SAME" not in "\n".join(lines)
    for arm in ("transformers_full", "elo_pretrain", "elo_align", "pipeline over transformers_full"):
        assert lines_of(lines, arm).endswith("no difference shown"), lines


def test_a_slower_stage_is_seen_and_only_that_one(tmp_path: Path) -> None:
    a, b = keep(tmp_path, *speedup(rounds=15)), keep(tmp_path, *speedup(rounds=15, slower=1.5))
    lines = compare(a, b)
    assert "1.500" in lines_of(lines, "elo_pretrain") and lines_of(lines, "elo_pretrain").endswith("B is slower")
    assert lines_of(lines, "elo_align").endswith("no difference shown")
    assert lines_of(lines, "pipeline over transformers_full").endswith("smaller in B")
    assert lines_of(compare(b, a), "elo_pretrain").endswith("B is faster")


def test_the_interval_of_the_log_ratio_decides() -> None:
    steady = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0]
    assert verdict(steady, [2.0] * 6, "slower", "faster") == "2.000 (1.970 to 2.010): slower"
    assert verdict(steady, [0.5] * 6, "slower", "faster").endswith(": faster")
    assert verdict(steady, steady[::-1], "slower", "faster").endswith(": no difference shown")
    wild = [0.5, 2.5, 1.4, 0.6, 3.0, 0.9]
    assert verdict(steady, wild, "slower", "faster").endswith(": no difference shown")
    few = verdict(steady, [9.0, 9.0], "slower", "faster")
    assert few == "9.000, no interval from 6 and 2 rounds: too few rounds to show a difference"


def test_five_rounds_are_too_few_for_a_claim() -> None:
    five, six = [1.0, 1.01, 0.99, 1.0, 1.02], [2.0] * 6
    for first, second in ((five, six), (six, five)):
        said = verdict(first, second, "slower", "faster")
        assert said.endswith(", 93.75 %): too few rounds to show a difference")
    assert verdict(five, five[::-1], "slower", "faster").endswith(", 93.75 %): no difference shown")


def test_other_conditions_are_stated_before_any_ratio(tmp_path: Path) -> None:
    result, raw = speedup()
    a = keep(tmp_path, result, raw)
    other = result | {"sequence_length": 2048, "dtype": "bf16", "model": result["model"] | {"name": "imaginary-2b"}}
    environment = ENVIRONMENT | {"packages": {"torch": "0.0.9", "transformers": "0.0.2"}}
    lines = compare(a, keep(tmp_path, other, raw, environment=environment))
    first = next(number for number, line in enumerate(lines) if line.startswith("B over A"))
    text = "\n".join(lines[:first])
    for said in ("NOT THE SAME SETTING", "sequence_length: 512 in A, 2048 in B", "dtype: fp32 in A, bf16 in B",
                 "model: imaginary-1b in A, imaginary-2b in B", "torch: 0.0.1 in A, 0.0.9 in B"):  # fmt: skip
        assert said in text
    assert "transformers:" not in text
    shapes = result | {"model": result["model"] | {"D": 1024}}
    assert any("NOT THE SAME SHAPES" in line for line in compare(a, keep(tmp_path, shapes, raw)))
    withdraw(a, "disturbed")
    assert any("IS WITHDRAWN" in line and "disturbed" in line for line in compare(a, a))


def test_options_of_an_arm_that_both_measured_are_of_the_setting(tmp_path: Path) -> None:
    """An arm that one of them has not, or could not run, says nothing of the ratios of the others."""
    result, raw = speedup()

    def told(**options: dict[str, Any]) -> Path:
        arms = {name: arm | {"options": arm.get("options", {}) | options.get(name, {})}
                for name, arm in result["arms"].items()}  # fmt: skip
        return keep(tmp_path, result | {"arms": arms}, raw)

    plain = told(elo_pretrain={"state": "8bit"})
    eight = told(elo_pretrain={"state": "fp32", "fp8": "head", "recompute": "layer"}, outer_unfrozen={"fp8": "all"})
    lines = compare(plain, eight)
    assert lines[2:6] == [
        "NOT THE SAME SETTING: the ratios below are not of the code alone.",
        "  elo_pretrain, fp8: none in A, head in B", "  elo_pretrain, state: 8bit in A, fp32 in B",
        "  elo_pretrain, recompute: none in A, layer in B",
    ]  # fmt: skip
    assert not any(line.startswith("  outer_unfrozen, ") for line in lines)
    older = keep(tmp_path, result, raw)  # says nothing of the optimizer's state
    assert "NOT THE SAME" not in "\n".join(compare(older, plain))
    alone = result | {"arms": {"elo_pretrain": result["arms"]["elo_pretrain"]}}
    alone |= {"pipeline_speedup": {}, "stage_ratio": {}}
    rounds = [{"elo_pretrain": turn["elo_pretrain"]} for turn in raw["rounds"]]
    others = told(lora={"fp8": "all"})
    assert "NOT THE SAME" not in "\n".join(compare(others, keep(tmp_path, alone, {"rounds": rounds})))


def test_arms_of_one_record_alone_are_named(tmp_path: Path) -> None:
    result, raw = speedup()
    a = keep(tmp_path, result, raw)
    arms = {name: arm for name, arm in result["arms"].items() if name != "lora"}
    rounds = [{name: steps for name, steps in turn.items() if name != "lora"} for turn in raw["rounds"]]
    b = keep(tmp_path, result | {"arms": arms}, {"rounds": rounds})
    assert "  lora: only in A" in compare(a, b) and "  lora: only in B" in compare(b, a)


def test_kernels_and_loading_are_compared_by_their_own_rounds(tmp_path: Path) -> None:
    a, b = keep(tmp_path, kernels()), keep(tmp_path, kernels(slower=2.0))
    lines = compare(a, b)
    assert lines_of(lines, "rotary (N 2048 | D 576) engine").endswith("B is slower")
    assert lines_of(lines, "rotary (N 2048 | D 576) torch").endswith("no difference shown")

    def loading(seconds: float) -> dict[str, Any]:
        rows: list[dict[str, Any]] = [
            {"state": "cold", "arm": "engine", "round": number, "seconds": seconds + number / 1000}
            for number in range(6)
        ]
        rows.append({"state": "cold", "arm": "peer", "round": 0, "failed": "not installed"})
        return {"schema": 1, "theme": "loading", "results": {"model": "tiny", "measurements": rows}}

    lines = compare(keep(tmp_path, loading(1.0)), keep(tmp_path, loading(0.5)))
    assert lines_of(lines, "cold engine").endswith("B is faster") and "peer" not in "\n".join(lines)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a, other, sizes = keep(tmp_path, *speedup()), keep(tmp_path, kernels()), keep(tmp_path, memory())
    with pytest.raises(UsageError, match=r"theme 'speedup', .* of 'kernels'"):
        compare(a, other)
    with pytest.raises(UsageError, match="'memory' hold no times"):
        compare(sizes, sizes)
    with pytest.raises(UsageError, match="no such record"):
        compare(a, tmp_path / "nowhere")
    (tmp_path / "2020-01-01_old").mkdir()
    with pytest.raises(UsageError, match="an earlier record"):
        compare(a, tmp_path / "2020-01-01_old")
