"""The configuration of a run: strict, frozen, every key documented here and nowhere else twice.

A configuration is YAML. Unknown keys are errors that name the nearest known key; budgets are in tokens and may be
written `1e9`, `2_000_000` or `900M`. Overrides from the command line have the form `pretrain.optimizer.lr=3e-4`.
Features that the file format promises but this version cannot honour are refused here, by name, before any work
starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from elo_engine.errors import UsageError, shown
from elo_engine.strict_yaml import read_yaml

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> Any:
    """`1e9`, `2_000`, `900M` -> int. Raises ValueError when the amount is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, float)):
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([KMGBT]?)\s*", value)
        if match is None:
            raise ValueError(f"{value!r} is not an amount of tokens; write for example 2_000_000, 1e9 or 900M")
        number = float(match.group(1).replace("_", "")) * _SUFFIXES[match.group(2)]
    else:
        number = value
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{value!r} is not a whole number of tokens")
    return int(number)


Count = Annotated[int, BeforeValidator(parse_count), Field(le=1 << 62)]
# YAML reads 1e-4 as text; and neither inf nor nan can be written to config.resolved.yaml and read back
Real = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v), Field(allow_inf_nan=False)]

Master = Literal["none", "24", "32"]
Recompute = Literal["none", "selective", "layer"]
MicroBatch = Annotated[Count, Field(gt=0)] | Literal["auto"]
_OnOff = BeforeValidator(lambda v: ("off", "on")[v] if isinstance(v, bool) else v)  # YAML reads on as true
Graph = Annotated[Literal["auto", "on", "off"], _OnOff]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where the tokens come from and how rows are cut."""

    shards: dict[str, str] = Field(min_length=1)  # language -> folder made by `elo data`
    # by tokens; None: in proportion to each corpus
    mix: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    sequence_length: Annotated[Count, Field(ge=2)] = 8192
    packing: Literal["document", "concat"] = "document"

    @model_validator(mode="after")
    def _same_languages(self) -> DataConfig:
        if self.mix is not None and set(self.mix) != set(self.shards):
            raise ValueError(
                f"data.mix names {sorted(self.mix)} and data.shards {sorted(self.shards)}; they must name the "
                "same languages"
            )
        return self


class DetachConfig(_Section):
    """Which decoder layers are trained; `[first, last]` is the paper's choice (section 3.1)."""

    layers: list[int | str] = Field(default=["first", "last"], min_length=1)
    # linear: a frozen affine map in place of the layers that are missing, fitted before ELO pretraining begins
    bridge: Literal["none", "linear"] = "none"
    # rows of the training mixture, from its first on, that the map is fitted to; the last tenth is held out to test it
    bridge_tokens: Annotated[Count, Field(gt=0)] = 32_768
    # towards the identity, relative to the mean variance of a feature; docs/bridge.md has the default's reason
    ridge: Annotated[Real, Field(ge=0)] = 1e-2


class OptimizerConfig(_Section):
    """AdamW. `state: fp32` keeps fp32 master weights and moments; `state: 8bit` keeps moments of 8 bits and no
    masters, so bf16 weights are rounded at random: 4 bytes of weight and state a parameter in place of 14.
    `master` gives the bf16 weights of `state: 8bit` more bits, so that updates far below their resolution add up: 24
    (one byte a parameter more, rounded at random to 24 bits) or 32 (four bytes more). `state: fp32` has masters of 32
    bits anyway, and in an fp32 model the weight is its own master: there it changes nothing.
    """

    lr: Annotated[Real, Field(gt=0)] = 1e-4
    betas: tuple[Real, Real] = (0.9, 0.95)
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    state: Literal["fp32", "8bit"] = "fp32"
    master: Annotated[Master, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)] = "none"
    clip: Annotated[Real, Field(gt=0)] | None = 1.0  # global gradient norm; null: no clipping

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas {list(value)} must lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def _one_master(self) -> OptimizerConfig:
        if self.state == "fp32" and self.master == "24":
            raise ValueError(
                "master: 24 goes with state: 8bit; state: fp32 has masters of 32 bits, so leave master out, or set "
                "state: 8bit"
            )
        return self

    def kept_master(self, *, bf16: bool) -> Master:
        """What lies beside the leaves of a model that computes in bf16 or in fp32."""
        if not bf16:
            return "none"
        return "32" if self.state == "fp32" else self.master


class ScheduleConfig(_Section):
    """Linear warm-up, then cosine (or constant) decay to `final` x lr."""

    warmup: Annotated[Real, Field(ge=0, lt=1)] = 0.02  # fraction of the stage's steps
    decay: Literal["cosine", "constant"] = "cosine"
    final: Annotated[Real, Field(ge=0, le=1)] = 0.1


