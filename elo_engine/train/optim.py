"""AdamW (Loshchilov and Hutter 2019) over a model's leaves: what is a weight, where gradients add up, what is saved.

state fp32: masters and moments in fp32. Where the model computes in fp32 its leaves are the masters; where it computes
in bf16 the masters are copies, and the leaves are rewritten after the update.
state 8bit: moments of 8 bits and no masters; the leaf is the weight, and a bf16 leaf is rounded at random.

The gradient of a step adds up in fp32. With a single micro-batch a bf16 gradient is used as it came: it is set aside,
and widened only when a second one arrives. The update itself is elo_engine.model.ops.adamw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.errors import FailedError, RefusedError
from elo_engine.model.decoder import Decoder, Leaf
from elo_engine.model.ops.adamw import AdamwState, StepResult, adamw_step
from elo_engine.model.reference_adamw import step_key

_CODES = "exp_avg_codes."  # only an 8-bit snapshot has such keys


class MasterAdamW:
    """The optimizer of one stage; moments live under the checkpoint's tensor names when they are saved.

    Args:
        model: its leaves are trained; frozen tensors get nothing.
        config: AdamW's numbers, and `state`.
        seed: of the random rounding in 8-bit state; equal seeds draw equal numbers at equal steps.
    """

    def __init__(self, model: Decoder, config: OptimizerConfig, seed: int = 42) -> None:
        self._leaves = model.leaves
        self._config = config
        self._seed = seed
        self._attempts = 0  # steps taken or skipped
        self._eight = config.state == "8bit"
        self._mixed = model.dtype != torch.float32
        tensors = [leaf.tensor.detach() for leaf in self._leaves]
        copies = tensors if self._mixed and not self._eight else None
        # detach() shares the storage: an update in place is seen by the model.
        weights = tensors if copies is None else [tensor.float() for tensor in tensors]
        self._state = AdamwState.zeros(weights, copies, config.betas, bits=8 if self._eight else 32)
        self._aside: list[Tensor | None] = [None] * len(self._leaves)
        if self._mixed:
            for i, leaf in enumerate(self._leaves):
                leaf.tensor.register_post_accumulate_grad_hook(_set_aside(self._aside, i))

    @property
    def masters(self) -> Iterator[tuple[Leaf, Tensor]]:
        """Each leaf with the tensor that is updated: its fp32 master, or the leaf itself."""
        return zip(self._leaves, self._state.weights, strict=True)

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward pass allocates them where it needs them."""
        for i, leaf in enumerate(self._leaves):
            leaf.tensor.grad = self._aside[i] = None

    def _gradients(self) -> list[Tensor | None]:
        """One a leaf, as they came, but of one type: fp32 if any is."""
        grads = self._aside if self._mixed else [leaf.tensor.grad for leaf in self._leaves]
        if len({grad.dtype for grad in grads if grad is not None}) > 1:
            return [None if grad is None else grad.float() for grad in grads]
        return list(grads)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Checkpoint name -> accumulated gradient of the step so far, in the type it has (None: none has arrived)."""
        for leaf, grad in zip(self._leaves, self._gradients(), strict=True):
            if grad is None:
                for name in leaf.names:
                    yield name, None
            else:
                yield from leaf.split(grad)

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update; on a GPU the host does not wait. Returns the norm before clipping and
        whether it was finite, as scalars on the device; if it was not, nothing was changed.
        """
        config = self._config
        key = step_key(self._seed, self._attempts) if self._eight else 0
        self._attempts += 1
        return adamw_step(
            self._state,
            self._gradients(),
            lr=lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            key=key,
        )

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint names -> the tensors that are updated, as views: fp32 masters, or with 8-bit state the leaves,
        whose bf16 values are all there is.
        """
        return {name: view for leaf, master in self.masters for name, view in leaf.split(master)}

    def moments(self) -> dict[str, Tensor]:
        """What a snapshot needs besides the weights; {} before the first step.

        fp32: `exp_avg.NAME` and `exp_avg_sq.NAME` for every tensor, and `step`.
        8bit: codes and scales whole for each leaf, under its first name: groups of 256 do not end where the checkpoint
        tensors in a leaf do. `names.NAME` has all of the leaf's names, to be compared by `load`.
        """
        state, out = self._state, dict[str, Tensor]()
        if self._attempts == 0:
            return out
        out["powers"] = state.powers
        if state.scales is None:
            out["step"] = state.powers[2].reshape(1).float()
            for kind, tensors in (("exp_avg", state.exp_avgs), ("exp_avg_sq", state.exp_avg_sqs)):
                for leaf, tensor in zip(self._leaves, tensors, strict=True):
                    out.update({f"{kind}.{name}": view for name, view in leaf.split(tensor)})
            return out
        out["attempts"] = torch.tensor([self._attempts])
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
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over the weights and moments of a snapshot.

        Raises:
            FailedError: a tensor of this model is missing in the snapshot, or packed otherwise.
            RefusedError: the snapshot's moments are of the other format.
        """
        self._require_format(moments)
        with torch.no_grad():
            for leaf, master in self.masters:
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

    def _load_fp32(self, moments: dict[str, Tensor]) -> None:
        state = self._state
        self._attempts = int(_of(moments, "step"))
        state.set_count(self._attempts)
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


def _as_bytes(leaf: Leaf) -> Tensor:
    return torch.tensor(list("\n".join(leaf.names).encode()), dtype=torch.uint8)


def _set_aside(aside: list[Tensor | None], i: int) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        if leaf.grad is None:
            return
        before = aside[i]
        if before is None:
            aside[i] = leaf.grad
        elif before.dtype == torch.float32:
            before.add_(leaf.grad)
        else:
            aside[i] = before.float().add_(leaf.grad)
        leaf.grad = None

    return hook
