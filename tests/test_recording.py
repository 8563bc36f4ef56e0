"""Records: written whole, never over, strict about what they hold."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import ENVIRONMENT, keep, kernels, loss, memory, speedup

from elo_engine.benchmarks import recording
from elo_engine.benchmarks.recording import new_record, read_record, read_records, withdraw
from elo_engine.benchmarks.schemas import check_result
from elo_engine.errors import FailedError, RefusedError, UsageError


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result, raw = speedup()
    path = keep(tmp_path, result, raw, settings={"rows": 4}, name="speedup-imaginary-1b")
    assert sorted(files_of(path)) == [
        "COMMIT.json", "README.md", "config.json", "environment.json", "raw.json", "result.json"
    ]  # fmt: skip
    assert path.name.endswith("_imaginary_speedup-imaginary-1b") and len(list(tmp_path.iterdir())) == 1
    record = read_record(path)
    assert record.result == json.loads(json.dumps(result)) and record.environment == ENVIRONMENT
    assert record.raw() == json.loads(json.dumps(raw)) and record.theme == "speedup" and record.withdrawn is None
    assert record.config is not None and record.config["settings"] == {"rows": 4} and record.config["schema"] == 1
    readme = (path / "README.md").read_text()
    assert record.title == "Speedup: imaginary-1b on Imaginary CPU" and readme.startswith(f"# {record.title}\n")
    assert "| (f) | ELO pretraining, this engine | " in readme and "too few rounds" not in readme


@pytest.mark.parametrize("make", [memory, kernels, loss], ids=["memory", "kernels", "loss"])
def test_every_theme_is_kept(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    path = keep(tmp_path, make())
    assert read_record(path).result == json.loads(json.dumps(make()))
    assert "|---|" in (path / "README.md").read_text()


def test_loading_is_kept_as_its_benchmark_wrote_it(tmp_path: Path) -> None:
    written = {"model": "llama-2b", "measurements": [{"arm": "engine", "seconds": 0.3}]}
    path = keep(tmp_path, {"schema": 1, "theme": "loading", "results": written})
    found = read_record(path).result
    assert found is not None and found["results"] == written


def test_nothing_is_written_over(tmp_path: Path) -> None:
    first = keep(tmp_path, *speedup())
    before = files_of(first)
    second, third = keep(tmp_path, *speedup()), keep(tmp_path, *speedup())
    assert [second.name, third.name] == [f"{first.name}-2", f"{first.name}-3"]
    assert files_of(first) == before
    assert new_record(tmp_path, "speedup", "imaginary").name == f"{first.name}-4"
    assert [record.path for record in read_records(tmp_path)] == [first, second, third]


def test_a_name_taken_while_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two benchmarks that end in the same second: the second one finds its name gone and takes the next."""
    taken = keep(tmp_path, *speedup())
    before, free = files_of(taken), recording.new_record
    answers = iter([taken])
    monkeypatch.setattr(recording, "new_record", lambda *a: next(answers, None) or free(*a))
    assert keep(tmp_path, *speedup()).name == f"{taken.name}-2"
    assert files_of(taken) == before


@pytest.mark.parametrize("name", ["", "Speed", "a b", "a/b", "..", "-a", "a_b"])
def test_names_that_are_no_part_of_a_records_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a record's name"):
        new_record(tmp_path, name, "h200")
    with pytest.raises(UsageError, match="cannot be part of a record's name"):
        new_record(tmp_path, "speedup", name)


def _extra(result: dict[str, Any]) -> None:
    result["arms"]["lora"]["memory"]["surprise"] = 1


def _missing(result: dict[str, Any]) -> None:
    del result["ceilings"]["copy_bytes_per_s"]


def _text(result: dict[str, Any]) -> None:
    result["split"] = "0.9"


def _stranger(result: dict[str, Any]) -> None:
    result["arms"]["nobody"] = result["arms"]["lora"]


def _half(result: dict[str, Any]) -> None:
    del result["arms"]["lora"]["step_s"]


def _silent(result: dict[str, Any]) -> None:
    result["arms"]["outer_unfrozen"]["why"] = ""


