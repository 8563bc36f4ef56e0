"""What a checkpoint's `config.json` says, as plain data.

One `ModelSpec` describes every supported family; what a family may vary is a field here and a row in `names.py`,
never a class of its own. A field that would change the maths and is not understood is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elo_engine.errors import RefusedError, UsageError

SUPPORTED_FAMILIES = {
    "llama": "Llama 2, 3, 3.1, 3.2, SmolLM2 and others with this architecture",
    "mistral": "Mistral 7B",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base and scaling as in the checkpoint's configuration."""

    theta: float
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)  # of the scaling, for every kind but default


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of a decoder-only transformer; letters as in the shape legend."""

    family: str
    layers: int
    V: int
    D: int
    F: int
    H: int
    K: int
    E: int
    norm_eps: float
    rope: RopeSpec
    tied: bool
    max_positions: int
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # tokens a query sees, itself included; None: all before it

    @property
    def layer_parameters(self) -> int:
        """Trainable parameters of one decoder layer."""
        attention = self.D * self.E * (2 * self.H + 2 * self.K)
        biases = (self.E * (self.H + 2 * self.K) + self.D) * self.attention_bias
        biases += (2 * self.F + self.D) * self.mlp_bias
        return attention + 3 * self.D * self.F + 2 * self.D + biases

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied head counted once."""
        return self.layers * self.layer_parameters + self.V * self.D * (1 if self.tied else 2) + self.D


def _require(config: dict[str, Any], key: str, kind: type = int) -> Any:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise RefusedError(f"config.json: {key} is {value!r}; a {kind.__name__} is needed to know the model's maths")
    return value


def _read_rope(config: dict[str, Any]) -> RopeSpec:
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling: both are in the wild
    new = config.get("rope_parameters")
    old = config.get("rope_scaling")
    scaling = dict(new or old or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    if kind not in ROPE_TYPES:
        raise RefusedError(
            f"config.json: rotary embedding of type {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise RefusedError("config.json: partial_rotary_factor other than 1 is not supported")
    scaling.pop("partial_rotary_factor", None)
    return RopeSpec(theta=theta, kind=kind, parameters={} if kind == "default" else scaling)


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """`config.json` -> ModelSpec.

    Raises:
        RefusedError: a family, an activation, a rotary type or a field that this engine does not do, by name.
    """
    family = config.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        known = "; ".join(f"{name} ({what})" for name, what in SUPPORTED_FAMILIES.items())
        raise RefusedError(f"config.json: model_type {family!r} is not a supported family. Supported: {known}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise RefusedError(f"config.json: hidden_act {activation!r} is not supported for {family} (supported: silu)")
    heads, width = _require(config, "num_attention_heads"), _require(config, "hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    head_width = config.get("head_dim") or width // heads
    if heads % kv_heads:
        raise RefusedError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads")
    window = config.get("sliding_window") if family == "mistral" else None
    return ModelSpec(
        family=family,
        layers=_require(config, "num_hidden_layers"),
        V=_require(config, "vocab_size"),
        D=width,
        F=_require(config, "intermediate_size"),
        H=heads,
        K=kv_heads,
        E=head_width,
        norm_eps=float(_require(config, "rms_norm_eps", float)),
        rope=_read_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings") or 0),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        window=window,
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
