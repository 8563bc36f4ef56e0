"""The hand-off to lm-evaluation-harness (EleutherAI): the command line that runs its benchmarks on an output folder.

The harness is not a dependency and is not run from here. What is written is the form that its versions have had since
0.4: `lm_eval` without a subcommand, which 0.4.13 takes for `lm_eval run`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from elo_engine.checkpoint import COMMIT_NAME, open_checkpoint, resolve_model, verify_commit
from elo_engine.errors import EloError, FailedError, RefusedError, UsageError
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names
from elo_engine.model.full import check_shapes
from elo_engine.model.spec import read_spec

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them is what transformers builds one from
_SPLITS = ",()[]{}'\""  # characters at which the harness cuts or reads the value of a model argument
ENGLISH_TASKS = "arc_easy,hellaswag"  # of the harness; small, and English alone: whether the model kept it


def lm_eval_command(folder: Path, tasks: str, output: Path | None = None) -> str:
    """One line for the shell that evaluates the model in `folder`; the folder is checked by its headers first.

    Args:
        tasks: names of the harness's tasks or groups, separated by commas.
        output: where the harness writes its results. None: RUN/lm-eval for a run's model, else lm-eval/NAME in the
            current folder.

    Raises:
        UsageError: no such folder, or task names that cannot be meant. RefusedError: only some of the model's bytes are
        there, or the folder's path cannot be given to the harness. FailedError: a shard or a tensor is missing or of
        another shape, there is no tokenizer, or the files are not those that were published.
    """
    wanted = [task.strip() for task in tasks.split(",")]
    if any(not task or task.startswith("-") or any(c.isspace() for c in task) for task in wanted):
        raise UsageError(f"--lm-eval {tasks!r}: give names of tasks with commas between them, as in {ENGLISH_TASKS}")
    dtype = _checked(folder)
    shown = str(folder)
    if any(character in shown for character in _SPLITS):
        raise RefusedError(
            f"{folder}: lm_eval cuts its model arguments at {' '.join(_SPLITS)}, so this path cannot be given to it; "
            "move the folder, or make a link to it whose path has none of them"
        )
    if "/" not in shown:
        shown = f"./{shown}"  # a name of digits alone would be read as a number, any other as a hub's
    if output is None:
        of_run = (folder.parent / "config.resolved.yaml").exists()
        output = folder.parent / "lm-eval" if of_run else Path("lm-eval") / folder.name
    return shlex.join([
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={shown},dtype={dtype}", "--tasks", ",".join(wanted),
        "--batch_size", "auto", "--output_path", str(output),
    ])  # fmt: skip


def _checked(folder: Path) -> str:
    """Hold a folder against what a complete checkpoint is; returns its dtype by torch's name, `auto` where there are
    several.
    """
    index = open_checkpoint(folder)
    if index.remote is not None:
        raise RefusedError(
            f"{folder}: only {human_bytes(index.remote.present_bytes)} of this model have been fetched from its hub; "
            f"fetch the rest with elo inspect --verify, or give lm_eval the hub's own name"
        )
    spec = read_spec(index.config)
    check_shapes(index, spec, names.expected_shapes(spec))
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise FailedError(
            f"{folder}: no tokenizer ({', '.join(_TOKENIZERS)}), which lm_eval needs; copy the base model's files to it"
        )
    commit = folder / COMMIT_NAME
    if commit.exists() and not commit.is_symlink():
        verify_commit(folder, deep=False)
    kinds = {entry.torch_dtype for entry in index.entries.values()}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "auto"


def handoff_command(model: str, tasks: str) -> str:
    """`elo eval MODEL --lm-eval TASKS`: as `lm_eval_command`, of a folder or a model of a hub."""
    return lm_eval_command(resolve_model(model), tasks)


def report_section(run: Path) -> list[str]:
    """The lines of `report.md` for the model of a run; none where it has none yet."""
    folder = run / "model"
    if not folder.exists():
        return []
    try:
        command = lm_eval_command(folder, ENGLISH_TASKS)
    except EloError as error:  # a report of a finished run says so and goes on
        return [f"Benchmarks: no command for lm-evaluation-harness: {error}", ""]
    return [
        "Benchmarks: the command that runs lm-evaluation-harness (`pip install 'lm-eval[hf]'`) on this model. These "
        "tasks are English; `lm_eval ls tasks` names those of other languages.",
        "",
        "```",
        command,
        "```",
        "",
    ]