def _upside_down(result: dict[str, Any]) -> None:
    speed = result["arms"]["lora"]["tokens_per_s"]
    speed["p10"], speed["p90"] = speed["p90"], speed["p10"]


def _over_nothing(result: dict[str, Any]) -> None:
    result["pipeline_speedup"]["liger_full"] = result["pipeline_speedup"]["engine_full"]


def _newer(result: dict[str, Any]) -> None:
    result["schema"] = 2


def _unknown(result: dict[str, Any]) -> None:
    result["theme"] = "speed"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_extra, r"arms\.lora\.memory\.surprise: Extra inputs"),
        (_missing, r"ceilings\.copy_bytes_per_s: Field required"),
        (_text, "split: Input should be a valid number"),
        (_stranger, "arms.nobody"),
        (_half, r"arms\.lora: it ran, so it needs step_s"),
        (_silent, "`why` says nothing"),
        (_upside_down, r"arms\.lora\.tokens_per_s: 0 < p10 <= median <= p90"),
        (_over_nothing, r"pipeline_speedup\.liger_full: that arm did not run"),
        (_newer, "schema 2; this version reads 1"),
        (_unknown, "theme 'speed' is none of speedup, memory"),
    ],
)
def test_a_result_that_does_not_fit_is_named_and_not_lost(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], said: str
) -> None:
    result, raw = speedup(rounds=3)
    check_result(result, "here")
    damage(result)
    with pytest.raises(FailedError, match=said) as error:
        keep(tmp_path, result, raw, name="speedup")
    (path,) = tmp_path.iterdir()
    assert str(path) in str(error.value)
    assert json.loads((path / "result.rejected.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((path / "raw.json").read_text()) == json.loads(json.dumps(raw))
    record = read_record(path)
    assert record.theme is None and record.title.startswith("Not a result")


@pytest.mark.parametrize(
    ("raw", "said"),
    [({}, "has no list `rounds`"), ({"rounds": [{"lora": {"seconds": [0.0]}}]}, r"rounds\.0\.lora has no list")],
)
def test_steps_of_another_form_are_refused(tmp_path: Path, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(FailedError, match=said):
        keep(tmp_path, speedup(rounds=3)[0], raw)


@pytest.mark.parametrize("name", ["result.json", "raw.json", "config.json"])
def test_figures_changed_afterwards_are_seen(tmp_path: Path, name: str) -> None:
    path = keep(tmp_path, *speedup(rounds=3))
    text = (path / name).read_text()
    (path / name).write_text(text.replace("1", "2", 1))
    with pytest.raises(FailedError, match="was changed after it was written") as error:
        read_record(path).raw()
    assert name in str(error.value) and "WITHDRAWN.md" in str(error.value)
    (path / name).write_text(text[:50])
    with pytest.raises(FailedError, match="cannot be read"):
        read_record(path).raw()
    (path / name).write_text(text)
    with (path / "README.md").open("a") as readme:
        readme.write("\nWhat was expected before the run.\n")  # prose may be added
    assert read_record(path).raw()


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    result, raw = speedup(rounds=3)
    result["arms"]["lora"]["loss_last"] = float("nan")
    result["arms"]["lora"]["parameters_trained"] = np.int64(7)
    raw["rounds"][0]["lora"]["losses"] = [np.float32(2.5), float("inf")]
    record = read_record(keep(tmp_path, result, raw, settings={"folder": Path("/somewhere/model")}))
    assert record.result is not None and record.config is not None
    assert record.result["arms"]["lora"]["loss_last"] is None
    assert record.result["arms"]["lora"]["parameters_trained"] == 7
    assert record.raw()["rounds"][0]["lora"]["losses"] == [2.5, None]
    result["split"] = float("nan")
    with pytest.raises(FailedError, match="split"):
        keep(tmp_path, result, raw)


def test_a_withdrawn_record_stays_and_says_why(tmp_path: Path) -> None:
    path = keep(tmp_path, *speedup(rounds=3))
    before = files_of(path)
    with pytest.raises(UsageError, match="withdrawn for a reason"):
        withdraw(path, "  ")
    withdraw(path, "the clocks were not fixed")
    reason = read_record(path).withdrawn
    assert reason is not None and reason.endswith(": the clocks were not fixed")
    assert {name: data for name, data in files_of(path).items() if name != "WITHDRAWN.md"} == before
    with pytest.raises(RefusedError, match="exists"):
        withdraw(path, "again")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="not a record"):
        withdraw(tmp_path / "folder", "nothing there")


def test_earlier_records_are_listed_and_never_parsed(tmp_path: Path) -> None:
    (tmp_path / "2020-01-01_old_cpu").mkdir()
    (tmp_path / "2020-01-01_old_cpu" / "README.md").write_text("\n# What was measured then\n\ntext\n")
    (tmp_path / "2020-01-01_old_cpu" / "raw.json").write_text("not JSON at all")
    (tmp_path / "2020-01-02_old_cpu").mkdir()
    (tmp_path / ".unfinished.tmp").mkdir()
    (tmp_path / "README.md").write_text("no record")
    records = read_records(tmp_path)
    assert [(record.theme, record.title) for record in records] == [
        (None, "What was measured then"), (None, "(no README)")
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no folder of records"):
        read_records(tmp_path / "nowhere")


def test_a_records_command_has_no_folders_of_the_machine(tmp_path: Path) -> None:
    command = ["/opt/x/bin/elo", "bench", "--model", "/data/models/tiny", "--records=/data/records", "8e9/2", "a/b"]
    path = keep(tmp_path, *speedup(rounds=3), command=command, settings={"model": "/data/models/tiny", "rows": [1]})
    config = json.loads((path / "config.json").read_text())
    assert config["command"] == ["elo", "bench", "--model", "tiny", "--records=records", "8e9/2", "a/b"]
    assert config["settings"] == {"model": "tiny", "rows": [1]}


def test_the_commit_is_known_and_so_is_a_dirty_tree(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert recording.git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert recording.git_state(tmp_path) == clean
    (tmp_path / "benchmarks" / "records" / "new").mkdir(parents=True)
    (tmp_path / "benchmarks" / "records" / "new" / "result.json").write_text("{}")
    assert recording.git_state(tmp_path) == clean, "a record that was just written does not make the code dirty"
    (tmp_path / "code.py").write_text("a = 2\n")
    assert recording.git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "inside").mkdir()
    assert recording.git_state(tmp_path / "inside") is None, "the repository is somebody else's"


@pytest.mark.parametrize(
    ("gpu", "cpu", "device", "name"),
    [
        ("NVIDIA H200", "AMD EPYC", "auto", "h200"),
        ("NVIDIA GeForce RTX 4090", "AMD EPYC", "cuda", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "AMD EPYC", "cuda", "a100-sxm4-80gb"),
        ("NVIDIA H200", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu", "xeon-platinum-8481c-4core"),
        ("", "AMD EPYC 7763 64-Core Processor", "auto", "epyc-7763-4core"),
        ("", "AMD Ryzen 9 7950X 16-Core Processor", "auto", "ryzen-9-7950x-4core"),
    ],
)
def test_cards_are_named_as_records_name_them(gpu: str, cpu: str, device: str, name: str) -> None:
    environment = {"cpu": cpu, "cpu_cores": 4, "gpus": [{"name": gpu}] if gpu else []}
    assert recording.card_name(device, environment) == name
    new_record(Path("records"), "speedup", name)  # fits a record's name
    assert recording.card_name("cpu").endswith("core")
    if not gpu:
        with pytest.raises(UsageError, match="environment has none"):
            recording.card_name("cuda", environment)


def test_an_interval_from_two_rounds_says_that_there_is_none(tmp_path: Path) -> None:
    path = keep(tmp_path, *speedup(rounds=2))
    assert "too few rounds for an interval" in (path / "README.md").read_text()


def test_the_synthetic_results_are_left_as_they_were() -> None:
    result = speedup()[0]
    before = copy.deepcopy(result)
    check_result(result, "here")
    assert result == before