class StageConfig(_Section):
    """One training stage. `auto`: what the planner says fits (`fitting.py`), chosen once, when the run starts."""

    tokens: Annotated[Count, Field(gt=0)] = 900_000_000
    tokens_per_step: Annotated[Count, Field(gt=0)] = 262_144
    micro_batch: MicroBatch = 4  # sequences at once
    # made again in the backward pass. selective: the MLP's first product; layer: all but its input, as streamed always
    recompute: Recompute | Literal["auto"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    # a step is one CUDA graph; auto: where it can be, and it says why not elsewhere; docs/step.md on the default
    graph: Graph = "off"

    @property
    def rows_at_once(self) -> int:
        """`micro_batch`, chosen by now."""
        assert self.micro_batch != "auto"
        return self.micro_batch

    @property
    def runs_again(self) -> Recompute:
        """`recompute`, chosen by now."""
        assert self.recompute != "auto"
        return self.recompute


class PretrainConfig(StageConfig):
    """ELO pretraining of the detached layers (paper section 3.2)."""

    # the frozen one of a model with an untied head; host: a GPU is sent each micro-batch's rows of it alone
    embedding: Literal["device", "host"] = "device"
    # products of operands rounded to 8-bit floats, on a card that has them: the frozen head's, or the layers' too
    fp8: Literal["none", "head", "all"] = "none"


class StreamConfig(_Section):
    """How a whole model is trained with a few of its layers on the device (`align.engine: streamed`)."""

    # where weights, optimizer state and waiting gradients are: host memory, or a file without a name beside the output
    store: Literal["auto", "memory", "disk"] = "auto"
    inputs: Literal["auto", "device", "host"] = "auto"  # where the layers' inputs of a step are kept
    # lazy: each layer is updated when the next step brings it, so clipping is by the norm of all gradients, exactly;
    # at_once: as soon as its own gradient is complete, clipped by its own norm, and no gradient waits on the host
    update: Literal["lazy", "at_once"] = "lazy"
    # embedding and head come whole, or in slices no larger than a layer, whose losses and norms add up in another order
    vocabulary: Literal["auto", "whole", "sliced"] = "auto"  # auto: sliced where it does not fit whole

    @model_validator(mode="after")
    def _slices_wait(self) -> StreamConfig:
        if self.vocabulary == "sliced" and self.update == "at_once":
            raise ValueError(
                "vocabulary: sliced goes with update: lazy, since a matrix is clipped by the norm of all its slices; "
                "set update: lazy, or vocabulary: whole"
            )
        return self


class AlignConfig(StageConfig):
    """Whole-model alignment after reattachment (paper section 3.3); the same loop over all layers."""

    tokens: Annotated[Count, Field(gt=0)] = 100_000_000
    micro_batch: MicroBatch = 1
    engine: Literal["auto", "resident", "streamed"] = "auto"  # auto: the planner chooses and says why
    stream: StreamConfig = StreamConfig()
    # after: when ELO pretraining is done (the paper). interleaved: whole-model steps spread evenly through it, so the
    # stages are one; the last step is a whole-model step, and the detached layers have one optimizer state
    when: Literal["after", "interleaved"] = "after"


class EvaluateConfig(_Section):
    """Held-out evaluation while training and between the stages."""

    every: Annotated[Count, Field(ge=0)] = 200  # steps; 0: only between the stages
    # during ELO pretraining score the whole model too, with the layers as they are; the middle ones are streamed
    whole: bool = True
    shards: dict[str, str] = {}
    # about this many a language, in whole batches of some 2048; null: all
    tokens: Annotated[Count, Field(gt=0)] | None = None


class SnapshotConfig(_Section):
    """How often the state of a stage is made durable, and how many snapshots stay."""

    every: Annotated[Count, Field(gt=0)] = 500  # steps
    keep: Annotated[Count, Field(ge=1)] = 3


class RunConfig(_Section):
    """A whole run; see the examples folder for commented files."""

    model: str = Field(min_length=1)
    # branch, tag or commit of a hub id; a run keeps the commit that it was at its start in config.resolved.yaml
    revision: Annotated[str, Field(min_length=1)] | None = None
    output: str = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    kernels: Literal["auto", "reference", "fused"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 42
    # unchanged shards of the output are hard links to the source's: who writes into one writes into the other
    hard_links: bool = False
    data: DataConfig
    detach: DetachConfig = DetachConfig()
    pretrain: PretrainConfig = PretrainConfig()
    align: AlignConfig = AlignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    snapshot: SnapshotConfig = SnapshotConfig()

    @model_validator(mode="after")
    def _steps_are_whole(self) -> RunConfig:
        for name in ("pretrain", "align"):
            stage: StageConfig = getattr(self, name)
            row, step = self.data.sequence_length, stage.tokens_per_step
            if step % row:
                raise ValueError(f"{name}.tokens_per_step {step} is not a multiple of data.sequence_length {row}")
            if stage.tokens < step:
                raise ValueError(f"{name}.tokens {stage.tokens} is less than one step of {name}.tokens_per_step {step}")
            size, most = stage.micro_batch, step // row
            if size != "auto" and size > most:
                raise ValueError(f"{name}.micro_batch {size} is more than the {most} rows of a step")
        return self

    @model_validator(mode="after")
    def _one_state(self) -> RunConfig:
        if self.align.when == "interleaved":
            for key in ("state", "master", "betas"):
                one, other = getattr(self.pretrain.optimizer, key), getattr(self.align.optimizer, key)
                if one != other:
                    raise ValueError(
                        f"align.when: interleaved has one optimizer state for the detached layers, and "
                        f"pretrain.optimizer.{key} is {one} where align.optimizer.{key} is {other}; make them equal, "
                        "or set align.when: after"
                    )
        return self

    def last_step(self, stage: Literal["pretrain", "align"]) -> int:
        """The step whose snapshot is the stage's result: interleaved, alignment counts the steps of both."""
        both = stage == "align" and self.align.when == "interleaved"
        return self.steps(stage) + (self.steps("pretrain") if both else 0)

    def steps(self, stage: Literal["pretrain", "align"]) -> int:
        """Optimizer steps of a stage: the token budget rounded down to whole steps."""
        section: StageConfig = getattr(self, stage)
        return section.tokens // section.tokens_per_step

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as it is written to `config.resolved.yaml`."""
        return str(yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False, allow_unicode=True))


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `path` (without its last part) knows."""
    model: Any = RunConfig
    for part in path[:-1]:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _explain(error: ValidationError, where: str) -> UsageError:
    lines = []
    for item in error.errors():
        path = tuple(item["loc"])
        key = ".".join(str(part) for part in path) or "configuration"
        if item["type"] == "extra_forbidden":
            known = _known_keys(path)
            near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
            hint = f"; the nearest known key is {near[0]!r}" if near else ""
            lines.append(f"{key}: unknown key{hint} (known here: {', '.join(known)})")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing, and it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if item["type"] == "value_error" else f" (got {shown(item['input'])})"
            lines.append(f"{key}: {message}{got}")
    return UsageError(f"{where}: " + "; ".join(lines))


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set one value of a parsed tree, `a.b=c`. Raises UsageError where it cannot be read."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"override {text!r} is not of the form a.b=c, for example pretrain.optimizer.lr=3e-4")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UsageError(f"override {text!r}: {part!r} is a value, not a section")
        node = child
    node[parts[-1]] = read_yaml(value, f"override {shown(text)}")


def make_config(tree: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate a parsed tree. Raises UsageError naming every key that is wrong."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where) from error


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides, validate.

    Raises:
        UsageError: no such file, not YAML, unknown or missing keys, values that cannot be meant.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file; the examples folder holds some to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping of keys at the top, found {type(tree).__name__}")
    for override in overrides or []:
        apply_override(tree, override)
    return make_config(tree, str(path))


# A run folder can be moved, and what is kept where changes no number in fp32; a change of engine in bf16,
# or to slices of the vocabulary, is recorded.
_MAY_CHANGE = (
    "output", "hard_links", "pretrain.graph", "align.graph", "align.engine", "align.stream.store",
    "align.stream.inputs", "align.stream.vocabulary",
)  # fmt: skip
# What no snapshot can be continued with, whoever asks: it holds other tensors.
NEVER_CHANGE = ("detach.layers", "align.when", "pretrain.optimizer.state", "align.optimizer.state")


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys -> values, as JSON has them."""

    def walk(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= walk(value, f"{prefix}.{key}" if prefix else str(key))
        return found

    return walk(config.model_dump(mode="json"))


def _binding(key: str) -> bool:
    return not key.startswith("snapshot.") and key not in _MAY_CHANGE


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, for a resume that must be the same run. `snapshot`, `hard_links`, `output` and
    where alignment keeps the model may change freely.
    """
    left, right = flat(old), flat(new)
    keys = [key for key in (left | right) if left.get(key, ...) != right.get(key, ...)]
    return sorted(filter(_binding, keys))


def digest(config: RunConfig) -> str:
    """A hash of all that `changed_keys` looks at but the model's name, for which a snapshot has the checkpoint."""
    kept = {key: value for key, value in flat(config).items() if _binding(key) and key not in ("model", "revision")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
