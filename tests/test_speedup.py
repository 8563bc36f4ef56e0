"""The speed comparison: every arm does what it claims on a tiny model, and one that does not is caught."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elo_engine.benchmarks import contestants, evidence, rounds, speedup, trainer_arms
from elo_engine.benchmarks.arm import run_engine
from elo_engine.benchmarks.conductor import Conductor
from elo_engine.benchmarks.contestants import Contestant
from elo_engine.benchmarks.models import BenchModel, checksum, engine_model, random_rows, transformers_model
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.benchmarks.trainer_arms import run_trainer
from elo_engine.errors import FailedError, UsageError
from elo_engine.measure.setting import ENGINE, ArmName, Setting
from elo_engine.model import decoder, ops
from elo_engine.model.layers import Packing
from elo_engine.model.presets import preset_config, preset_spec
from elo_engine.stream import step as streamed_step

CPU = torch.device("cpu")
TINY = preset_config("llama-3.1-8b-mini") | {
    "num_hidden_layers": 4, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
}  # fmt: skip
MODEL = BenchModel("tiny", TINY | {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1})


@pytest.fixture(autouse=True)
def _undo_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching wraps functions of these modules for the life of a process."""
    for module in (decoder, streamed_step):
        monkeypatch.setattr(module, "decoder_layer", module.decoder_layer)
        monkeypatch.setattr(module, "layer_gradient", module.layer_gradient)
    monkeypatch.setattr(ops, "linear_cross_entropy", ops.linear_cross_entropy)


def setting(arm: ArmName, **changes: Any) -> Setting:
    shallow = arm in ("elo_pretrain", "transformers_shallow")
    made = Setting(
        arm=arm, spec=MODEL.spec, layers=(0, 3), sequence_length=32, micro_batch=2 if shallow else 1,
        micro_batches=1 if shallow else 2, dtype="fp32", state="fp32", device="cpu",
        recompute="none" if shallow else "layer",
    )  # fmt: skip
    return replace(made, **changes)


