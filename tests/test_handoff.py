"""The command line handed to lm-evaluation-harness: what it says, through a shell, and which folders get none."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from elo_engine.checkpoint import publish
from elo_engine.errors import EloError, FailedError, RefusedError, UsageError
from elo_engine.handoff import ENGLISH_TASKS, handoff_command, lm_eval_command, report_section


def arguments(line: str) -> list[str]:
    """What a shell makes of the line."""
    shown = subprocess.run(
        ["/bin/sh", "-c", f"lm_eval() {{ printf '%s\\n' \"$@\"; }}; {line}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return shown.splitlines()


def test_the_line_says_model_dtype_tasks_and_output(tied: Path, untied: Path) -> None:
    line = handoff_command(str(tied), "arc_easy, hellaswag")
    assert arguments(line) == [
        "--model", "hf", "--model_args", f"pretrained={tied},dtype=float32", "--tasks", "arc_easy,hellaswag",
        "--batch_size", "auto", "--output_path", f"lm-eval/{tied.name}",
    ]  # fmt: skip
    assert "\n" not in line and shlex.split(line)[0] == "lm_eval"
    assert f"pretrained={untied},dtype=bfloat16" in arguments(lm_eval_command(untied, "arc_easy"))
    assert arguments(lm_eval_command(tied, "arc_easy", Path("here")))[-1] == "here"


def test_paths_with_what_a_shell_reads_are_quoted(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "a run; echo $HOME & 100%" / "123"))
    (folder.parent / "config.resolved.yaml").write_text("model: x\n")
    found = arguments(lm_eval_command(folder, "arc_easy"))
    assert f"pretrained={folder},dtype=float32" in found and found[-1] == str(folder.parent / "lm-eval")
    monkeypatch.chdir(folder.parent)
    assert "pretrained=./123,dtype=float32" in arguments(lm_eval_command(Path("123"), "arc_easy"))


@pytest.mark.parametrize("name", ["a,b", "a(b", "a{b}", "it's"])
def test_paths_that_the_harness_would_cut_are_refused(tied: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / name))
    with pytest.raises(RefusedError, match="make a link"):
        lm_eval_command(folder, "arc_easy")


@pytest.mark.parametrize("tasks", ["", "arc_easy,", "arc easy", "--limit"])
def test_tasks_that_cannot_be_meant(tied: Path, tasks: str) -> None:
    with pytest.raises(UsageError, match=ENGLISH_TASKS):
        lm_eval_command(tied, tasks)


def test_a_folder_that_is_no_complete_checkpoint_gets_none(untied: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[Path], object]) -> Path:
        folder = Path(shutil.copytree(untied, tmp_path / name))
        change(folder)
        return folder

    def forget_a_layer(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))

    for name, change, fragment in (
        ("shard", lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "missing shard"),
        ("tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        ("layer", forget_a_layer, "model.layers.4"),
    ):
        with pytest.raises(FailedError, match=fragment):
            lm_eval_command(damaged(name, change), "arc_easy")
    with pytest.raises(UsageError, match=r"no config\.json"):
        lm_eval_command(tmp_path, "arc_easy")


def test_a_published_folder_is_held_against_its_commit(tied: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with publish(target, extra={}) as folder:
        for path in tied.iterdir():
            shutil.copy(path, folder / path.name)
    assert lm_eval_command(target, "arc_easy")
    with (target / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(EloError, match=r"tokenizer\.json"):
        lm_eval_command(target, "arc_easy")


def test_the_section_of_a_report(tied: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.resolved.yaml").write_text("model: x\n")
    assert report_section(run) == []
    shutil.copytree(tied, run / "model")
    lines = report_section(run)
    assert lines[2] == "```" and lines[4] == "```" and lines[-1] == ""
    assert f"pretrained={run / 'model'},dtype=float32" in arguments(lines[3])
    (run / "model" / "tokenizer.json").unlink()
    assert "no tokenizer" in "\n".join(report_section(run)), "said, and the report goes on"
