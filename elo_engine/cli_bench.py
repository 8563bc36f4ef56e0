"""`elo bench ...`: one function per benchmark, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elo_engine.command import verb

benches = typer.Typer(
    help="Measure speed and memory on this machine, against what you would otherwise run.", no_args_is_help=True
)

Model = Annotated[str, typer.Option(help="shapes by name (random weights), a checkpoint folder or a hub id")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="auto, bf16 or fp32")]
State = Annotated[str | None, typer.Option(help="optimizer state, 8bit or fp32; default: 8bit on a GPU")]
Arms = Annotated[
    str | None, typer.Option(help="letters or names, as a,f,g; default: all that run here, s on a GPU alone")
]
Minutes = Annotated[float, typer.Option(min=0.1, help="begin nothing that would end later")]
Record = Annotated[bool, typer.Option(help="keep a record")]
Records = Annotated[Path | None, typer.Option(help="folder of records; default: benchmarks/records of the source tree")]
AsPytest = Annotated[bool, typer.Option("--pytest", help="each arm alone, under pytest-benchmark; no record")]


@benches.command()
@verb
def speedup(
    model: Model = "llama-3.1-8b",
    device: Device = "auto",
    dtype: Dtype = "auto",
    sequence_length: Annotated[int | None, typer.Option(min=2, help="default: 8192 on a GPU, 512 on a CPU")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows of a step in every arm; default: 4, on a CPU 2")] = None,
    elo_micro_batch: Annotated[int | None, typer.Option(min=1, help="rows at once in ELO pretraining")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="rows at once in the other arms")] = 1,
    state: State = None,
    arms: Arms = None,
    minutes: Minutes = 9.0,
    rounds: Annotated[int, typer.Option(min=1, help="at most")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="timed steps of a visit, where arms do not fit together")] = 3,
    align_recompute: Annotated[
        str, typer.Option(help="what (g) makes again: auto (the least that fits), none, selective or layer")
    ] = "auto",
    streamed_inputs: Annotated[
        str, typer.Option(help="where (s) keeps its layers' inputs: auto (on the device if they fit), device or host")
    ] = "auto",
    fp8: Annotated[str, typer.Option(help="products of (f) with 8-bit operands: none, head or all")] = "none",
    graph: Annotated[str, typer.Option(help="steps of (c), (f) and (g) as CUDA graphs: off or on")] = "off",
    record: Record = True,
    records: Records = None,
) -> None:
    """The pipeline speedup of the paper on this machine: ELO against full continual pretraining, LoRA and others."""
    from elo_engine.bench import speedup as body

    body(
        record, records, arms, model=model, device=device, dtype=dtype, sequence_length=sequence_length, rows=rows,
        elo_micro_batch=elo_micro_batch, micro_batch=micro_batch, state=state, minutes=minutes, rounds=rounds,
        steps=steps, align_recompute=align_recompute, streamed_inputs=streamed_inputs, fp8=fp8, graph=graph,
    )  # fmt: skip


@benches.command()
@verb
def memory(
    model: Model = "llama-3.1-8b",
    device: Device = "auto",
    dtype: Dtype = "auto",
    sequence_lengths: Annotated[str | None, typer.Option(help="as 2048,8192; default: by the device")] = None,
    micro_batches: Annotated[str, typer.Option(help="rows at once, as 1,2,4")] = "1,2,4",
    caps: Annotated[str, typer.Option(help="GiB, as 8,24")] = "8,12,16,24,80",
    state: State = None,
    arms: Arms = None,
    minutes: Minutes = 9.0,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="run nothing; needs no such device")] = False,
    record: Record = True,
    records: Records = None,
) -> None:
    """Peak memory of every arm, predicted and measured, and what fits under a cap."""
    from elo_engine.bench import memory as body

    body(
        record, records, arms, sequence_lengths, micro_batches, caps, model=model, device=device, dtype=dtype,
        state=state, minutes=minutes, predict_only=predict_only,
    )  # fmt: skip


@benches.command()
@verb
def traffic(
    model: Annotated[str, typer.Option(help="shapes by name, a checkpoint folder or a hub id")] = "llama-3.1-8b",
    gpu: Annotated[list[str] | None, typer.Option(help="a card by name; may be given again")] = None,
    tokens_per_step: Annotated[int, typer.Option(min=1, help="of one optimizer step")] = 65536,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="that go through a layer at once")] = 8192,
    link: Annotated[str | None, typer.Option(help="pcie-4-x8, pcie-4-x16 or pcie-5-x16; default: the card's")] = None,
) -> None:
    """Bytes over the link of a training step when layers are streamed, layer-major and otherwise: computed, not
    measured.
    """
    from elo_engine.bench import traffic as body

    body(model, gpu or ["rtx-4060-ti-8gb", "rtx-4090", "h200"], tokens_per_step, micro_batch_tokens, link)


@benches.command()
@verb
def loss(
    config: Annotated[Path | None, typer.Argument(help="configuration file; default: the demo's")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides such as align.tokens=1e6")] = None,
    full_tokens: Annotated[int, typer.Option(min=0, help="of full CP; 0: as many as take as long")] = 0,
    every: Annotated[int, typer.Option(min=1, help="steps from one evaluation to the next")] = 2,
    runs: Annotated[Path | None, typer.Option(help="keep both run folders here")] = None,
    record: Record = True,
    records: Records = None,
) -> None:
    """Held-out loss of the whole model against seconds of training: this method and full continual pretraining."""
    from elo_engine.bench import loss as body

    body(record, records, config, overrides or [], runs, full_tokens=full_tokens, every=every)


@benches.command()
@verb
def quality(
    overrides: Annotated[list[str] | None, typer.Argument(help="of every method, such as data.packing=concat")] = None,
    model: Annotated[str | None, typer.Option(help="checkpoint: folder or hub id; default: the demo's")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="LANG=FILE, documents separated by blank lines; the first is the target")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="letters or names, as a,f,elo; default: all but the trials")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="one more: NAME=key=value,key=value, of the configuration")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="1 to so many")] = 3,
    sequence_length: Annotated[int, typer.Option(min=2)] = 512,
    pretrain_tokens: Annotated[int, typer.Option(min=1, help="of an ELO method, in the detached layers")] = 147_456,
    align_tokens: Annotated[int, typer.Option(min=1, help="of alignment, also alone")] = 16_384,
    whole_tokens: Annotated[int, typer.Option(min=1, help="of full CP, LoRA and unfrozen layers")] = 81_920,
    heldout_tokens: Annotated[int, typer.Option(min=1, help="a language")] = 8192,
    pretrain_step_tokens: Annotated[int, typer.Option(min=1)] = 1536,
    align_step_tokens: Annotated[int, typer.Option(min=1, help="also of the other whole-model methods")] = 512,
    pretrain_lr: Annotated[float, typer.Option()] = 3e-4,
    align_lr: Annotated[float, typer.Option()] = 1.5e-4,
    whole_lr: Annotated[float, typer.Option(help="full CP")] = 1.5e-4,
    lora_lr: Annotated[float, typer.Option()] = 1e-3,
    outer_lr: Annotated[float, typer.Option(help="unfrozen layers")] = 3e-4,
    lora_rank: Annotated[int, typer.Option(min=1)] = 16,
    evaluations: Annotated[int, typer.Option(min=0, help="of the whole model during a run")] = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[int, typer.Option(min=0, help="of a process; 0: as they are")] = 0,
    work: Annotated[Path, typer.Option(help="folder of the runs and of what they found")] = Path("elo-quality"),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on in that folder, also beside other processes that do")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="with --resume: run nothing, show what is there")] = False,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="do not drop models and snapshots")] = False,
    note: Annotated[str, typer.Option(help="kept with the conditions, such as what else the machine did")] = "",
    record: Record = True,
    records: Records = None,
) -> None:
    """Does it teach the language and keep the others: methods side by side, same rows, several seeds, held-out loss."""
    from elo_engine.bench import quality as body

    body(
        record, records, show, text or [], method or [], overrides or [], work=work, model=model, device=device,
        dtype=dtype, sequence_length=sequence_length, seeds=seeds, methods=methods, pretrain_tokens=pretrain_tokens,
        align_tokens=align_tokens, whole_tokens=whole_tokens, heldout_tokens=heldout_tokens,
        pretrain_step_tokens=pretrain_step_tokens, align_step_tokens=align_step_tokens, pretrain_lr=pretrain_lr,
        align_lr=align_lr, whole_lr=whole_lr, lora_lr=lora_lr, outer_lr=outer_lr, lora_rank=lora_rank,
        evaluations=evaluations, threads=threads, resume=resume, keep_weights=keep_weights, note=note,
    )  # fmt: skip


@benches.command()
@verb
def kernels(
    ops: Annotated[list[str] | None, typer.Argument(help="linear_cross_entropy, rms_norm, ...; default: all")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    record: Record = True,
    records: Records = None,
    as_pytest: AsPytest = False,
) -> None:
    """Every op of a step against what it replaces, beside this run's ceilings; the same on a CPU and on a GPU."""
    from elo_engine.bench import kernels as body

    body(ops or [], rounds, record, records, as_pytest)


