"""The parts of `elo bench card` that are its own, as far as they go without a card: their judgements on planted wrongs.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from test_speedup import run_arm, setting

from elo_engine.benchmarks import evidence, first_step, fp8_bias, graph_turns, speedup
from elo_engine.benchmarks.card_report import Cases, leave, refusing
from elo_engine.benchmarks.contestants import Size, choose
from elo_engine.benchmarks.models import open_model
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.model.ops.quantize_fp8 import EMULATE

CPU = torch.device("cpu")


def test_the_bound_is_what_sums_that_are_all_cut_off_do_to_the_loss() -> None:
    """Logits but the target's moved by 2^-13 of their terms' sizes, all one way, in fp64: to first order the bound
    itself; moved by twice that it is beyond.
    """
    hidden_ND, head_VD = fp8_bias.drawn(96, 64, 500, CPU)
    head_VD = (head_VD.float() - head_VD.float().mean(0)).bfloat16()
    labels_N, bound_N = fp8_bias.labels_and_bound(hidden_ND, head_VD)
    logits_NV = hidden_ND.double() @ head_VD.double().T
    sizes_NV = hidden_ND.double().abs() @ head_VD.double().abs().T
    rows = torch.arange(len(labels_N))
    others_NV = torch.ones_like(logits_NV)
    others_NV[rows, labels_N] = 0.0

    def losses(moved: float) -> torch.Tensor:
        z_NV = logits_NV - moved * fp8_bias.KEPT * sizes_NV * others_NV
        return torch.logsumexp(z_NV, 1) - z_NV[rows, labels_N]

    true_N = losses(0.0)
    share = {moved: fp8_bias.compared(losses(moved), true_N, bound_N) for moved in (0.5, 1.0, 1.25)}
    target = float((torch.softmax(logits_NV, 1)[rows, labels_N]).mean())
    # the bound counts the target as one of the others: what that is too much is its own probability
    assert 0.9 - target < share[1.0]["share_of_bound"] <= 1.0 and share[1.0]["mean_difference_nats"] < 0
    assert share[0.5]["share_of_bound"] == pytest.approx(share[1.0]["share_of_bound"] / 2, rel=1e-2)
    assert share[1.25]["share_of_bound"] > 1.0 and share[1.0]["rows_above"] == 0.0
    noise = true_N + 0.01 * torch.randn(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fp8_bias.compared(noise, true_N, bound_N)
    assert abs(found["mean_difference_nats"]) < 4 * found["standard_error_nats"]
    with pytest.raises(FailedError, match="not finite"):
        fp8_bias.compared(true_N * torch.nan, true_N, bound_N)


PLANTED_SUMS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import quick_interpreter
from launching import _round_as_hardware_does
_round_as_hardware_does()
quick_interpreter.install()
import torch
from elo_engine.benchmarks import fp8_bias

found = []
for cut in (0.0, 2.0**-13, 2.0**-11):
    def cut_off(a, b, scale_a, scale_b, *more, out):
        left, right = a.float() * scale_a, b.float() * scale_b
        return out.copy_(left @ right - cut * (left.abs() @ right.abs()))
    torch._scaled_mm = cut_off
    found.append(fp8_bias.measure(64, 128, 24, torch.device("cpu")))
print(json.dumps(found))
"""


