"""The `elo` command: one function per verb, nothing else; `cli_judge.py` and `cli_bench.py` have more of them. Exit
status: 0 ok, 1 failed, 2 usage or configuration, 3 refused, 4 not finite, 130 interrupted after a clean snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elo_engine import __version__, cli_check, cli_judge, console
from elo_engine.cli_bench import benches
from elo_engine.cli_judge import AsJson, Config, Overrides
from elo_engine.command import verb as _verb
from elo_engine.errors import UsageError

if TYPE_CHECKING:
    from elo_engine.config import RunConfig

app = typer.Typer(
    help="Teach a multilingual LLM a new language by training its outer layers (ELO, arXiv 2601.03648).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
patches = typer.Typer(help="What changed between two checkpoints as a small file with hashes.", no_args_is_help=True)
app.add_typer(patches, name="patch")
app.add_typer(benches, name="bench")

DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, show the plan, write nothing")]
Resume = Annotated[
    str,
    typer.Option(
        help="auto: continue the run in the output folder; anyway: also with another configuration, other data or "
        "another version, recorded as not exact; never: refuse if it exists"
    ),
]
HardLinks = Annotated[bool, typer.Option("--hard-links", help="unchanged shards become hard links to the source's")]
Folder = Annotated[str, typer.Argument(help="checkpoint: folder or hub id")]
Patch = Annotated[Path, typer.Argument(help="patch file made by elo patch diff or average")]
FolderOut = Annotated[Path, typer.Option("--out", help="new folder")]
PatchOut = Annotated[Path, typer.Option("--out", help="new patch file")]


def _resume(value: str) -> bool:
    if value not in ("auto", "anyway", "never"):
        raise UsageError(f"--resume {value}: use auto, anyway or never")
    return value != "never"


def _stage(
    config_path: Path, overrides: list[str] | None, resume: str, dry_run: bool, body: Callable[..., Any]
) -> None:
    from elo_engine.config import load_config
    from elo_engine.corpora import require_shards
    from elo_engine.train import world

    if config_path.is_dir():  # a run folder stands for its own configuration, continued
        config = load_config(config_path / "config.resolved.yaml", overrides)
        config = config.model_copy(update={"output": str(config_path)})
        resume = "auto" if resume == "never" else resume
    else:
        config = load_config(config_path, overrides)
    _resume(resume)
    require_shards(config)
    with world.joined(config.device):
        _run_stage(config, resume, dry_run, body)


def _run_stage(config: RunConfig, resume: str, dry_run: bool, body: Callable[..., Any]) -> None:
    from elo_engine.corpora import describe_corpora, make_mixture
    from elo_engine.detach import open_source
    from elo_engine.pipeline import start
    from elo_engine.plan import plan
    from elo_engine.plan_refusals import refusals, require_fit
    from elo_engine.plan_text import describe_plan
    from elo_engine.ranks import obtain_run

    source = open_source(config)
    make_mixture(config, source.folder, source.spec.V)  # every check of the data, before anything is written
    if dry_run:
        found, stage = plan(config, source), None if body.__name__ == "run_pipeline" else body.__name__
        warned = [text for text in found["refusals"] if text not in refusals(found, stage)]
        for line in (*describe_plan(found | {"refusals": warned}), *source.reasons, *describe_corpora(config)):
            console.out.print(line, markup=False)
        require_fit(found, stage)
        return
    with obtain_run(config, _resume(resume), anyway=resume == "anyway") as run:
        if body.__name__ != "run_pipeline":
            start(run, source)
        body(run, source)
        run.status(state="finished", stage=body.__name__)


@app.command()
@_verb
def run(config: Config, overrides: Overrides = None, resume: Resume = "never", dry_run: DryRun = False) -> None:
    """Detach, pretrain, reattach, align, evaluate and report."""
    from elo_engine.pipeline import run_pipeline

    _stage(config, overrides, resume, dry_run, run_pipeline)


@app.command()
@_verb
def pretrain(config: Config, overrides: Overrides = None, resume: Resume = "never", dry_run: DryRun = False) -> None:
    """Train the detached layers (ELO pretraining)."""
    from elo_engine.pretrain import pretrain as body

    _stage(config, overrides, resume, dry_run, body)


@app.command()
@_verb
def reattach(
    run_folder: Annotated[Path, typer.Argument(help="a run folder whose pretraining is finished")],
    hard_links: HardLinks = False,
) -> None:
    """Put the trained layers back into the original checkpoint."""
    from elo_engine.detach import open_source
    from elo_engine.reattach import reattach as body
    from elo_engine.run_dir import RunDir

    with RunDir.open(run_folder) as opened:
        body(opened, open_source(opened.config), hard_links=hard_links or None)
        opened.status(state="finished", stage="reattach")


@app.command()
@_verb
def align(
    config_or_run: Config, overrides: Overrides = None, resume: Resume = "never", dry_run: DryRun = False
) -> None:
    """Train the whole reattached model briefly; without one in the run, that is full continual pretraining."""
    from elo_engine.align import align as body

    _stage(config_or_run, overrides, resume, dry_run, body)


@app.command()
@_verb
def inspect(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="read every byte, check every shape, and hashes where the folder has a COMMIT.json or comes from a "
            "hub",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is: family, layers, ties, bytes per part. Reads headers only."""
    from elo_engine.inspection import describe_inspection, inspect_model

    found = inspect_model(model, verify=verify)
    text = [json.dumps(found, indent=2)] if as_json else describe_inspection(found)
    for line in text:
        console.out.print(line, markup=False)


