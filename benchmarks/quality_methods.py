"""The methods that `elo bench quality` holds side by side, and how one of them is trained with one seed.

Everything that this engine trains is an ordinary run in a folder of its own (`elo run`, or `elo align` of the source
model for full continual pretraining), and its course is read from that run's metrics; so any configuration is a method.
LoRA and first + last unfrozen train transformers' own model in a plain torch loop, on the same rows with the same
masks, schedule, clipping and AdamW; they are scored by this engine, in the checkpoint's dtype, as the others are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from elo_engine.align import align
from elo_engine.calibrate import calibration_rows
from elo_engine.config import RunConfig
from elo_engine.corpora import open_heldout
from elo_engine.detach import Source, open_source
from elo_engine.errors import UsageError
from elo_engine.evaluate import evaluate_folder
from elo_engine.model.bridge import gaps
from elo_engine.pipeline import evaluate_once, keep_summary, read_results, run_pipeline, start
from elo_engine.run_dir import RunDir
from elo_engine.summary import read_records

Kind = Literal["elo", "whole", "lora", "outer"]
Evaluations = dict[str, dict[str, Any]]  # by language, the fields of `Evaluation`


@dataclass(frozen=True)
class Trial:
    """A departure from a recipe that was tried (`quality_trials.py`).

    Attributes:
        kept: middle layers that stay in the shallow model, frozen; shared: with the weights of one of them.
        states: two: whole-model steps have moments of their own; carried: alignment after ELO pretraining goes on
            with its moments.
        anchor: the share of its way back to the base model that a detached weight goes in every shallow step.
    """

    kept: int = 0
    shared: bool = False
    states: Literal["one", "two", "carried"] = "one"
    anchor: float = 0.0


def kept_layers(count: int, detached: tuple[int, ...]) -> tuple[int, ...]:
    """So many middle layers, evenly spaced between the first and the last detached one."""
    low, high = min(detached), max(detached)
    found = {low + round((high - low) * place / (count + 1)) for place in range(1, count + 1)}
    return tuple(sorted(found - set(detached)))


@dataclass(frozen=True)
class Method:
    """One way to spend tokens.

    Attributes:
        kind: elo: detached layers, then or between them the whole model; whole: the whole model alone; lora, outer:
            adapters, or the detached layers inside the whole model.
        budget: elo: the tokens of both stages; align: those of alignment alone; whole: those of full continual
            pretraining; `scale` of them.
        share: of an elo method's tokens, those that the whole model is fed; None: as the two budgets say.
        overrides: of the configuration, `a.b=c`. trial: of what no configuration has; its shallow tokens are as many as
            cost what those of a recipe with one bridge do.
    """

    letter: str
    name: str
    label: str
    kind: Kind
    budget: Literal["elo", "align", "whole"]
    scale: float = 1.0
    share: float | None = None
    overrides: tuple[str, ...] = ()
    trial: Trial | None = None


METHODS = (
    Method("a", "full_cp", "full continual pretraining", "whole", "whole"),
    Method("b", "full_cp_half", "the same, half the tokens", "whole", "whole", 0.5),
    Method("c", "full_cp_quarter", "the same, a quarter of the tokens", "whole", "whole", 0.25),
    Method("d", "lora", "LoRA on every projection", "lora", "whole"),
    Method("e", "outer_unfrozen", "detached layers unfrozen in the whole model", "outer", "whole"),
    Method("f", "align_alone", "alignment alone", "whole", "align"),
    Method("g", "elo", "ELO, the paper's recipe", "elo", "elo"),
    Method("h", "elo_bridge", "ELO with a linear bridge", "elo", "elo", overrides=("detach.bridge=linear",)),
    Method("i", "elo_interleaved", "ELO with a bridge, alignment interleaved", "elo", "elo",
           overrides=("detach.bridge=linear", "align.when=interleaved")),
    Method("j", "elo_75_25", "ELO, tokens split 75 : 25", "elo", "elo", share=0.25),
    Method("k", "elo_50_50", "ELO, tokens split 50 : 50", "elo", "elo", share=0.5),
)  # fmt: skip
_BRIDGE, _TURNS = "detach.bridge=linear", "align.when=interleaved"
# Beside these, chosen by name or letter alone. What did better than (i) would become a recipe.
TRIALS = (
    Method("l", "kept_one", "(i) with one frozen middle layer", "elo", "elo", overrides=(_BRIDGE, _TURNS),
           trial=Trial(kept=1)),
    Method("m", "kept", "(i) with five frozen middle layers", "elo", "elo", overrides=(_BRIDGE, _TURNS),
           trial=Trial(kept=5)),
    Method("n", "shared", "(i) with one middle layer in five places", "elo", "elo", overrides=(_BRIDGE, _TURNS),
           trial=Trial(kept=5, shared=True)),
    Method("o", "two_states", "(i), whole-model steps with moments of their own", "elo", "elo",
           overrides=(_BRIDGE, _TURNS), trial=Trial(states="two")),
    Method("p", "anchored", "(i), pulled to the base layers", "elo", "elo", overrides=(_BRIDGE, _TURNS),
           trial=Trial(anchor=0.02)),
    Method("q", "carried", "(h), alignment with the moments of ELO pretraining", "elo", "elo", overrides=(_BRIDGE,),
           trial=Trial(states="carried")),
)  # fmt: skip


def choose_methods(wanted: str | None, own: Sequence[str]) -> tuple[Method, ...]:
    """Letters or names (None: all but the trials), and those of one's own: `NAME=key=value,key=value`, an ELO run with
    these overrides; `kind=whole` among them: the whole model alone, with the budget of alignment unless align.tokens is
    set.

    Raises:
        UsageError: one that does not exist, or cannot be read.
    """
    added = tuple(_own(text, letter) for text, letter in zip(own, _more_letters(), strict=False))
    known = {key: one for one in (*METHODS, *TRIALS, *added) for key in (one.letter, one.name)}
    every = (*METHODS, *TRIALS, *added)
    if len({one.name for one in every}) < len(every):
        raise UsageError("--method: every name may be given once, and not that of a method that is there already")
    words = [word.strip() for word in wanted.split(",")] if wanted else [one.name for one in METHODS]
    for word in words:
        if word not in known:
            listed = ", ".join(f"{one.letter} {one.name}" for one in (*METHODS, *TRIALS))
            raise UsageError(f"--methods {word!r}: is none of {listed}; your own is added by --method NAME=key=value")
    return tuple(dict.fromkeys([*(known[word] for word in words), *added]))


def _more_letters() -> Iterator[str]:
    for number in range(1, 1000):
        yield f"x{number}"


def _own(text: str, letter: str) -> Method:
    name, equals, rest = text.partition("=")
    if not equals or not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(f"--method {text!r}: use NAME=key=value,key=value, as in wide=detach.bridge=linear")
    overrides = tuple(_pieces(rest))
    kind: Kind = "whole" if "kind=whole" in overrides else "elo"
    overrides = tuple(one for one in overrides if not one.startswith("kind="))
    label = f"{name.replace('_', ' ')}: {', '.join(overrides) or 'the defaults'}"
    return Method(letter, name, label, kind, "elo" if kind == "elo" else "align", overrides=overrides)


def _pieces(text: str) -> Iterator[str]:
    """Cut at the commas that are outside brackets."""
    depth, piece = 0, ""
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            yield piece
            piece = ""
        else:
            piece += sign
    if piece:
        yield piece


@dataclass(frozen=True)
class Outcome:
    """One method with one seed. Points: tokens fed to the detached layers alone (`shallow`) and to the whole model
    (`whole`), seconds of training until then (evaluation and files left out, the fit of a bridge counted), and the
    whole model's held-out loss (nats/token) and bits per byte by language.
    """

    points: list[dict[str, Any]]
    steps: dict[str, int]  # optimizer steps: shallow, whole
    tokens: dict[str, int]  # shallow, whole, and those that a bridge was fitted to: fit
    seconds: float
    fit_seconds: float
    step_s: dict[str, list[float]]  # shallow, whole

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def base_evaluations(source: Source, config: RunConfig) -> Evaluations:
    """The model before any training, the same for every method and seed."""
    heldout = open_heldout(config, source.folder, source.spec.V)
    found = evaluate_folder(source.folder, heldout, device=source.device, dtype=source.dtype)
    return {language: asdict(result) for language, result in found.items()}


def run_method(method: Method, config: RunConfig, base: Evaluations, lora_rank: int) -> Outcome:
    """Train to the end, from where an earlier start left a run of this engine; a peer and a trial begin again.

    Raises:
        Interrupted: a signal came. FailedError and others: as `run_pipeline` raises them.
    """
    source, kind = open_source(config), method.kind
    if method.trial is not None:
        from elo_engine.benchmarks.quality_trials import TrialRun

        return TrialRun(method.trial, config, source, base).run()
    if kind in ("lora", "outer"):
        from elo_engine.benchmarks.quality_peers import train_peer

        return Outcome(**train_peer(kind, config, source, base, lora_rank))
    with RunDir.obtain(config, resume=True) as run:
        results = read_results(run)
        results["evaluations"].setdefault("base", base)  # scored once for all
        run.write_json("results.json", results)
        if kind == "elo":
            run_pipeline(run, source)
        else:
            start(run, source)
            keep_summary(run, "align", align(run, source))
            evaluate_once(run, source, "aligned", run.folder("model"))
    return course_of(Path(config.output), config, source, kind)


def bits_per_nat(base: Evaluations) -> dict[str, float]:
    """By language, what turns nats a token into bits per byte: the same for every model with this tokenizer."""
    return {language: one["bits_per_byte"] / one["loss_nats"] for language, one in base.items()}


def drop_weights(run: Path) -> None:
    """Leave of a finished run what says how it went: weights, snapshots and optimizer state are let go."""
    for name in ("model", "reattached", "pretrain", "align"):
        shutil.rmtree(run / name, ignore_errors=True)


def course_of(run: Path, config: RunConfig, source: Source, kind: Kind) -> Outcome:
    """The points of a finished run, from its metrics and results; after a resume the last line of a step counts."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["evaluations"]
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    found: dict[tuple[int, int], dict[str, float]] = {}
    at, fit_seconds = {"pretrain": 0, "align": 0}, 0.0
    for record in read_records(run):
        if record.get("event") == "bridge":
            fit_seconds = float(record["seconds"])
        elif "step_s" in record:
            at[record["stage"]] = record["step"]
            steps[record["stage"], record["step"]] = record
        elif record.get("model") == "whole" and "heldout_loss_nats" in record:
            place = found.setdefault((at["pretrain"], at["align"]), {})
            place[record["language"]] = record["heldout_loss_nats"]
    last = {stage: max((n for name, n in steps if name == stage), default=0) for stage in ("pretrain", "align")}
    step_s = {stage: [steps[stage, n]["step_s"] for n in range(1, last[stage] + 1)] for stage in last}
    fitted = bool(gaps(source.spec.layers, source.layers)) and config.detach.bridge != "none" and kind == "elo"
    fit = sum(calibration_rows(config)) * config.data.sequence_length if fitted else 0
    per_byte = bits_per_nat(results["base"])

    def point(moment: str, shallow: int, whole: int, losses: dict[str, float]) -> dict[str, Any]:
        trained = sum(step_s["pretrain"][:shallow]) + sum(step_s["align"][:whole])
        return {
            "moment": moment,
            "shallow": shallow * config.pretrain.tokens_per_step,
            "whole": whole * config.align.tokens_per_step,
            "seconds": trained + (fit_seconds if shallow else 0.0),
            "loss_nats": losses,
            "bits_per_byte": {language: loss * per_byte[language] for language, loss in losses.items()},
        }

    def losses_at(moment: str) -> dict[str, float]:
        return {language: one["loss_nats"] for language, one in results[moment].items()}

    ends = {(0, 0): "base", (last["pretrain"], last["align"]): "aligned"}
    if "reattached" in results and last["pretrain"]:
        ends[last["pretrain"], 0] = "reattached"
    points = [point("training", *place, losses) for place, losses in found.items() if place not in ends]
    points += [point("end" if name == "aligned" else name, *place, losses_at(name)) for place, name in ends.items()]
    points.sort(key=lambda one: (one["seconds"], one["shallow"], one["whole"]))
    end = points[-1]
    return Outcome(
        points, {"shallow": last["pretrain"], "whole": last["align"]},
        {"shallow": end["shallow"], "whole": end["whole"], "fit": fit}, end["seconds"], fit_seconds,
        {"shallow": step_s["pretrain"], "whole": step_s["align"]},
    )  # fmt: skip