def test_sums_that_lean_one_way_are_seen_through_the_kernel(forked: Forked) -> None:
    """The kernel itself, in Triton's interpreter, with planted products: exact ones, ones that are off by as much as
    the bound allows, and by four times that.
    """
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    done = forked(PLANTED_SUMS, Path(__file__).parent, environment=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    exact, cut, more = json.loads(done.stdout.splitlines()[-1])
    assert exact["share_of_bound"] < 0.02 and exact["largest_difference_nats"] < 1e-3
    # so few rows do not even out that a logit is rounded to bf16
    apart = abs(-cut["mean_difference_nats"] - cut["bound_nats"])
    assert apart < 3 * cut["standard_error_nats"] < cut["bound_nats"]
    assert 3.6 < more["share_of_bound"] < 4.2


def test_the_bound_at_the_widths_of_the_8b_is_as_the_page_says() -> None:
    """docs/fp8.md: 0.005 nats for unit variance at D 4096."""
    hidden_ND, head_VD = torch.randn(64, 4096).bfloat16(), (torch.randn(300, 4096) / 64).bfloat16()
    _, bound_N = fp8_bias.labels_and_bound(hidden_ND, head_VD)
    assert float(bound_N.mean()) == pytest.approx(0.005, rel=0.05)


class Outcome:
    """Of a step that never was."""

    def __init__(self, loss: float) -> None:
        self.loss_sum, self.read = loss, False

    @property
    def updated(self) -> bool:
        self.read = True
        return True


def test_a_steps_numbers_are_read_when_the_next_is_launched() -> None:
    """As in training: with one step on its way at most, and every step read once."""
    launched: list[Outcome] = []

    def step(rows: Any, first: bool) -> Outcome:
        assert all(outcome.read for outcome in launched[:-1]) and not (launched and launched[-1].read)
        assert first == (not launched)
        launched.append(Outcome(float(rows)))
        return launched[-1]

    seconds, loss = graph_turns.run_steps(step, [5, 6, 7, 8], CPU, first=True)  # type: ignore[list-item]
    assert len(seconds) == 2 and loss == 8.0 and launched[-1].read


def test_a_step_that_waits_for_the_host_counts_the_hosts_time() -> None:
    def step(rows: Any, first: bool) -> Outcome:
        time.sleep(0.02)  # launching; the device is done at once
        return Outcome(1.0)

    seconds, _ = graph_turns.run_steps(step, [1] * 6, CPU, first=False)  # type: ignore[list-item]
    assert len(seconds) == 4 and min(seconds) >= 0.019


def test_engines_take_turns_and_must_train_alike() -> None:
    turns: list[str] = []

    def engine(name: str, wait: float, drift: float) -> graph_turns.Steps:
        def step(rows: Any, first: bool) -> Outcome:
            turns.append(name)
            time.sleep(wait)
            return Outcome(10.0 - drift * len(turns))

        return step

    batches: Any = [0, 1, 2, 3]
    warmed: list[str] = []
    made = {"launched": engine("launched", 4e-3, 0.0), "graph": engine("graph", 2e-3, 0.0)}
    took = graph_turns.take_turns(made, batches, CPU, 0.0, warmed.append)
    assert warmed == ["launched", "graph"] and [len(seconds) for seconds in took.values()] == [6, 6]
    assert turns[:16] == ["launched"] * 8 + ["graph"] * 8 and sorted(turns[16:24]) == ["graph"] * 4 + ["launched"] * 4
    found = graph_turns.figures("case", took)
    assert 1.3 < found["case, launched over graph"] < 3 and found["case, graph, steps"] == 6
    made["graph"] = engine("graph", 0.0, 0.05)  # parts from the other, step by step
    with pytest.raises(FailedError, match="not the same training"):
        graph_turns.take_turns(made, batches, CPU, 0.0)


def test_an_engine_that_reads_another_steps_rows_is_seen() -> None:
    """The losses of random text are alike, whoever's rows they are of; their sums are not."""
    made = first_step.setting_for("llama-3.1-8b-mini", 512, CPU)
    batches = graph_turns.rows_of_turn(made)

    def engine(late: int) -> graph_turns.Steps:
        given: list[int] = [0]

        def step(rows: Any, first: bool) -> Outcome:
            given.append(rows.tokens_loss)
            return Outcome(11.3 * given[max(0, len(given) - 1 - late)])

        return step

    assert len(graph_turns.take_turns({"launched": engine(0), "graph": engine(0)}, batches, CPU, 0.0)) == 2
    for late in (1, 2, 7):
        with pytest.raises(FailedError, match="not the same training"):
            graph_turns.take_turns({"launched": engine(0), "graph": engine(late)}, batches, CPU, 0.0)


def test_rows_are_cut_into_documents_of_a_texts_lengths() -> None:
    made = first_step.setting_for("llama-3.1-8b-mini", 4096, CPU, rows=2, micro_batches=2)
    rows = [graph_turns.document_rows(made, number) for number in range(4)]
    counts = [len(one.segment_starts) - 1 for one in rows]
    assert len(set(counts)) > 1 and all(4 * 4096 / 1400 < count < 4 * 4096 / 350 for count in counts)
    for one in rows:
        assert one.ids_BT.shape == (4, 4096) and int(one.positions_BT.max()) < graph_turns.LONGEST
        assert set(range(0, 4 * 4096 + 1, 4096)) <= set(one.segment_starts.tolist()), "a document ends with its row"


def test_a_first_step_wants_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert first_step.empty_cache() == tmp_path
    (tmp_path / "kernel.cubin").write_bytes(b"")
    for cache in (str(tmp_path), str(tmp_path / "gone"), ""):
        monkeypatch.setenv("TRITON_CACHE_DIR", cache)
        with pytest.raises(UsageError, match="must name an empty folder"):
            first_step.measure("llama-3.1-8b-mini", 16, CPU)


def test_what_a_part_leaves_is_whole_and_its_refusal_has_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path / "out.json", {"a": 1.0}, {"b": "why"})
    assert json.loads((tmp_path / "out.json").read_text()) == {"figures": {"a": 1.0}, "notes": {"b": "why"}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        leave(tmp_path / "out.json", {"a": float("nan")})
    assert json.loads((tmp_path / "out.json").read_text())["figures"] == {"a": 1.0}
    with pytest.raises(SystemExit) as stop, refusing():
        raise RefusedError("this card has none")
    assert stop.value.code == 3 and capsys.readouterr().out == "error: this card has none\n"


class CompilationError(Exception):
    """As Triton's, which is no RuntimeError."""


def test_a_case_that_fails_is_its_note_and_the_others_go_on(tmp_path: Path) -> None:
    cases = Cases(tmp_path / "out.json")
    for name in ("odd", "large", "small"):
        with cases.case(name, f"{name}, ms"):
            if name == "odd":
                raise CompilationError("a kernel of one case's shapes alone")
            if name == "large":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB\nmore")
            cases.figures["small, ms"] = 2.0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["figures"] == {"small, ms": 2.0}
    assert found["notes"] == {
        "odd, ms": "CompilationError: a kernel of one case's shapes alone",
        "large, ms": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB",
    }
    with pytest.raises(FailedError, match=r"^odd: CompilationError.*; large: OutOfMemoryError"):
        cases.require()
    with pytest.raises(KeyboardInterrupt), cases.case("third", "third, ms"):
        raise KeyboardInterrupt


PLANTED_TESTS = """
import pytest, torch

DEVICE = torch.device("cpu")

@pytest.mark.parametrize("backend", ["interpreter", "cuda"])
def test_kernel(backend): assert backend == "interpreter", "planted"

@pytest.mark.skipif(True, reason="needs a GPU: real widths")
def test_wide(): ...

@pytest.fixture
def gpu(): ...

def test_graphs(gpu): ...

def test_anywhere(): raise AssertionError("not one of a card's")
"""


def test_the_tests_that_need_a_card_are_told_from_the_others(tmp_path: Path, forked: Forked) -> None:
    """Planted: one that fails on a card, one that is skipped, one that passes, and two that any machine could run."""
    (tmp_path / "test_planted.py").write_text(PLANTED_TESTS)
    program = (
        "import sys; from pathlib import Path; from elo_engine.benchmarks.card_tests import run\n"
        "run(Path(sys.argv[1]), [Path(sys.argv[2])])"
    )
    out = tmp_path / "out.json"
    done = forked(program, out, tmp_path / "test_planted.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["figures"] == {"passed": 1.0, "failed": 1.0, "skipped": 1.0}
    assert found["notes"] == {"failed": "test_planted.py::test_kernel[cuda]", "skipped": "needs a GPU: real widths"}


def test_a_file_that_cannot_be_read_is_a_failure_and_the_others_run(tmp_path: Path, forked: Forked) -> None:
    for name, source in (("broken", "import nothing_that_there_is\n"), ("planted", PLANTED_TESTS)):
        (tmp_path / f"test_{name}.py").write_text(source)
    program = (
        "import sys; from pathlib import Path; from elo_engine.benchmarks.card_tests import run\n"
        "run(Path(sys.argv[1]), [Path(sys.argv[2], f'test_{name}.py') for name in ('broken', 'planted')])"
    )
    out = tmp_path / "out.json"
    done = forked(program, out, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["figures"] == {"passed": 1.0, "failed": 2.0, "skipped": 1.0}
    assert "test_broken.py (could not be read)" in found["notes"]["failed"]


def test_an_arm_with_eight_bits_is_one_and_stands_out_of_the_comparison_of_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(EMULATE, "emulated")
    first = {}
    for fp8 in ("none", "all"):
        made = setting("elo_pretrain", dtype="bf16", fp8=fp8)
        found, answers = run_arm(made)
        evidence.require_engagement(made, found)
        first[fp8] = answers[0]["loss"]
    assert first["none"] != first["all"] and first["all"] == pytest.approx(first["none"], rel=0.1)
    size = Size("cpu", "bf16", 32, rows=2, elo_micro_batch=2, memory_bytes=2**40, fp8="head")
    chosen = choose(open_model("llama-3.1-8b-mini"), (0, 31), size, ("elo_pretrain", "elo_align"))
    assert [one.setting.fp8 for one in chosen] == ["head", "none"]
    with pytest.raises(UsageError, match="--fp8 'some'"):
        choose(open_model("llama-3.1-8b-mini"), (0, 31), Size("cpu", "bf16", 32, fp8="some"), ("elo_pretrain",))
    monkeypatch.delenv(EMULATE)
    with pytest.raises(RefusedError, match=r"pretrain\.fp8: head"):
        speedup.measure(speedup.Options("llama-3.1-8b-mini", "cpu", "bf16", 32, fp8="head"), print)
