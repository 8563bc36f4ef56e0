"""The verbs that judge models and choices, `elo eval`, `elo seams` and `elo search`: one function each, nothing else.
`cli.py` puts them in their places.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from elo_engine import console
from elo_engine.command import verb

Config = Annotated[Path, typer.Argument(help="configuration file (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="overrides such as pretrain.optimizer.lr=3e-4")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@verb
def evaluate(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    more: Annotated[list[Path] | None, typer.Argument(help="further token folders", show_default=False)] = None,
    tokens: Annotated[list[Path] | None, typer.Option("--tokens", help="folders made by elo data")] = None,
    sequence_length: Annotated[int, typer.Option(min=2)] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32")] = "auto",
    engine: Annotated[
        str, typer.Option(help="resident: the whole model on the device; streamed: a few layers at a time; or auto")
    ] = "auto",
    cloze: Annotated[int, typer.Option(min=0, help="so many questions about each text: what follows? (try 200)")] = 0,
    cloze_shape: Annotated[str, typer.Option(help="tokens of context and of continuation, and choices")] = "64,16,4",
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="only print the command of lm-evaluation-harness")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss, perplexity, bits per byte and cloze accuracy of a whole model, per token folder."""
    if lm_eval is not None:
        from elo_engine.handoff import handoff_command

        console.out.print(handoff_command(model, lm_eval), markup=False, emoji=False)
        return
    from elo_engine.evaluate import describe_evaluation, evaluate_command

    found = evaluate_command(
        model, [*(tokens or []), *(more or [])], sequence_length, device, dtype, engine,
        quiet=as_json, cloze=cloze, cloze_shape=cloze_shape,
    )  # fmt: skip
    for line in [json.dumps(found, indent=2)] if as_json else [describe_evaluation(*item) for item in found.items()]:
        console.out.print(line, markup=False)


@verb
def seams(
    run_or_model: Annotated[str, typer.Argument(help="run folder, or a changed model: folder or hub id")],
    base: Annotated[str | None, typer.Option(help="the model it was made from (default: the run's)")] = None,
    tokens: Annotated[list[Path] | None, typer.Option("--tokens", help="held-out folders (default: the run's)")] = None,
    layers: Annotated[str | None, typer.Option(help="detached: first,last or 0-1,28 (default: the run's)")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="default: the run's, else 2048")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="about so many of each text, in whole batches")] = 8192,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda (default: the run's)")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16 or fp32 (default: the run's)")] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="another run; of all of them: do seams predict the aligned loss")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far hidden states have moved from the base model's at each seam: scale, direction, CKA."""
    from elo_engine.seam_prediction import describe_prediction, predict
    from elo_engine.seams import describe_seams, seams_command

    runs = [run_or_model, *(beside or [])]
    found = [
        seams_command(
            one, base, tokens or [], layers=layers, sequence_length=sequence_length, max_tokens=max_tokens,
            device=device, dtype=dtype,
        )
        for one in runs
    ]  # fmt: skip
    lines = [line for one in found for line in describe_seams(one)]
    made: dict[str, Any] = found[0]
    if beside:
        made = predict(list(zip(runs, found, strict=True)))
        lines += describe_prediction(made)
        made |= {"seams": dict(zip(runs, found, strict=True))}
    for line in [json.dumps(made, indent=2)] if as_json else lines:
        console.out.print(line, markup=False)


@verb
def search(
    config: Config,
    overrides: Overrides = None,
    layers: Annotated[
        str | None,
        typer.Option(help='candidates, each as detach.layers: "0,29;0-1;-2,last"; default: at the ends and inside'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="so many, from the configuration's on")] = 3,
    pretrain_tokens: Annotated[str | None, typer.Option(help="of a candidate (default: the configuration's)")] = None,
    align_tokens: Annotated[str | None, typer.Option(help="of an alignment (default: the configuration's)")] = None,
    evaluate_tokens: Annotated[str | None, typer.Option(help="held out, at most so many of each language")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results (default: OUTPUT-search)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on in that folder: what is done stays")] = False,
    as_json: AsJson = False,
) -> None:
    """Which layers to detach: candidates on the same rows, ranked by held-out loss after a short alignment."""
    from elo_engine.search import search_command
    from elo_engine.search_report import describe

    found = search_command(
        config, overrides, layers, seeds, pretrain_tokens, align_tokens, evaluate_tokens, out, resume
    )
    for line in [json.dumps(found, indent=2, ensure_ascii=False)] if as_json else describe(found):
        console.out.print(line, markup=False)
