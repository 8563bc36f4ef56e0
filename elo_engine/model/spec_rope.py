"""The rotary embedding that a `config.json` describes, in each of the ways in which files have it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from elo_engine.errors import RefusedError, shown
from elo_engine.model.families import Family
from elo_engine.model.spec_fields import flag, number, positive

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
LONGROPE_FACTORS = ("short_factor", "long_factor")  # of each frequency, in documents within the first length and beyond
_FIRST_LENGTH = "original_max_position_embeddings"
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", _FIRST_LENGTH, "beta_fast", "beta_slow")
_SCALING_OR_ZERO = ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base and scaling as in the checkpoint's configuration.

    share: of a head's width, the part that turns.
    """

    theta: float
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)  # of the scaling, for every kind but default
    share: float = 1.0

    @property
    def short(self) -> int:
        """Of longrope: tokens of the longest document that takes the short factors."""
        return int(self.parameters[_FIRST_LENGTH])


def read_rope(config: dict[str, Any], family: Family, layers: str | None = None) -> RopeSpec:
    """layers: "full_attention" or "sliding_attention" where the two kinds have rotary embeddings of their own."""
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling: both are in the wild
    new, old, theta_key = config.get("rope_parameters"), config.get("rope_scaling"), "rope_theta"
    if layers is not None:
        new = new.get(layers) if isinstance(new, dict) and layers in new else None if layers[0] == "s" else new
        if layers == "sliding_attention":
            old, theta_key = None, "rope_local_base_freq"
    if not isinstance(new or old or {}, dict):
        raise RefusedError(f"config.json: rope_parameters or rope_scaling is {shown(new or old)}; a mapping is needed")
    scaling = dict(new or old or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    kind = family.rope_names.get(kind, kind) if isinstance(kind, str) else kind
    theta = number(scaling.pop("rope_theta", None) or config.get(theta_key) or 10000.0, theta_key)
    if kind not in ROPE_TYPES:
        raise RefusedError(
            f"config.json: rotary embedding of type {shown(kind)} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    share = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not family.partial_rotary:
        raise RefusedError(f"config.json: partial_rotary_factor other than 1 is not supported for {family.what}")
    share = number(share, "partial_rotary_factor")
    if share > 1:
        raise RefusedError(f"config.json: partial_rotary_factor is {share}; more than a whole head cannot turn")
    rope = RopeSpec(theta, kind, {} if kind == "default" else _checked(scaling), share)
    return rope if kind != "longrope" else replace(rope, parameters=_read_longrope(config, scaling))


def _checked(scaling: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a scaling, each of its kind; which of them a type needs is for those who compute with it."""
    for key, value in scaling.items():
        if value is not None and (key in _SCALING or (key in _SCALING_OR_ZERO and value != 0)):
            number(value, f"rope_parameters or rope_scaling: {key}")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise RefusedError(
            f"config.json: low_freq_factor {low} of the rotary scaling is not below high_freq_factor {high}"
        )
    flag(scaling, "truncate")
    return scaling


def _read_longrope(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """The scaling with the length that the model was first trained for, which older files have beside it. How many
    factors there must be `read_spec` knows.
    """
    found = {key: scaling[key] for key in ("factor", "attention_factor") if scaling.get(key) is not None}
    for key, value in found.items():
        number(value, f"{key} of longrope")
    length = config.get(_FIRST_LENGTH, scaling.get(_FIRST_LENGTH))
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length < 1 << 31:
        raise RefusedError(
            f"config.json: {_FIRST_LENGTH} is {shown(length)}; rotary embedding of type longrope needs it"
        )
    if not found:
        positive(config, "max_position_embeddings")
    for key in LONGROPE_FACTORS:
        factors = scaling.get(key)
        if not isinstance(factors, list):
            raise RefusedError(
                f"config.json: {key} is {shown(factors)}; rotary embedding of type longrope needs a list"
            )
        found[key] = [number(factor, f"{key} of longrope") for factor in factors]
    return {_FIRST_LENGTH: length, **found}


def check_longrope(ropes: tuple[RopeSpec, ...], head_width: int) -> None:
    for rope in ropes:
        for key in LONGROPE_FACTORS if rope.kind == "longrope" else ():
            count, wanted = len(rope.parameters[key]), -(-int(head_width * rope.share) // 2)
            if count != wanted:
                raise RefusedError(
                    f"config.json: {key} has {count} entries; rotary embedding of type longrope needs {wanted} where "
                    f"{int(head_width * rope.share)} of a head's {head_width} dimensions turn"
                )
