"""What a checkpoint's `config.json` says, as plain data.

One `ModelSpec` describes every supported family; what a family may vary is a field here and a row in `families.py`,
never a class of its own. A field that would change the maths and is not understood is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from elo_engine.errors import RefusedError, UsageError, shown
from elo_engine.model.families import FAMILIES, REFUSED, Family, HeadNorms, Norms
from elo_engine.model.spec_fields import flag, number, positive, require
from elo_engine.model.spec_rope import RopeSpec, check_longrope, read_rope

__all__ = ["SUPPORTED_FAMILIES", "LayerKind", "ModelSpec", "RopeSpec", "choose_layers", "read_spec"]

SUPPORTED_FAMILIES = {name: family.what for name, family in FAMILIES.items()}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_POSITIONS = "max_position_embeddings"
_BIASES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias")


@dataclass(frozen=True)
class LayerKind:
    """What differs between the layers of one model.

    Attributes:
        window: tokens a query sees, itself included; None: all before it.
        rope: which of the spec's rotary embeddings turns queries and keys; None: they do not turn.
    """

    window: int | None = None
    rope: int | None = 0


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of a decoder-only transformer; letters as in the shape legend.

    Attributes:
        ropes: rotary embeddings that layers choose from. kinds: a layer's by its index in the checkpoint, which it
        keeps when it is detached; one entry where all layers are alike.
        softcap: of the attention's scores. head_softcap: of the logits. score_scale: of the scores, instead of
        1 / sqrt(E). embedding_scale: of embedded tokens, rounded to the compute dtype.
        fused: the checkpoint stores queries, keys and values as one matrix, and gate and up projection as one.
    """

    family: str
    layers: int
    V: int
    D: int
    F: int
    H: int
    K: int
    E: int
    norm_eps: float
    ropes: tuple[RopeSpec, ...]
    tied: bool
    max_positions: int
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Norms = "pre"
    unit_offset: bool = False
    head_norms: HeadNorms | None = None
    fused: bool = False
    softcap: float | None = None
    head_softcap: float | None = None
    score_scale: float | None = None
    embedding_scale: float | None = None

    def kind(self, index: int) -> LayerKind:
        """Of the layer with this index in the checkpoint."""
        return self.kinds[index if len(self.kinds) > 1 else 0]

    @property
    def rope(self) -> RopeSpec:
        """The rotary embedding of the layers that see everything."""
        return self.ropes[0]

    @property
    def windows(self) -> tuple[int, ...]:
        """The different windows of the layers, ascending."""
        return tuple(sorted({kind.window for kind in self.kinds if kind.window is not None}))

    @property
    def scale(self) -> float:
        """Of the attention's scores."""
        return self.E**-0.5 if self.score_scale is None else self.score_scale

    @property
    def norm_sizes(self) -> tuple[int, ...]:
        """Weights of each norm of one decoder layer."""
        heads = {None: (), "head": (self.E, self.E), "all": (self.H * self.E, self.K * self.E)}[self.head_norms]
        return (self.D,) * (4 if self.norms == "both" else 2) + heads

    @property
    def layer_parameters(self) -> int:
        """Trainable parameters of one decoder layer."""
        attention = self.D * self.E * (2 * self.H + 2 * self.K)
        biases = self.E * (self.H + 2 * self.K) * self.qkv_bias + self.D * self.output_bias
        biases += (2 * self.F + self.D) * self.mlp_bias
        return attention + 3 * self.D * self.F + sum(self.norm_sizes) + biases

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        return self.layers * self.layer_parameters + self.V * self.D * (1 if self.tied else 2) + self.D


def _read_eps(config: dict[str, Any]) -> float:
    value: float = require(config, "rms_norm_eps", float)
    if not 0 <= value < 1:
        raise RefusedError(f"config.json: rms_norm_eps is {shown(value)}; a small number is needed")
    return float(value)


def _read_windows(config: dict[str, Any], family: Family, layers: int) -> list[int | None]:
    """By layer; see `families.Windows`."""
    window = config.get("sliding_window")
    if family.windows == "none" or window is None or not flag(config, "use_sliding_window", True):
        return [None] * layers
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise RefusedError(f"config.json: sliding_window is {shown(window)}; a positive number of tokens is needed")
    types = config.get("layer_types")
    if family.windows == "all":
        return [window] * layers
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
            raise RefusedError(
                f"config.json: layer_types is {shown(types)}; for each of the {layers} layers one of "
                f"{', '.join(known)} is needed"
            )
        return [window if kind == "sliding_attention" else None for kind in types]
    if family.windows == "odd ones full":
        return [None if index % 2 else window for index in range(layers)]
    if family.local_rope:
        every = positive(config, "sliding_window_pattern")
        return [None if (index + 1) % every == 0 else window for index in range(layers)]
    first = require(config, "max_window_layers")
    return [window if index >= first else None for index in range(layers)]


def _read_kinds(config: dict[str, Any], family: Family, layers: int) -> tuple[LayerKind, ...]:
    windows = _read_windows(config, family, layers)
    turns = [True] * layers
    if family.rotary_off is not None:
        listed = config.get(family.rotary_off)
        if listed is None:
            every = positive(config, "no_rope_layer_interval")
            listed = [int((index + 1) % every != 0) for index in range(layers)]
        if not isinstance(listed, list) or len(listed) != layers or not all(entry in (0, 1) for entry in listed):
            raise RefusedError(
                f"config.json: {family.rotary_off} is {shown(listed)}; {layers} entries of 0 or 1 are needed"
            )
        turns = [bool(entry) for entry in listed]
    kinds = tuple(
        LayerKind(window, None if not turn else int(family.local_rope and window is not None))
        for window, turn in zip(windows, turns, strict=True)
    )
    return kinds if len(set(kinds)) > 1 else kinds[:1]


