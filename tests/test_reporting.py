"""docs/benchmarks.md, its pictures and the README's table follow from the records; the committed ones are in step."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from test_compare import SETTINGS, keep, kernels, loss, memory, speedup

from elo_engine.benchmarks import plots
from elo_engine.benchmarks.recording import read_record, read_records, withdraw
from elo_engine.benchmarks.reporting import (
    BEGIN,
    END,
    faults,
    make_report,
    readme_block,
    readme_faults,
    report_command,
)
from elo_engine.benchmarks.schemas import check_result
from elo_engine.benchmarks.tables import cap_name, conditions, memory_tables, number, speedup_tables, times
from elo_engine.errors import FailedError, UsageError

ROOT = Path(__file__).resolve().parents[1]


def at_commit(record: Path, dirty: bool = False) -> Path:
    """The record as a run at a commit would have written it, whatever state this tree is in."""
    config, commit = (json.loads((record / name).read_text()) for name in ("config.json", "COMMIT.json"))
    config["git"] = {"commit": "0" * 40, "dirty": dirty}
    (record / "config.json").write_text(json.dumps(config))
    commit["files"]["config.json"]["sha256"] = hashlib.sha256((record / "config.json").read_bytes()).hexdigest()
    (record / "COMMIT.json").write_text(json.dumps(commit))
    return record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with one record of every theme but two of speedup, one withdrawn, one earlier, and its report."""
    root = tmp_path_factory.mktemp("tree")
    records = root / "benchmarks" / "records"
    (records / "2020-01-01_old_cpu").mkdir(parents=True)
    (records / "2020-01-01_old_cpu" / "README.md").write_text("# What was measured then\n")
    at_commit(keep(records, *speedup(rounds=3)))
    at_commit(keep(records, *speedup(rounds=3, device="cuda", model="imaginary-8b"), name="speedup-8b"))
    for result in (memory(), kernels(), loss()):
        keep(records, result)
    keep(records, {"schema": 1, "theme": "loading", "results": {"model": "tiny"}})
    withdraw(keep(records, *speedup(model="disturbed-1b", rounds=3)), "other work ran beside it")
    (root / "README.md").write_text(f"# Title\n\ntext\n\n{BEGIN}\n{END}\n\nafter\n")
    make_report(records, root / "docs", root / "README.md")
    return root


@pytest.fixture
def tree(finished: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(finished, tmp_path / "tree"))


def report(root: Path, check: bool = True) -> list[str]:
    return make_report(root / "benchmarks" / "records", root / "docs", root / "README.md", check=check)


def test_the_committed_report_is_in_step_with_the_records() -> None:
    found = make_report(ROOT / "benchmarks" / "records", ROOT / "docs", ROOT / "README.md", check=True)
    assert found == [], "run elo bench report"


def test_a_report_that_was_just_made_is_in_step(finished: Path) -> None:
    assert report(finished) == []


def test_every_record_is_on_the_page_and_every_link_leads_somewhere(finished: Path) -> None:
    page = (finished / "docs" / "benchmarks.md").read_text()
    for record in read_records(finished / "benchmarks" / "records"):
        assert record.path.name in page
    links = [(finished / "docs", link) for link in re.findall(r"\]\(([^)]+)\)", page)]
    links += [(finished, link) for link in re.findall(r"\]\(([^)]+)\)", (finished / "README.md").read_text())]
    assert len(links) > 12
    assert [link for start, link in links if not (start / link).exists()] == []
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings == [
        "Speedup", "Memory", "Kernels", "Loading", "Loss against time", "Earlier records", "Withdrawn"
    ]  # fmt: skip


def test_a_withdrawn_record_is_listed_and_feeds_no_table(finished: Path) -> None:
    page = (finished / "docs" / "benchmarks.md").read_text()
    before, _, after = page.partition("## Withdrawn")
    assert "disturbed-1b" not in before and "other work ran beside it" in after
    assert "disturbed-1b" not in (finished / "README.md").read_text()