def run_arm(
    made: Setting, commands: str = "step\ntrace\nstep\nfinish\n"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> evidence, answers; in this process."""
    replies, seen = io.StringIO(), evidence.Evidence()
    conductor = Conductor(CPU, seen, replies, io.StringIO(commands))
    run = run_engine if made.arm in ENGINE else run_trainer
    run(made, MODEL, 1e-3, CPU, conductor)
    lines = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert "optimizer" in lines[0]
    return seen.to_json(), lines[1:]


ARMS: list[ArmName] = [
    "transformers_full", "engine_full", "lora", "outer_unfrozen", "elo_pretrain", "elo_align", "elo_align_streamed",
    "transformers_shallow",
]  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_what_it_claims(arm: ArmName) -> None:
    made = setting(arm) if arm != "elo_align" else setting(arm, recompute="none")
    found, answers = run_arm(made)
    evidence.require_engagement(made, found)
    assert len(answers) == 3 and all(answer["seconds"] > 0 for answer in answers)
    assert "tensor_peak_bytes" in answers[1] and "tensor_peak_bytes" not in answers[2]


def test_arms_on_the_same_weights_and_rows_start_at_the_same_loss_and_gradient() -> None:
    pairs: tuple[tuple[ArmName, ArmName], ...] = (
        ("transformers_full", "engine_full"), ("transformers_full", "elo_align_streamed"),
        ("transformers_shallow", "elo_pretrain"),
    )  # fmt: skip
    for theirs, ours in pairs:
        there, here = (run_arm(setting(arm), "step\nfinish\n")[1][0] for arm in (theirs, ours))
        assert here["loss"] == pytest.approx(there["loss"], rel=speedup.SAME_LOSS["fp32"])
        assert here["gradient_norm"] == pytest.approx(there["gradient_norm"], rel=speedup.SAME_NORM["fp32"])


def test_both_makers_make_the_same_weights() -> None:
    ours = engine_model(MODEL, (0, 3), shallow=False, recompute="none", device=CPU, dtype=torch.float32).trainable()
    theirs = dict(transformers_model(MODEL, (0, 3), shallow=False, device=CPU, dtype=torch.float32).named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].detach()) for name in ours)


TAMPERED: list[tuple[ArmName, dict[str, Any], str]] = [
    ("elo_pretrain", {"sequence_length": 16, "micro_batch": 4}, "rows of 16 to 16"),
    ("transformers_full", {"sequence_length": 16, "micro_batches": 4}, "rows of 16 to 16"),
    ("engine_full", {"micro_batches": 1}, "96 tokens passed in 3 steps, not 192"),
    ("elo_align_streamed", {"micro_batches": 1}, "96 tokens passed in 3 steps, not 192"),
    ("elo_align_streamed", {"sequence_length": 16, "micro_batches": 4}, "rows of 16 to 16"),
    ("outer_unfrozen", {"micro_batches": 1}, "96 tokens passed in 3 steps, not 192"),
    ("engine_full", {"recompute": "none"}, "decoder layers ran 24 times, not 48"),
    ("outer_unfrozen", {"layers": (0, 1, 3)}, "parameters got a gradient"),
    ("elo_pretrain", {"layers": (0,)}, "decoder layers ran 3 times, not 6"),
    ("lora", {"lora_rank": 4}, "parameters got a gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("arm", "change", "said"), TAMPERED)
def test_an_arm_that_does_less_is_caught(arm: ArmName, change: dict[str, Any], said: str) -> None:
    found, _ = run_arm(setting(arm, **change), "step\nstep\nstep\nfinish\n")
    with pytest.raises(FailedError, match=f"arm {arm} is not what it claims.*{said}"):
        evidence.require_engagement(setting(arm), found)


def test_a_frozen_layer_that_trains_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def thaw(made: Setting, model: BenchModel, device: torch.device) -> Any:
        built = honest(made, model, device)
        built.model.norm.requires_grad_(True)
        return built

    honest = trainer_arms.build
    monkeypatch.setattr(trainer_arms, "build", thaw)
    found, _ = run_arm(setting("transformers_shallow"))
    with pytest.raises(FailedError, match="parameters got a gradient"):
        evidence.require_engagement(setting("transformers_shallow"), found)


def test_a_tensor_that_moves_without_a_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay, a stray update, a buffer that is shared: nothing that is frozen may change, by a single bit."""
    honest = engine_model

    def build(*args: Any, **options: Any) -> Any:
        model = honest(*args, **options)
        states = model.hidden_states

        def nudging(batch: Any) -> Any:
            model.head_VD[7, 3] += 1e-6
            return states(batch)

        model.hidden_states = nudging
        return model

    monkeypatch.setattr("elo_engine.benchmarks.arm.engine_model", build)
    found, _ = run_arm(setting("elo_pretrain"))
    with pytest.raises(FailedError, match=r"lm_head\.weight is frozen and changed"):
        evidence.require_engagement(setting("elo_pretrain"), found)


def test_an_embedding_without_a_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient does not come through autograd, and is counted where it does come from."""

    def build(*args: Any, **options: Any) -> Any:
        model = engine_model(*args, **options)
        gradients = model.outer_gradients

        def head_alone(scale: float) -> Any:
            return (pair for pair in gradients(scale) if pair[0] is model.head_VD)

        model.outer_gradients = head_alone
        return model

    monkeypatch.setattr("elo_engine.benchmarks.arm.engine_model", build)
    monkeypatch.setattr("elo_engine.train.resident.check_first_gradients", lambda *_: None)
    found, _ = run_arm(setting("engine_full"), "step\nfinish\n")
    with pytest.raises(FailedError, match="197184 parameters got a gradient, not 229952"):
        evidence.require_engagement(setting("engine_full"), found)


def test_labels_that_are_left_out_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's work is only done for tokens with a label, and their mean loss is the same."""

    def fewer(made: Setting) -> Any:
        ids, labels = random_rows(made)
        labels[:, ::2] = -100
        return ids, labels

    monkeypatch.setattr("elo_engine.benchmarks.arm.random_rows", fewer)
    monkeypatch.setattr(trainer_arms, "random_rows", fewer)
    for arm in ("elo_pretrain", "transformers_full"):
        found, _ = run_arm(setting(arm), "step\nfinish\n")  # type: ignore[arg-type]
        with pytest.raises(FailedError, match="32 tokens carried a loss, not 64"):
            evidence.require_engagement(setting(arm), found)  # type: ignore[arg-type]


def test_a_checksum_sees_changes_that_cancel() -> None:
    tensor = torch.arange(1000.0)
    before = checksum(tensor)
    assert checksum(tensor.flip(0)) != before and checksum(tensor.clone()) == before
    tensor[3], tensor[4] = 4.0, 3.0
    assert checksum(tensor) != before


def test_a_layer_that_does_not_learn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trainer_arms.arguments

    def lazy(made: Setting, lr: float, folder: str) -> Any:
        return honest(made, 0.0, folder)

    monkeypatch.setattr(trainer_arms, "arguments", lazy)
    found, _ = run_arm(setting("transformers_full"))
    with pytest.raises(FailedError, match="learns and did not change"):
        evidence.require_engagement(setting("transformers_full"), found)


def test_a_process_serves_steps_and_an_unknown_model_is_its_row(tmp_path: Path, arms_fork: None) -> None:
    made = replace(setting("elo_pretrain"), sequence_length=16)
    one = Contestant(made)
    process = ArmProcess(one, spec_of(one, str(tmp_path / "nowhere"), 1e-4), tmp_path)
    with process, pytest.raises(ArmFailed, match="nowhere"):
        process.described()
    assert process.process.poll() is not None


def test_out_of_memory_is_a_row(tmp_path: Path) -> None:
    """540 MB of weights under a cap of 200 MB: torch's allocator says no, and the process says so."""
    made = replace(setting("engine_full"), spec=preset_spec("smollm2-135m"), layers=(0, 29))
    one = Contestant(made, environment={"OMP_NUM_THREADS": "1"})
    process = ArmProcess(one, spec_of(one, "smollm2-135m", 1e-4, cap_bytes=200_000_000), tmp_path)
    with process, pytest.raises(ArmFailed, match=r"out of memory: .*allocate memory"):
        process.described()


def one_run(seconds: dict[str, list[float]], failed: str = "") -> rounds.Run:
    taken = {name: rounds.Taken(losses=[5.0], norms=[1.0]) for name in seconds}
    taken["engine_full"].failed = failed
    turns = [{name: {"seconds": [values[k]], "losses": [5.0]} for name, values in seconds.items()} for k in range(5)]
    return rounds.Run(taken, turns, 2, True)  # type: ignore[arg-type]


SECONDS = {
    "transformers_full": [8.0, 8.0, 16.0, 8.0, 8.0], "engine_full": [6.0] * 5,
    "elo_pretrain": [0.4, 0.4, 0.8, 0.4, 0.4], "elo_align": [4.0, 4.0, 8.0, 4.0, 4.0],
}  # fmt: skip


def test_the_pipeline_speedup_is_the_definition() -> None:
    """8 / (0.9 x 0.4 + 0.1 x 4), round by round, so that a slow round changes nothing."""
    present = [Contestant(setting(arm)) for arm in SECONDS]  # type: ignore[arg-type]
    found = speedup.ratios(present, one_run(SECONDS))
    assert found["pipeline_speedup"]["transformers_full"]["median"] == pytest.approx(8 / (0.36 + 0.4))
    assert found["stage_ratio"]["transformers_full"]["median"] == pytest.approx(0.05)
    engine = found["pipeline_speedup"]["engine_full"]  # 6 / 0.76 in all rounds but the slow one, where it is half
    assert engine["median"] == pytest.approx(6 / 0.76)
    assert 6 / 1.52 * 0.999 <= engine["low"] <= engine["high"] <= 6 / 0.76 * 1.001
    assert found["pipeline_speedup"]["transformers_full"]["ideal"] > 1


def test_an_arm_that_failed_gives_no_ratio() -> None:
    present = [Contestant(setting(arm)) for arm in SECONDS]  # type: ignore[arg-type]
    run = one_run(SECONDS, failed="out of memory: no")
    assert set(speedup.ratios(present, run)["pipeline_speedup"]) == {"transformers_full"}
    row = speedup.arm_result(present[1], run, {"matmul_flop_per_s": 1e11}, None)
    assert row["status"] == "failed" and row["why"] == "out of memory: no"


def test_arms_that_start_apart_are_refused() -> None:
    present = [Contestant(setting(arm)) for arm in SECONDS]  # type: ignore[arg-type]
    run = one_run(SECONDS)
    assert speedup.check_starts(present, run, "fp32")
    for losses, norms in (([5.001], [1.0]), ([float("nan")], [1.0]), ([5.0], [1.01])):
        run.taken["engine_full"].losses, run.taken["engine_full"].norms = losses, norms
        with pytest.raises(FailedError, match="do not compute the same"):
            speedup.check_starts(present, run, "fp32")


FAULTS = ["two layers that changed places", "attention that sees what comes", "positions that all are 0"]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_arm_that_computes_something_else_starts_elsewhere(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights give a loss near ln V whatever the layers do: the checks see the fault all the same."""
    honest, build = (decoder.decoder_layer, decoder.layer_gradient), engine_model

    def wrong(*args: Any, **options: Any) -> Any:
        model = build(*args, **options)
        if fault == "two layers that changed places":
            model.layers[1], model.layers[2] = model.layers[2], model.layers[1]
        elif fault == "positions that all are 0":
            gather = model._rope.gather
            model._rope.gather = lambda packing, longest: gather(
                Packing(packing.segment_starts, packing.positions_N * 0), longest
            )
        else:
            from elo_engine.model import ops

            def backwards(q: Any, k: Any, v: Any, packing: Any, *more: Any) -> Any:
                turned = [x.flip(0) for x in (q, k, v)]
                return attend(*turned, packing, *more).flip(0)

            attend = ops.attention
            monkeypatch.setattr(ops, "attention", backwards)
        return model

    there = run_arm(setting("engine_full"), "step\nfinish\n")[1][0]
    monkeypatch.setattr(decoder, "decoder_layer", honest[0])
    monkeypatch.setattr(decoder, "layer_gradient", honest[1])
    monkeypatch.setattr("elo_engine.benchmarks.arm.engine_model", wrong)
    here = run_arm(setting("engine_full"), "step\nfinish\n")[1][0]
    run = one_run({"transformers_full": [1.0] * 5, "engine_full": [1.0] * 5})
    for arm, answer in (("transformers_full", there), ("engine_full", here)):
        run.taken[arm].losses, run.taken[arm].norms = [answer["loss"]], [answer["gradient_norm"]]  # type: ignore[index]
    present = [Contestant(setting("transformers_full")), Contestant(setting("engine_full"))]
    with pytest.raises(FailedError, match="do not compute the same"):
        speedup.check_starts(present, run, "fp32")


def test_which_arms_and_how() -> None:
    size = contestants.Size("cpu", "fp32", 64, state="fp32", memory_bytes=2**40)
    chosen = {one.name: one for one in contestants.choose(MODEL, (0, 3), size, contestants.default_arms("cuda"))}
    assert "need a GPU" in chosen["liger_full"].why_not and not chosen["transformers_full"].why_not
    assert chosen["transformers_full"].setting.recompute == "layer" and chosen["elo_align"].setting.recompute == "none"
    tokens = {one.setting.tokens_per_step for one in chosen.values()}
    assert tokens == {4 * 64}, "every arm is fed the same rows a step"
    small = contestants.Size("cuda", "bf16", 64, memory_bytes=1)
    chosen = {one.name: one for one in contestants.choose(MODEL, (0, 3), small, contestants.parse_arms("g,f"))}
    assert [*chosen] == ["elo_pretrain", "elo_align"] and chosen["elo_align"].setting.recompute == "layer"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: contestants.parse_arms("a,z"), "'z' is no arm"),
        (
            lambda: contestants.choose(MODEL, (0, 3), contestants.Size("cpu", "fp32", 64, align_recompute="yes"), ()),
            "--align-recompute 'yes'",
        ),
        (
            lambda: contestants.choose(MODEL, (0, 3), contestants.Size("cpu", "fp32", 64, rows=3), ("elo_pretrain",)),
            "--elo-micro-batch 4: the 3 rows",
        ),
        (lambda: speedup.measure(speedup.Options("gpt-5"), print), "gpt-5"),
        (
            lambda: speedup.measure(speedup.Options("smollm2-135m", sequence_length=16384), print),
            "has 8192 positions",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_runs(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def test_rows_are_the_same_for_everyone() -> None:
    ids, labels = random_rows(setting("engine_full"))
    again, _ = random_rows(setting("elo_pretrain"))
    assert torch.equal(ids, again) and torch.equal(ids[:, 1:], labels[:, :-1])