@app.command()
@_verb
def plan(
    config: Config,
    overrides: Overrides = None,
    shapes: Annotated[
        str | None, typer.Option(help="published shapes by name in place of the checkpoint: llama-3.1-8b and others")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="the card: rtx-4090, 24GB, or auto for the one here")] = None,
    host: Annotated[str | None, typer.Option(help="memory of the host, such as 64GB")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="expect by a matmul timed here, a second or two")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="of torchrun, one a card, on one host")] = None,
    as_json: AsJson = False,
) -> None:
    """Memory by component, FLOPs, time and disk of each stage; refuses what cannot fit and names the levers."""
    from elo_engine.plan import plan_command
    from elo_engine.plan_refusals import require_fit
    from elo_engine.plan_text import show_plan

    found = plan_command(config, overrides, shapes, gpu, host, measure, processes)
    if as_json:
        console.out.print(json.dumps(found, indent=2), markup=False)
    else:
        show_plan(found)
    require_fit(found)


@app.command()
@_verb
def data(
    inputs: Annotated[list[Path], typer.Argument(help="text, jsonl (field `text`) or parquet files")],
    tokenizer: Annotated[str, typer.Option(help="model folder or hub id whose tokenizer is used")],
    out: Annotated[Path, typer.Option(help="folder for the token shards")],
    split_blank_lines: Annotated[bool, typer.Option(help="in text files, a blank line ends a document")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help='jsonl lines {"messages": [...]}: chat template, loss on the assistant alone')
    ] = False,
) -> None:
    """Turn text into token shards, in bounded memory; an interrupted call continues when it is repeated."""
    from elo_engine.checkpoint import resolve_model
    from elo_engine.data import build_tokens

    total = sum(path.stat().st_size for path in inputs if path.is_file())
    with console.progress_bar("data (bytes)", total) as bar:
        manifest = build_tokens(
            inputs,
            resolve_model(tokenizer),
            out,
            split_blank_lines=split_blank_lines,
            chat=chat,
            progress=lambda done, _: bar(done, ""),
        )
    line = f"{out}: {manifest.totals.tokens:,} tokens in {manifest.totals.documents:,} documents"
    if manifest.totals.loss_tokens is not None:
        line += f", {manifest.totals.loss_tokens:,} of them with a loss"
    console.out.print(line, markup=False)


@app.command("chat-vector")
@_verb
def chat_vector(
    base: Annotated[str, typer.Argument(help="folder or hub id of the model that both others were made from")],
    instruct: Annotated[str, typer.Argument(help="its instruction-tuned version")],
    target: Annotated[str, typer.Argument(help="its version that learned a language")],
    out: FolderOut,
    weight: Annotated[float, typer.Option(help="of the difference; any number, negative ones too")] = 1.0,
) -> None:
    """target + weight x (instruct - base), in one streaming pass with constant memory."""
    from elo_engine.chat_vector import chat_vector as body

    console.out.print(body(base, instruct, target, out, weight), markup=False)