def test_the_arms_table_has_what_was_measured() -> None:
    result = speedup(device="cuda")[0]
    arm = result["arms"]["lora"]
    arm["memory"] |= {"peak_allocated_bytes": 2**31, "peak_reserved_bytes": 3 * 2**30, "predicted_bytes": 17 * 2**27}
    arm["tokens_per_s"] = {"median": 1234.5, "p10": 1200.0, "p90": 1300.0}
    arm["step_s"] = {"median": 0.5, "p10": 0.45, "p90": 0.6, "count": 9}
    result["pipeline_speedup"]["transformers_full"] |= {"median": 6.514, "low": 6.321, "high": 6.698, "ideal": 5.97}
    pipeline, arms = speedup_tables(result)[1:3]
    assert "| **6.51x (6.32 to 6.70)** | 5.97x |" in pipeline
    (row,) = [line for line in arms.splitlines() if line.startswith("| (d)")]
    assert row.split(" | ")[1:] == [
        "LoRA r16, peft", "1,234 (1,200 to 1,300)", "500 (450 to 600)", "2.00 / 2.70", "40 % (MFU 31 %)",
        "2.0 GiB allocated, 3.0 GiB reserved; predicted 2.1 GiB, ratio 1.062", "0.500 |",
    ]  # fmt: skip
    assert "| (e) | first and last layer unfrozen | failed: out of memory |" in arms
    assert "not here: Liger's kernels need a GPU / CUDA |" in arms, "a bar in a reason would break the table"
    assert all(line.count("|") == 9 for line in arms.splitlines())


def test_resident_memory_is_not_held_against_a_prediction_of_tensors() -> None:
    result = speedup()[0]
    assert "ratio 1.030" in speedup_tables(result)[2]
    for arm in result["arms"].values():
        if "memory" in arm:
            arm["memory"]["tensor_peak_bytes"] = None
    table = speedup_tables(result)[2]
    assert "resident; predicted" in table and "ratio" not in table


