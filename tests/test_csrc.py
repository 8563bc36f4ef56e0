"""The C++ kernels against exact arithmetic, their checks, and how they live beside torch."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_paths import NATIVE, PATHS

from elo_engine import native
from elo_engine.errors import UsageError
from elo_engine.model import cpu_native

native_only = pytest.mark.skipif(not NATIVE, reason=f"no C++ extension: {cpu_native.CSRC_REASON}")


def _tile(rows: int, cols: int, stride: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, stride, generator=generator)[:, :cols].mul_(4)


@native_only
@pytest.mark.parametrize("path", NATIVE)
def test_exp_is_good_to_two_units_in_the_last_place(path: str) -> None:
    x_1C = torch.cat([torch.linspace(-87.29, 0, 200_001), -torch.logspace(-8, 1.9, 50_000)])[None]
    truth_1C = x_1C.double().exp()
    found_1C = x_1C.clone()
    with cpu_native.using(path):
        cpu_native.softmax_tile(found_1C, torch.tensor([-100]), 0, torch.zeros(1), torch.zeros(1), None)
    unit_1C = torch.exp2(torch.floor(torch.log2(truth_1C)) - 23)
    assert float(((found_1C.double() - truth_1C).abs() / unit_1C).max()) <= 2.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "cols", "stride"), [(1, 1, 1), (3, 7, 7), (5, 33, 40), (17, 64, 64), (33, 131, 150)])
def test_softmax_tile_against_exact_arithmetic(path: str, rows: int, cols: int, stride: int) -> None:
    """Three tiles in a row, so that maxima grow, stay, and rescale the sum and the accumulator."""
    begins = (0, cols, 2 * cols)
    labels_R = torch.randint(-1, 3 * cols, (rows,), generator=torch.Generator().manual_seed(rows))
    labels_R[labels_R < 0] = -100
    tiles = [_tile(rows, cols, stride, seed=begin) for begin in begins]
    whole_RV = torch.cat(tiles, dim=1).double()
    keep_RV = torch.arange(3 * cols)[None] != labels_R[:, None]
    weights_VD = torch.randn(3 * cols, 5, generator=torch.Generator().manual_seed(9))

    max_R, sum_R, acc_RD = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, 5)
    with cpu_native.using(path):
        for begin, tile_RC in zip(begins, tiles, strict=True):
            cpu_native.softmax_tile(tile_RC, labels_R, begin, max_R, sum_R, acc_RD)
            acc_RD += tile_RC @ weights_VD[begin : begin + cols]

    top_R = torch.where(keep_RV, whole_RV, -torch.inf).amax(dim=1)
    exact_RV = torch.where(keep_RV, (whole_RV - top_R[:, None]).exp(), 0.0)
    torch.testing.assert_close(max_R.double(), top_R, rtol=0, atol=0)
    # 2 ulp for each exp, one more for each of two rescalings, and a sum of at most 400 terms in vectors
    torch.testing.assert_close(sum_R.double(), exact_RV.sum(dim=1), rtol=16 * 2.0**-24, atol=0)
    torch.testing.assert_close(
        acc_RD.double(), exact_RV @ weights_VD.double(), rtol=0, atol=float(sum_R.max()) * 2.0**-20
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_number_stays_in_its_row(path: str) -> None:
    tile_RC = torch.zeros(4, 40)
    tile_RC[1, 3] = torch.nan
    tile_RC[2, 39] = torch.inf
    tile_RC[3] = -torch.inf
    max_R, sum_R = torch.full((4,), -torch.inf), torch.zeros(4)
    with cpu_native.using(path):
        cpu_native.softmax_tile(tile_RC, torch.full((4,), -100), 0, max_R, sum_R, None)
    assert float(sum_R[0]) == 40.0
    assert bool(sum_R[1].isnan())
    assert bool(sum_R[2].isnan())
    assert float(sum_R[3]) == 0.0 and float(max_R[3]) == -torch.inf and bool((tile_RC[3] == 0).all())


@native_only
@pytest.mark.parametrize("path", NATIVE)
def test_no_write_beyond_the_tile(path: str) -> None:
    for cols in range(1, 40):
        memory = torch.full((3, 64), 7.0)
        with cpu_native.using(path):
            labels_R = torch.tensor([cols, -100, cols + 1])  # the first column of the next tile is nobody's here
            cpu_native.softmax_tile(memory[:, :cols], labels_R, 0, torch.full((3,), -torch.inf), torch.zeros(3), None)
        assert bool((memory[:, :cols] == 1).all()) and bool((memory[:, cols:] == 7).all()), cols


@native_only
def test_the_extension_checks_what_would_crash() -> None:
    native = cpu_native._csrc
    assert native is not None
    x = torch.zeros(64)
    address, labels = x.data_ptr(), torch.zeros(4, dtype=torch.int64).data_ptr()
    tile = (address, 4, 16, 16, labels, 0, address, address, 0, 0, 0, "auto")
    for position, value in [
        (0, 0),
        (0, address + 1),
        (1, -1),
        (1, 1 << 60),
        (2, 17),
        (2, -1),
        (4, 0),
        (5, -1),
        (6, 0),
        (9, 1),
    ]:
        with pytest.raises(ValueError, match=r"tile|null|aligned|overflows|accumulator"):
            native.softmax_tile(*tile[:position], value, *tile[position + 1 :])
    with pytest.raises(ValueError, match="instruction set"):
        native.softmax_tile(*tile[:-1], "sse9")
    head = (address, address, labels, 1, 32, 1, address, address, 0, "auto")
    for position, value in [
        (0, 0), (1, 0), (1, address + 2), (2, 0), (3, -1), (3, 1 << 60), (4, 16), (4, 33), (4, -32), (5, 0),
        (5, 1 << 60), (6, 0), (7, 0), (8, 2),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"head|null|aligned|overflows"):
            native.frozen_head(*head[:position], value, *head[position + 1 :])
    attention = (address, address, address, 8, 4, 4, 2, 2, 1, 4, 1.0, address, address, [0, 2], "auto")
    for place, wrong in [
        (0, 0), (3, 7), (4, 3), (6, -1), (6, 3), (6, 1 << 61), (7, 3), (7, 0), (8, 0), (9, 0), (9, 1 << 40), (11, 0),
        (13, [0]), (13, [1, 2]), (13, [0, 0, 2]), (13, [0, 3, 2]), (13, []),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"attention|null|overflows"):
            native.attention_forward(*attention[:place], wrong, *attention[place + 1 :])


def test_the_wrapper_checks_layout_and_dtype() -> None:
    if not NATIVE:
        pytest.skip(cpu_native.CSRC_REASON)
    good = [torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), 0, torch.zeros(4), torch.zeros(4), torch.zeros(4, 8)]
    bad = {
        0: [torch.zeros(8, 4).t(), torch.zeros(4, 8, dtype=torch.float64), torch.zeros(1, 8).expand(4, 8)],
        1: [torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)],
        3: [torch.zeros(3), torch.zeros(8)[::2]],
        5: [torch.zeros(5, 8), torch.zeros(8, 4).t()],
    }
    cpu_native.softmax_tile(*good)  # type: ignore[arg-type]
    for place, wrongs in bad.items():
        for wrong in wrongs:
            with pytest.raises(AssertionError):
                cpu_native.softmax_tile(*good[:place], wrong, *good[place + 1 :])  # type: ignore[arg-type]


def test_a_forced_choice_that_cannot_be_honoured_fails() -> None:
    with pytest.raises(UsageError, match="sse9"), cpu_native.using("sse9"):
        pass
    with cpu_native.using("torch"):
        assert cpu_native.instruction_set() == "torch"
    for name in NATIVE:
        with cpu_native.using(name):
            assert cpu_native.instruction_set() == name
    assert cpu_native.instruction_set() == (NATIVE[-1] if NATIVE else "torch")


def test_an_extension_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", -1)
    module, reason = native.load()
    assert module is None
    assert "reinstall" in reason or "does not load" in reason


@native_only
def test_one_openmp_runtime_serves_torch_and_the_extension() -> None:
    code = (
        "import elo_engine.model.cpu as cpu, torch\n"
        "assert cpu.HAS_CSRC\n"
        "cpu.attention(*torch.zeros(3, 8, 2, 4), [0, 8], 1.0)\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}), sep='\\n')\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    bundled = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    if bundled:
        assert out.split() == [str(path.resolve()) for path in bundled]
    else:
        assert len(out.split()) <= 1, out


@native_only
def test_other_python_threads_run_meanwhile() -> None:
    q_NHE = torch.zeros(3072, 4, 64)
    q_NHE[0] = 1
    span: list[float] = []

    def work() -> None:
        torch.set_num_threads(1)
        span.append(time.perf_counter())
        cpu_native.attention_forward(q_NHE, q_NHE, q_NHE, [0, 3072], 0.1)
        span.append(time.perf_counter())

    threads, ticks = torch.get_num_threads(), []
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    torch.set_num_threads(threads)
    margin = (span[1] - span[0]) / 10
    assert any(span[0] + margin < tick < span[1] - margin for tick in ticks), "the call held the interpreter's lock"