def _read_activation(config: dict[str, Any], name: str, family: Family) -> Literal["silu", "gelu_tanh"]:
    key = "hidden_activation" if family.activation == "gelu_tanh" and "hidden_activation" in config else "hidden_act"
    found = config.get(key) or {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[family.activation]
    if _ACTIVATIONS.get(found if isinstance(found, str) else "") != family.activation:
        usual = [known for known, ours in _ACTIVATIONS.items() if ours == family.activation]
        raise RefusedError(
            f"config.json: {key} {shown(found)} is not supported for {name} (supported: {', '.join(usual)})"
        )
    return family.activation


def _refuse_the_unknown(config: dict[str, Any], name: str, family: Family) -> None:
    if config.get("quantization_config") is not None:
        raise RefusedError(
            "config.json: quantization_config: this is a quantised checkpoint, whose weights cannot be trained as they "
            "are; take the model's original checkpoint in bf16, fp16 or fp32"
        )
    for key in _BIASES:
        if config.get(key) and key not in family.biases and not (key == "qkv_bias" and family.qkv_bias):
            raise RefusedError(f"config.json: {key} is {shown(config[key])}; biases are not known of {name}")
    if config.get("use_bidirectional_attention"):
        raise RefusedError("config.json: use_bidirectional_attention: only causal attention is supported")


def _softcap(config: dict[str, Any], family: Family, key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if not family.softcaps:
        raise RefusedError(f"config.json: {key} is {shown(value)}; soft-caps are not known of {family.what}")
    return number(value, key)


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """`config.json` -> ModelSpec.

    Raises:
        RefusedError: a family, an activation, a rotary type or a field that this engine does not do, by name.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        why = REFUSED.get(name, "not a supported family") if isinstance(name, str) else "not a supported family"
        known = "; ".join(f"{name} ({what})" for name, what in SUPPORTED_FAMILIES.items())
        raise RefusedError(
            f"config.json: model_type {shown(name)} is {why}. Supported are dense text decoders: {known}"
        )
    family = FAMILIES[name]
    config = {**family.defaults, **config}
    _refuse_the_unknown(config, name, family)
    for key in family.needs:
        positive(config, key) if key != "query_pre_attn_scalar" else number(config.get(key), key)
    heads, width = positive(config, "num_attention_heads"), positive(config, "hidden_size")
    kv_heads = heads if config.get("num_key_value_heads") is None else positive(config, "num_key_value_heads")
    if config.get("head_dim") is None and width % heads:
        raise RefusedError(f"config.json: hidden_size {width} makes no {heads} heads, and head_dim is missing")
    head_width = width // heads if config.get("head_dim") is None else positive(config, "head_dim")
    if heads % kv_heads:
        raise RefusedError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads")
    layers = positive(config, "num_hidden_layers")
    sides = ("full_attention", "sliding_attention") if family.local_rope else (None,)
    ropes = tuple(read_rope(config, family, side) for side in sides)
    check_longrope(ropes, head_width)
    attention_bias = flag(config, "attention_bias")
    return ModelSpec(
        family=name,
        layers=layers,
        V=positive(config, "vocab_size"),
        D=width,
        F=positive(config, "intermediate_size"),
        H=heads,
        K=kv_heads,
        E=head_width,
        norm_eps=_read_eps(config),
        ropes=ropes,
        tied=flag(config, "tie_word_embeddings"),
        max_positions=positive(config, _POSITIONS) if config.get(_POSITIONS) else 0,
        kinds=_read_kinds(config, family, layers),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
        activation=_read_activation(config, name, family),
        norms=family.norms,
        unit_offset=family.unit_offset,
        head_norms=family.head_norms,
        fused=family.fused,
        softcap=_softcap(config, family, "attn_logit_softcapping"),
        head_softcap=_softcap(config, family, "final_logit_softcapping"),
        score_scale=float(config["query_pre_attn_scalar"]) ** -0.5 if "query_pre_attn_scalar" in family.needs else None,
        embedding_scale=width**0.5 if family.scaled_embedding else None,
    )


def choose_layers(wanted: list[int | str], layers: int) -> tuple[int, ...]:
    """`[first, last]`, ints, negatives and ranges such as `0-1` (both ends in) -> sorted layer indices.

    Raises:
        UsageError: an index outside the model, a range that cannot be read, or nothing left to train.
    """
    chosen: set[int] = set()
    for item in wanted:
        if item == "first":
            span = [0]
        elif item == "last":
            span = [layers - 1]
        elif isinstance(item, int) and not isinstance(item, bool):
            span = [item]
        else:
            text = str(item)
            try:
                if "-" in text.lstrip("-"):
                    start, stop = (int(part) for part in text.split("-"))
                    span = list(range(start, stop + 1))
                else:
                    span = [int(text)]
            except ValueError:
                raise UsageError(
                    f"detach.layers: {item!r} cannot be read; use first, last, an index such as 3 or -1, "
                    "a range such as 0-1 (both ends in)"
                ) from None
        for index in span:
            if not -layers <= index < layers:
                raise UsageError(
                    f"detach.layers: layer {index} does not exist; this model has layers 0 to {layers - 1}"
                )
            chosen.add(index % layers)
    if not chosen:
        raise UsageError(f"detach.layers: {wanted} selects no layer; this model has layers 0 to {layers - 1}")
    return tuple(sorted(chosen))
