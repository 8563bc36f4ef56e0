"""AdamW (Loshchilov and Hutter 2019) over a model's leaves, with fp32 master weights, moments and gradient
accumulation.

The update itself is torch's fused kernel. Where the model computes in fp32 its leaves are the masters; where it
computes in bf16 the masters are copies, the gradients of each micro-batch are added to fp32 buffers as soon as they
are complete, and the leaves are rewritten after the update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.errors import FailedError
from elo_engine.model.decoder import Decoder, Leaf


class MasterAdamW:
    """The optimizer of one stage; moments live under the checkpoint's tensor names when they are saved."""

    def __init__(self, model: Decoder, config: OptimizerConfig) -> None:
        self._leaves = model.leaves
        self._clip = config.clip
        self._mixed = model.dtype != torch.float32
        self._masters: list[Tensor] = []
        self._hooks = []
        for leaf in self._leaves:
            if self._mixed:
                master = leaf.tensor.detach().float()
                self._hooks.append(leaf.tensor.register_post_accumulate_grad_hook(_accumulate_into(master)))
            else:
                master = leaf.tensor
            self._masters.append(master)
        self._adamw = torch.optim.AdamW(
            self._masters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def masters(self) -> Iterator[tuple[Leaf, Tensor]]:
        """Each leaf with its fp32 master."""
        return zip(self._leaves, self._masters, strict=True)

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward pass allocates them where it needs them."""
        self._adamw.zero_grad(set_to_none=True)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Checkpoint name -> accumulated fp32 gradient of the step so far (None: no gradient has arrived)."""
        for leaf, master in self.masters:
            if master.grad is None:
                for name in leaf.names:
                    yield name, None
            else:
                yield from leaf.split(master.grad)

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip by the global norm and update. Returns the norm before clipping, and False when it was not finite: then
        nothing was changed.
        """
        grads = [master.grad for master in self._masters if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        value = float(norm)
        if not torch.isfinite(norm):
            return value, False
        if self._clip is not None and value > self._clip:
            torch._foreach_mul_(grads, self._clip / value)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        if self._mixed:
            with torch.no_grad():
                for leaf, master in self.masters:
                    leaf.tensor.copy_(master)
        return value, True

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint names -> fp32 masters, as views."""
        return {name: view for leaf, master in self.masters for name, view in leaf.split(master.detach())}

    def moments(self) -> dict[str, Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` for every tensor, and `step`: what a snapshot needs besides the
        weights.
        """
        out: dict[str, Tensor] = {}
        for leaf, master in self.masters:
            state = self._adamw.state.get(master)
            if not state:
                continue
            out["step"] = state["step"].reshape(1).float()
            for kind in ("exp_avg", "exp_avg_sq"):
                out.update({f"{kind}.{name}": view for name, view in leaf.split(state[kind])})
        return out

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over the weights and moments of a snapshot.

        Raises:
            FailedError: a tensor of this model is missing in the snapshot.
        """
        with torch.no_grad():
            for leaf, master in self.masters:
                for name, view in leaf.split(master.detach()):
                    view.copy_(_of(weights, name))
                if self._mixed:
                    leaf.tensor.copy_(master)
                if not moments:
                    continue
                state = self._adamw.state[master]
                state["step"] = _of(moments, "step").reshape(()).clone()
                if master.is_cuda:
                    state["step"] = state["step"].to(master.device)
                for kind in ("exp_avg", "exp_avg_sq"):
                    state[kind] = torch.empty_like(master)
                    for name, view in leaf.split(state[kind]):
                        view.copy_(_of(moments, f"{kind}.{name}"))


def _of(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FailedError(f"the snapshot holds no tensor {name!r}: it was written by a run that trained other layers")
    return tensors[name]


def _accumulate_into(master: Tensor):  # type: ignore[no-untyped-def]
    def hook(leaf: Tensor) -> None:
        if leaf.grad is None:
            return
        if master.grad is None:
            master.grad = leaf.grad.float()
        else:
            master.grad.add_(leaf.grad)
        leaf.grad = None

    return hook
