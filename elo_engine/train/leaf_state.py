"""The weights and moments of a model's leaves as they go into a snapshot and come out of one.

state fp32: masters and moments in fp32, under the checkpoint's tensor names. state 8bit: moments of 8 bits, and no
masters or those of `optimizer.master`, as fp32 weights: numbers of 24 bits are fp32 numbers whose lowest byte is zero.
Where the tensors lie, on a device or in host memory, does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elo_engine.config import Master
from elo_engine.errors import FailedError, RefusedError
from elo_engine.model import split_weights
from elo_engine.model.decoder import Leaf
from elo_engine.model.ops.adamw import AdamwState

_CODES = "exp_avg_codes."  # only an 8-bit snapshot has such keys
_MASTER = "master"  # bits of the masters; only an 8-bit snapshot with masters has this key


class LeafState:
    """Leaves in the model's order, and AdamW's state of each."""

    def __init__(self, leaves: Sequence[Leaf], state: AdamwState) -> None:
        self._leaves, self._state = leaves, state
        self._eight = state.scales is not None
        self._attempts = 0

    @property
    def state(self) -> AdamwState:
        """AdamW's."""
        return self._state

    @property
    def attempts(self) -> int:
        """Steps taken or skipped."""
        return self._attempts

    @attempts.setter
    def attempts(self, count: int) -> None:
        self._attempts = count

    @property
    def _master(self) -> Master:
        """Of 8-bit state."""
        return "24" if self._state.lows is not None else "none" if self._state.leaves is None else "32"

    @property
    def masters(self) -> Iterator[tuple[Leaf, Tensor]]:
        """Each leaf with the tensor that is updated: its fp32 master, or the leaf itself."""
        return zip(self._leaves, self._state.weights, strict=True)

    @property
    def lower_bits(self) -> list[Tensor]:
        """What 24-bit masters have below their leaves; [] where there are none."""
        return self._state.lows or []

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint names -> the tensors that are updated, as views: fp32 masters, or with 8-bit state and no master
        the leaves, whose bf16 values are all there is. Numbers of 24 bits are made fp32 tensors on the host.
        """
        if self._state.lows is not None:
            found = dict[str, Tensor]()
            for leaf, low in zip(self._leaves, self._state.lows, strict=True):
                for (name, view), (_, lower) in zip(leaf.split(leaf.tensor), leaf.split(low), strict=True):
                    found[name] = split_weights.join(view.detach().cpu(), lower.cpu())
            return found
        return {name: view for leaf, master in self.masters for name, view in leaf.split(master)}

    def moments(self) -> dict[str, Tensor]:
        """What a snapshot needs besides the weights; {} before the first step.

        fp32: `exp_avg.NAME` and `exp_avg_sq.NAME` for every tensor, and `step`.
        8bit: codes and scales whole for each leaf, under its first name: groups of 256 do not end where the checkpoint
        tensors in a leaf do. `names.NAME` has all of the leaf's names, to be compared by `load`; `master` the bits of
        masters, if there are any.
        """
        state, out = self._state, dict[str, Tensor]()
        if self._attempts == 0:
            return out
        out["powers"] = state.powers
        if state.scales is None:
            out["step"] = state.powers[2].reshape(1).float()
            if int(state.powers[2]) != self._attempts:  # steps were skipped; of them all counts what each one draws
                out["attempts"] = torch.tensor([self._attempts])
            for kind, tensors in (("exp_avg", state.exp_avgs), ("exp_avg_sq", state.exp_avg_sqs)):
                for leaf, tensor in zip(self._leaves, tensors, strict=True):
                    out.update({f"{kind}.{name}": view for name, view in leaf.split(tensor)})
            return out
        out["attempts"] = torch.tensor([self._attempts])
        if self._master != "none":
            out[_MASTER] = torch.tensor([int(self._master)])
        for i, leaf in enumerate(self._leaves):
            out[f"names.{leaf.names[0]}"] = _as_bytes(leaf)
            out.update({f"{kind}.{leaf.names[0]}": tensor for kind, tensor in self._coded(i)})
        return out

    def _coded(self, i: int) -> Iterator[tuple[str, Tensor]]:
        """The 8-bit state of one leaf by the kind of its tensors."""
        state = self._state
        assert state.scales is not None
        yield "exp_avg_codes", state.exp_avgs[i]
        yield "exp_avg_sq_codes", state.exp_avg_sqs[i]
        yield "exp_avg_scales", state.scales[0][i]
        yield "exp_avg_sq_scales", state.scales[1][i]

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the weights and moments that a snapshot holds."""
        state = self._state
        scales = [] if state.scales is None else [*state.scales[0], *state.scales[1]]
        tensors = (*state.weights, *state.exp_avgs, *state.exp_avg_sqs, *scales)
        joined = 0 if state.lows is None else 2 * sum(low.numel() for low in state.lows)  # four bytes, not two
        return joined + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over the weights and moments of a snapshot.

        Raises:
            FailedError: a tensor of this model is missing in the snapshot, or packed otherwise.
            RefusedError: the snapshot's moments are of the other format, or its weights have more bits.
        """
        self._require_format(moments)
        with torch.no_grad():
            if self._state.lows is not None:
                self._load_split(weights, self._state.lows)
            for leaf, master in self.masters if self._state.lows is None else ():
                for name, view in leaf.split(master):
                    view.copy_(_of(weights, name))
            for leaf, master in self.masters if self._state.leaves is not None else ():
                leaf.tensor.copy_(master)
            if moments and self._eight:
                self._load_coded(moments)
            elif moments:
                self._load_fp32(moments)

    def _require_format(self, moments: dict[str, Tensor]) -> None:
        found = any(name.startswith(_CODES) for name in moments)
        if moments and found != self._eight:
            there, here = ("8bit", "fp32") if found else ("fp32", "8bit")
            raise RefusedError(
                f"the snapshot's optimizer state is {there} and this run's is {here}; set optimizer.state: {there} to "
                "continue it, or start a new run in another output folder"
            )
        # More bits hold fewer exactly; weights of 8-bit state in fp32 are fp32 whatever the setting.
        saved, mine = (int(moments[_MASTER]) if _MASTER in moments else 0), _bits(self._master)
        if saved > mine and any(leaf.tensor.dtype == torch.bfloat16 for leaf in self._leaves):
            raise RefusedError(
                f"the snapshot's weights have {saved} bits (optimizer.master: {saved}) and this run's are of "
                f"optimizer.master: {self._master}, which cannot hold them; set optimizer.master: {saved} to continue "
                "it, or start a new run in another output folder"
            )

    def _load_split(self, weights: dict[str, Tensor], lows: list[Tensor]) -> None:
        for leaf, low in zip(self._leaves, lows, strict=True):
            for (name, view), (_, lower) in zip(leaf.split(leaf.tensor.detach()), leaf.split(low), strict=True):
                split_weights.split(_of(weights, name), view, lower)

    def _load_fp32(self, moments: dict[str, Tensor]) -> None:
        state = self._state
        updates = int(_of(moments, "step"))
        state.set_count(updates)
        self._attempts = int(moments["attempts"]) if "attempts" in moments else updates
        self._load_powers(moments)
        for kind, tensors in (("exp_avg", state.exp_avgs), ("exp_avg_sq", state.exp_avg_sqs)):
            for leaf, tensor in zip(self._leaves, tensors, strict=True):
                for name, view in leaf.split(tensor):
                    view.copy_(_of(moments, f"{kind}.{name}"))

    def _load_coded(self, moments: dict[str, Tensor]) -> None:
        self._attempts = int(_of(moments, "attempts"))
        self._load_powers(moments)
        for i, leaf in enumerate(self._leaves):
            names = _of(moments, f"names.{leaf.names[0]}")
            if not torch.equal(names, _as_bytes(leaf)):
                raise FailedError(
                    f"the snapshot packs {bytes(names.tolist()).decode().split()} where this model packs "
                    f"{list(leaf.names)}, and 8-bit state cannot be cut; continue with the version that wrote it"
                )
            for kind, tensor in self._coded(i):
                saved = _of(moments, f"{kind}.{leaf.names[0]}")
                if saved.shape != tensor.shape:
                    raise FailedError(
                        f"the snapshot's {kind}.{leaf.names[0]} is {tuple(saved.shape)}, this model's "
                        f"{tuple(tensor.shape)}: it was written for another model"
                    )
                tensor.copy_(saved)

    def _load_powers(self, moments: dict[str, Tensor]) -> None:
        """The products as they stood, since beta^t made anew differs in its last bits; older snapshots have none."""
        if "powers" in moments:
            self._state.powers[:3] = moments["powers"][:3]


def _of(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FailedError(f"the snapshot holds no tensor {name!r}: it was written by a run that trained other layers")
    return tensors[name]


def _bits(master: Master) -> int:
    return 0 if master == "none" else int(master)


def _as_bytes(leaf: Leaf) -> Tensor:
    return torch.tensor(list("\n".join(leaf.names).encode()), dtype=torch.uint8)