@benches.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@verb
def loading(context: typer.Context, as_pytest: AsPytest = False) -> None:
    """File to memory of the detached layers against other loaders, cold and warm: --model FOLDER [--preset llama-2b]
    [--device cuda] [--rounds 5] [--records FOLDER] and others; `elo bench loading --model x --help` lists them.
    """
    from elo_engine.bench import loading as body

    body(context.args, as_pytest)


@benches.command()
@verb
def card(
    minutes: Annotated[float, typer.Option(min=0.1, help="for all parts together")] = 10.0,
    only: Annotated[
        str | None, typer.Option(help="of correct,speedup,graph,memory,bias,kernels,compile; default: all")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu with --scale tiny")] = "cuda",
    scale: Annotated[str, typer.Option(help="full, or tiny: a trial, minutes on a CPU")] = "full",
    records: Annotated[
        Path | None,
        typer.Option("--record", "--records", help="folder of records; default: as of the others, of a trial --work"),
    ] = None,
    work: Annotated[Path, typer.Option(help="folder of logs, and of rows as they become known")] = Path("runs/card"),
    finish: Annotated[
        Path | None, typer.Option(help="run nothing: table and record of this run's folder, which was killed")
    ] = None,
) -> None:
    """Every figure that is asked of a GPU and its verdict, within ten minutes; a part that fails costs only itself."""
    from elo_engine.bench import card as body

    body(records, work, finish, minutes=minutes, only=only, device=device, scale=scale)


@benches.command()
@verb
def report(
    records: Records = None,
    check: Annotated[bool, typer.Option("--check", help="change nothing; fail where they differ")] = False,
) -> None:
    """docs/benchmarks.md, its plots and the README's table, made from the records alone."""
    from elo_engine.bench import report as body

    body(records, check)


@benches.command()
@verb
def compare(
    a: Annotated[Path, typer.Argument(help="a record")], b: Annotated[Path, typer.Argument(help="another")]
) -> None:
    """Two records of one theme: which differences are shown, and which are not."""
    from elo_engine.bench import compare as body

    body(a, b)