def test_the_readme_has_the_newest_record_of_each_model_on_each_device(tree: Path) -> None:
    records = tree / "benchmarks" / "records"
    result, raw = speedup(rounds=3, slower=2.0)
    newest = at_commit(keep(records, result, raw))
    assert any(line.startswith("README.md differs") for line in report(tree))
    assert "README.md" in report(tree, check=False) and report(tree) == []
    readme = (tree / "README.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line[:1] == "|"]
    assert table[0] == ["", "imaginary-8b, rows of 8192, bf16, Imaginary Card",
                        "imaginary-1b, rows of 512, fp32, Imaginary CPU"]  # fmt: skip
    rows = {row[0]: row[1:] for row in table[2:]}
    assert f"({newest.relative_to(tree)}/README.md)" in rows[""][1]
    found = result["pipeline_speedup"]["transformers_full"]
    r = result["stage_ratio"]["transformers_full"]["median"]
    assert rows["**pipeline** over (a) full CP, transformers Trainer"][1] == (
        f"**{found['median']:.2f}x** ({found['low']:.2f} to {found['high']:.2f}, 75 %); ideal 5.25x; r {r:.4f}"
    )
    speed = number(result["arms"]["elo_pretrain"]["tokens_per_s"]["median"])
    assert rows["tokens/s, (f) ELO pretraining, this engine"][1] == speed
    assert rows["tokens/s, (b) full CP, Liger kernels"] == ["not here", "not here"]
    assert rows["tokens/s, (e) first and last layer unfrozen"] == ["failed", "failed"]
    assert len({len(row) for row in table}) == 1, "a row with another number of cells breaks the table"
    assert readme.count("\n* imaginary") == 2 and "sequence length 512" in readme
    assert readme.startswith("# Title\n\ntext\n\n<!--") and readme.endswith(f"{END}\n\nafter\n")


def test_another_dtype_is_a_column_of_its_own(tmp_path: Path) -> None:
    for change in ({}, {"dtype": "bf16"}):
        result, raw = speedup(rounds=3)
        at_commit(keep(tmp_path, result | change, raw))
    heading = readme_block(read_records(tmp_path)[::-1], tmp_path / "README.md").splitlines()[0]
    sizes = ("rows of 512, bf16", "rows of 512, fp32")
    assert heading == "|  | " + " | ".join(f"imaginary-1b, {size}, Imaginary CPU" for size in sizes) + " |"


def test_a_record_that_does_not_stand_for_the_default_stays_out_of_the_readme(tmp_path: Path) -> None:
    def said(change: Any = None, *, rounds: int = 3, dirty: bool = False, **settings: Any) -> list[str]:
        result, raw = speedup(rounds=rounds)
        if change:
            change(result)
        kept = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
        record = read_record(at_commit(keep(tmp_path, result, raw, settings=kept), dirty))
        found = readme_faults(record)
        assert (readme_block([record], tmp_path / "README.md") == "") == bool(found)
        return found

    def failed(result: dict[str, Any]) -> None:
        result["arms"]["engine_full"] |= {"status": "failed", "why": "out of memory"}
        del result["stage_ratio"]["engine_full"], result["pipeline_speedup"]["engine_full"]

    def left_out(result: dict[str, Any]) -> None:
        failed(result)
        del result["arms"]["engine_full"]

    def not_here(result: dict[str, Any]) -> None:
        failed(result)
        result["arms"]["engine_full"]["status"] = "not here"

    assert said() == [] and said(not_here) == []
    assert said(failed) == said(left_out) == ["it has no pipeline speedup over engine_full"]
    assert said(interrupted=True) == ["it was interrupted"]
    assert said(rows_a_step=8) == said(rows_a_step=None) == ["it is not of the default size"]
    assert said(lambda result: result.update(sequence_length=64)) == ["it is not of the default size"]
    assert said(fp8="head") == ["ELO pretraining multiplied 8-bit operands"] and said(fp8="none", graph="off") == []
    assert said(graph="on") == ["steps of this engine's arms were CUDA graphs"]
    assert said(rounds=2) == ["it has 2 rounds of at least 3"]
    assert said(dirty=True) == ["the source tree had changes that are in no commit"]


def test_the_conditions_say_what_decides_a_ratio() -> None:
    result = speedup(device="cuda")[0]
    config = {"created": "2020-01-01T00:00:00Z", "git": None, "settings": SETTINGS | {"rows_a_step": 4}}
    said = conditions(result, config, {})
    for words in ("parameters, random weights)", "4 rows a step, rows a micro-batch: elo_pretrain 4, others 1",
                  "8-bit optimizer state", "checkpointed (activations recomputed): (a), (c), (d);",
                  "arms taking turns side by side"):  # fmt: skip
        assert words in said
    result["ceilings"]["matmul_dtype"] = "bf16"
    assert conditions(result, config, {}) == said
    result["ceilings"]["matmul_dtype"] = "fp32"
    result["arms"]["lora"]["clocks"] = {"sm_mhz": [1, 2]}
    check_result(result, "result.json")
    assert "TFLOP/s of a large matrix product in fp32, " in conditions(result, config, {})
    other = SETTINGS | {"arms_alive_together": False, "state": "fp32", "weights": "of the checkpoint"}
    said = conditions(result, config | {"settings": other}, {})
    for words in ("turns, a process for each visit", "fp32 optimizer state", "parameters, the checkpoint's weights)"):
        assert words in said
    assert "optimizer state" not in conditions(result, config | {"settings": {}}, {})


def test_a_readme_without_a_place_for_the_table(tree: Path) -> None:
    (tree / "README.md").write_text("# Title\n")
    (missing,) = report(tree)
    assert "has no place for the speedup table" in missing and BEGIN in missing
    assert (tree / "README.md").read_text() == "# Title\n"
    assert readme_block([], tree / "README.md") == ""
    empty = tree / "none"
    empty.mkdir()
    (tree / "README.md").write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    make_report(empty, tree / "elsewhere", tree / "README.md")
    assert (tree / "README.md").read_text() == f"a\n{BEGIN}\n{END}\nb\n"


def test_pages_out_of_step_are_seen_and_left_alone(tree: Path) -> None:
    page = tree / "docs" / "benchmarks.md"
    right = page.read_text()
    page.write_text(right.replace("8,530", "9,530", 1) if "8,530" in right else right + "more\n")
    wrong = page.read_text()
    (found,) = report(tree)
    assert found.startswith("benchmarks.md differs in ") and page.read_text() == wrong
    page.unlink()
    assert report(tree) == ["benchmarks.md is missing"]
    assert report(tree, check=False) == ["benchmarks.md"] and page.read_text() == right


def test_pictures_missing_stale_and_left_over_are_seen(tree: Path) -> None:
    folder = tree / "docs" / "plots"
    steps = next(folder.glob("*_speedup_steps.png"))
    shutil.copy(next(folder.glob("*_loss.png")), steps)
    left_over = folder / "gone_steps.png"
    shutil.copy(steps, left_over)
    (folder / "by-hand.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    frontier = next(folder.glob("*_frontier.png"))
    frontier.unlink()
    assert sorted(report(tree)) == sorted(
        [f"plots/{steps.name} is stale", f"plots/{frontier.name} is missing",
         "plots/gone_steps.png belongs to no record"]
    )  # fmt: skip
    report(tree, check=False)
    assert report(tree) == [] and not left_over.exists() and (folder / "by-hand.png").exists()


def test_a_picture_is_made_again_only_when_its_figures_change(tree: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (tree / "docs" / "plots").iterdir()}
    assert report(tree, check=False) == []
    assert {path.name: path.stat().st_mtime_ns for path in (tree / "docs" / "plots").iterdir()} == before
    result = speedup()[0]
    other = json.loads(json.dumps(result))
    other["arms"]["lora"]["step_s"]["p90"] *= 1.001
    assert plots.input_key("steps", result, "c") != plots.input_key("steps", other, "c")
    assert plots.input_key("steps", result, "c") != plots.input_key("steps", result, "d")


def test_pictures_are_opaque_and_know_what_they_show(finished: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    names = sorted(path.name.split("_", 2)[2] for path in (finished / "docs" / "plots").glob("*.png"))
    assert names == [
        "loss_loss.png", "memory_frontier.png", "memory_predicted.png", "speedup-8b_memory.png",
        "speedup-8b_steps.png", "speedup_memory.png", "speedup_steps.png",
    ]  # fmt: skip
    for path in (finished / "docs" / "plots").glob("*.png"):
        pixels = image.imread(path)
        assert pixels.shape[1] > 900 and (pixels.shape[2] == 3 or float(pixels[..., 3].min()) == 1.0), path.name
        assert 0.5 < float(pixels[..., :3].mean()) < 0.99, f"{path.name} is empty or dark"
        assert re.fullmatch("[0-9a-f]{64}", plots.key_in(path) or "")
    assert plots.key_in(finished / "README.md") is None


def test_results_with_little_in_them_are_drawn_or_have_no_picture(tmp_path: Path) -> None:
    result = speedup(rounds=3)[0]
    nothing = {name: arm | {"status": "failed", "why": "x"} for name, arm in result["arms"].items()}
    assert plots.kinds(result | {"arms": nothing}) == []
    alone = result | {"arms": {"elo_pretrain": result["arms"]["elo_pretrain"]}}
    unmeasured = memory()
    for point in unmeasured["points"]:
        point |= {"measured_bytes": None, "measured_what": None, "status": "not run"}
    unmeasured["caps"] = unmeasured["caps"][:1]
    short = loss()
    short["series"] = [{"label": "one", "points": short["series"][0]["points"][:1]}]
    assert plots.kinds(unmeasured) == ["frontier"] and plots.kinds(kernels()) == []
    for case in (alone, unmeasured, short):
        for kind in plots.kinds(case):
            plots.draw(kind, case, "conditions", tmp_path / f"{kind}.png")
            assert plots.key_in(tmp_path / f"{kind}.png") == plots.input_key(kind, case, "conditions")


def test_pictures_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'elo-engine\[bench\]'"):
        plots.draw("steps", speedup()[0], "", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_does_not_follow_from_its_raw_steps_is_seen(tmp_path: Path) -> None:
    def said(change: Any) -> list[str]:
        result, raw = speedup()
        change(result)
        return faults(read_record(keep(tmp_path, result, raw)))

    assert said(lambda result: None) == []
    (step,) = said(lambda result: result["arms"]["lora"]["step_s"].update(median=0.0701, p10=0.0001, p90=9.0))
    assert "lora's median step is 0.0701, and raw.json gives 0.0" in step
    (count,) = said(lambda result: result["arms"]["lora"]["step_s"].update(count=20))
    assert "lora's count of steps is 20, and raw.json gives 21" in count
    (headline,) = said(lambda result: result["pipeline_speedup"]["transformers_full"].update(median=8.0))
    assert "the pipeline speedup over transformers_full is 8, and raw.json gives 7." in headline


def test_the_command_finds_its_places_and_fails_when_out_of_step(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_command(tree / "benchmarks" / "records", check=True)[0].endswith("in step with the records")
    monkeypatch.chdir(tree)
    (tree / "docs" / "benchmarks.md").write_text("by hand\n")
    with pytest.raises(FailedError, match=r"benchmarks.md differs in .* Run elo bench report"):
        report_command(None, check=True)
    assert report_command(None, check=False) == ["benchmarks.md"]
    own = tree / "mine" / "readings"
    own.mkdir(parents=True)
    keep(own, kernels())  # it has no pictures, which take the time
    report_command(own, check=False)
    assert (tree / "mine" / "readings-report" / "benchmarks.md").exists()
    with pytest.raises(UsageError, match="no folder of records"):
        report_command(own / "none", check=True)


def test_numbers_read_well() -> None:
    assert [number(value) for value in (1234.5, 99.96, 99.9, 0.12, 0, 5)] == [
        "1,234", "100", "99.9", "0.120", "0.00", "5.00"
    ]  # fmt: skip
    assert [cap_name(8 * 10**9), cap_name(24 * 2**30), cap_name(1536)] == ["8 GB", "24 GiB", "1.5 KiB"]
    interval = {"median": 2.0, "low": None, "high": None, "confidence": 0.95}
    assert times(interval) == "2.00x (too few rounds for an interval)"
    few = {"median": 6.13, "low": 5.97, "high": 7.09, "confidence": 0.75}
    assert times(few) == "6.13x (5.97 to 7.09, 75 %)" and times(few, header=0.75) == "6.13x (5.97 to 7.09)"


def test_the_header_states_the_confidence_and_cells_what_differs() -> None:
    result = speedup(rounds=5)[0]
    assert "speedup (93.75 % interval)" in speedup_tables(result)[1]
    assert speedup_tables(result)[1].count("%") == 2, "in the header alone"
    result["pipeline_speedup"]["engine_full"]["confidence"] = 0.75
    table = speedup_tables(result)[1].splitlines()
    assert table[0].count("93.75 %") == 2
    assert [line.count(", 75 %)") for line in table[2:]] == [0, 0, 1]


def test_the_memory_tables_keep_what_fits_apart_from_what_does_not() -> None:
    result = memory()
    result["points"][0] |= {"status": "failed", "why": "a | b\nc", "measured_bytes": None, "measured_what": None}
    check_result(result, "result.json")
    assert "| failed: a / b c |  |" in memory_tables(result)[0]
    points, _, caps = memory_tables(memory())
    assert "| out of memory, under a cap of 24 GiB |  |" in points
    assert "| 1.5 GiB (traced tensor bytes) | 1.033 |" in points
    assert "| 8 GiB | transformers_full | - | - | - | - |" in caps and "| 8 GiB | lora | 8 | 4 | 2 | 1 |" in caps