app.command("eval")(cli_judge.evaluate)
app.command()(cli_judge.seams)
app.command()(cli_judge.search)
app.command("verify-resume")(cli_check.verify_resume)


@app.command()
@_verb
def profile(
    config: Annotated[str | None, typer.Argument(help="configuration file or run folder; none with --shapes")] = None,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="pretrain or align")] = "pretrain",
    shapes: Annotated[
        str | None, typer.Option(help="random weights of published shapes in place of a configuration: llama-3.1-8b")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="new folder (default: beside the run, or in runs/)")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="tokens a row")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="rows at once")] = None,
    warmup: Annotated[int, typer.Option(min=1, help="steps before the one that is profiled")] = 2,
) -> None:
    """Where the time and the memory of one steady optimizer step go: trace, table, pictures."""
    from elo_engine.profile import profile_command

    lines = profile_command(
        [*([config] if config else []), *(overrides or [])], stage=stage, shapes=shapes, out=out,
        sequence_length=sequence_length, micro_batch=micro_batch, warmup=warmup,
    )  # fmt: skip
    for line in lines:
        console.out.print(line, markup=False)


@patches.command("diff")
@_verb
def patch_diff(
    base: Annotated[str, typer.Argument(help="folder or hub id")],
    changed: Annotated[str, typer.Argument(help="a checkpoint of the same layout")],
    out: PatchOut,
) -> None:
    """The tensors that differ between two checkpoints, as one file."""
    from elo_engine.patch import diff

    console.out.print(diff(base, changed, out), markup=False)


@patches.command("apply")
@_verb
def patch_apply(folder: Folder, patch: Patch, out: FolderOut, hard_links: HardLinks = False) -> None:
    """Base + patch -> the changed checkpoint, checked against the hashes in the patch."""
    from elo_engine.patch import apply

    console.out.print(apply(folder, patch, out, hard_links=hard_links, back=False), markup=False)


@patches.command("revert")
@_verb
def patch_revert(folder: Folder, patch: Patch, out: FolderOut, hard_links: HardLinks = False) -> None:
    """Changed checkpoint - patch -> the base again, byte for byte."""
    from elo_engine.patch import apply

    console.out.print(apply(folder, patch, out, hard_links=hard_links, back=True), markup=False)


@patches.command("verify")
@_verb
def patch_verify(folder: Folder, patch: Patch) -> None:
    """Whether a checkpoint is the base of a patch or its result (exit status 1: neither); reads every byte."""
    from elo_engine.patch import verify

    console.out.print(verify(folder, patch), markup=False)


@patches.command("average")
@_verb
def patch_average(
    base: Annotated[str, typer.Argument(help="folder or hub id of the patches' base")],
    of: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="patches of that base")],
    out: PatchOut,
    weights: Annotated[str | None, typer.Option(help="one a patch, with sum 1, as 0.5,0.5; default: equal")] = None,
) -> None:
    """The average of several checkpoints, from patches to a patch, in bounded memory."""
    from elo_engine.patch import average

    console.out.print(average(base, of, out, weights), markup=False)


@app.command()
@_verb
def doctor(as_json: AsJson = False) -> None:
    """What is installed and used, and why a fast path is off."""
    from elo_engine.doctor import examine

    environment, lines = examine()
    for line in [json.dumps(environment, indent=2)] if as_json else lines:
        console.out.print(line, markup=False)


@app.command()
@_verb
def demo(
    output: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    model: Annotated[str | None, typer.Option(help="your own model in place of SmolLM2-135M")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="LANG=FILE, your own text in place of the Bible; repeat")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="time full continual pretraining in transformers too")] = True,
) -> None:
    """The whole method on a real small model, with a table and a plot at the end."""
    from elo_engine.demo import run_demo

    run_demo(output, model, text or [], baseline)


@app.command()
def version() -> None:
    """Print the version."""
    console.out.print(__version__)


def main() -> None:
    """Entry point of the `elo` script."""
    app()
