"""A step with the whole model spread over several processes, and AdamW on each process's share of it.

Everything that is not elementwise is made of all shares: the gradient's norm, the check of the first gradients, what a
snapshot holds. A snapshot is that of every other engine, so it continues with another number of processes, also one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo_engine.config import OptimizerConfig
from elo_engine.data import RowBatch
from elo_engine.errors import FailedError
from elo_engine.measure.components import held_bytes
from elo_engine.model.decoder import Leaf
from elo_engine.model.ops.adamw import AdamwState, StepResult, adamw_update, leaf_norms, step_numbers
from elo_engine.model.sharded import ShardedModel
from elo_engine.train import world
from elo_engine.train.guards import scale_of
from elo_engine.train.loop import StepOutcome, micro_batches, to_batch
from elo_engine.train.resident import require_gradients


@dataclass(frozen=True)
class Collected:
    """A snapshot's tensors on the host of rank 0; empty on the others."""

    held_weights: dict[str, Tensor]
    held_moments: dict[str, Tensor]
    snapshot_bytes: int

    def weights(self) -> dict[str, Tensor]:
        """By checkpoint name."""
        return self.held_weights

    def moments(self) -> dict[str, Tensor]:
        """As of `LeafState.moments`."""
        return self.held_moments


class ShardedAdamW:
    """AdamW with fp32 masters and moments, each process for its share.

    Raises:
        UsageError: 8-bit state, whose groups of 256 and random rounding are those of whole leaves.
    """

    def __init__(self, model: ShardedModel, config: OptimizerConfig) -> None:
        world.require_whole_leaves(config.state, world.size())
        self._config = config
        pairs = list(model.leaves)
        self._leaves, self._weights = [leaf for leaf, _ in pairs], [weight for _, weight in pairs]
        # a process has no rows of what is shorter than there are processes
        self._there = [i for i, leaf in enumerate(self._leaves) if leaf.tensor.numel()]
        self._powers = torch.tensor([1.0, 1.0, 0.0, *config.betas], dtype=torch.float64, device=model.device)
        self._first = [torch.zeros_like(leaf.tensor) for leaf in self._leaves]
        self._second = [torch.zeros_like(leaf.tensor) for leaf in self._leaves]
        self._attempts = 0

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for weight in self._weights:
            weight.grad = None

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """The first checkpoint name of each leaf -> a value [1] that stands for its gradient everywhere: the largest
        magnitude, NaN where one is none; None where no process has a gradient. For `require_gradients`.
        """
        for leaf, weight in zip(self._leaves, self._weights, strict=True):
            grad = _local(weight)
            largest = torch.full((2,), -1.0, device=leaf.tensor.device)
            if grad is not None:
                magnitude = torch.linalg.vector_norm(grad, torch.inf) if grad.numel() else grad.new_zeros(())
                largest[0], largest[1] = torch.nan_to_num(magnitude, torch.inf), torch.isnan(magnitude)
            world.largest(largest)
            value, is_nan = largest.tolist()
            yield leaf.names[0], None if value < 0 else torch.tensor([float("nan") if is_nan > 0 else value])

    def step(self, lr: float) -> StepResult:
        """As `MasterAdamW.step`; the norm is that of all shares."""
        config = self._config
        self._attempts += 1
        grads = [_require(self._leaves[i], _local(self._weights[i])) for i in self._there]
        norms = leaf_norms(grads)
        square = torch.stack(norms).double().square().sum() if norms else self._powers.new_zeros(())
        world.add_up([square])
        numbers = step_numbers(
            self._powers, [square.sqrt().float()], bits=32,
            lr=lr, eps=config.eps, weight_decay=config.weight_decay, clip=config.clip,
        )  # fmt: skip
        weights, first, second = (
            [tensors[i] for i in self._there]
            for tensors in ([leaf.tensor for leaf in self._leaves], self._first, self._second)
        )
        adamw_update(AdamwState(weights, None, first, second, None, self._powers), grads, numbers)
        return numbers.result

    @property
    def snapshot_bytes(self) -> int:
        """Of masters and both moments of the whole model, which rank 0 writes."""
        return 12 * sum(weight.numel() for weight in self._weights)

    def weights(self) -> dict[str, Tensor]:
        """See `collected`."""
        return self.collected().weights()

    def moments(self) -> dict[str, Tensor]:
        """See `collected`."""
        return self.collected().moments()

    def moments_here(self) -> list[Tensor]:
        """This process's share of both."""
        return [*self._first, *self._second]

    def collected(self) -> Collected:
        """The whole state on rank 0's host, leaf by leaf, in the format of `LeafState`; all processes call it."""
        weights = dict[str, Tensor]()
        moments = dict[str, Tensor]()
        for i, leaf in enumerate(self._leaves):
            weights |= self._whole(i, leaf.tensor)
            if self._attempts:
                for kind, of in (("exp_avg", self._first), ("exp_avg_sq", self._second)):
                    moments |= {f"{kind}.{name}": tensor for name, tensor in self._whole(i, of[i]).items()}
        if self._attempts and world.rank() == 0:
            moments |= {"powers": self._powers.cpu(), "step": self._powers[2].reshape(1).float().cpu()}
        return Collected(weights, moments, self.snapshot_bytes)

    def _whole(self, i: int, rows: Tensor) -> dict[str, Tensor]:
        """A leaf of which each process has these rows, by checkpoint name, on rank 0's host; {} elsewhere."""
        weight = self._weights[i]
        whole = DTensor.from_local(
            rows, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        ).full_tensor()
        return dict(self._leaves[i].split(whole.cpu())) if world.rank() == 0 else {}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take this process's share of a snapshot that every process has read.

        Raises:
            FailedError: a tensor is missing, or the snapshot is of 8-bit state.
        """
        for i, leaf in enumerate(self._leaves):
            self._take(leaf, leaf.tensor, weights, "")
            if moments:
                self._take(leaf, self._first[i], moments, "exp_avg.")
                self._take(leaf, self._second[i], moments, "exp_avg_sq.")
        if moments:
            self._attempts = int(moments["step"])
            count = float(self._attempts)
            betas = self._config.betas
            powers = moments.get("powers")
            self._powers[:3] = torch.tensor([*(b**count for b in betas), count]) if powers is None else powers[:3]

    def _take(self, leaf: Leaf, rows: Tensor, tensors: dict[str, Tensor], prefix: str) -> None:
        missing = [prefix + name for name in leaf.names if prefix + name not in tensors]
        if missing:
            raise FailedError(
                f"the snapshot holds no tensor {missing[0]!r}: it is of another model, or of another optimizer.state; "
                "continue with the configuration that wrote it"
            )
        whole = torch.cat([tensors[prefix + name] for name in leaf.names])
        each = -(-len(whole) // world.size())  # as torch.chunk cuts, which fully_shard follows
        mine = whole[min(world.rank() * each, len(whole)) :][:each]
        if mine.shape != rows.shape:
            raise FailedError(f"{leaf.names[0]}: the share has {list(rows.shape)} and {list(mine.shape)} were expected")
        rows.copy_(mine)


class ShardedEngine:
    """A sharded model and its optimizer, as `train` takes them.

    Args:
        micro_batch: rows that go through each process at once.
    """

    def __init__(self, model: ShardedModel, optimizer: ShardedAdamW, micro_batch: int) -> None:
        self.model, self.optimizer = model, optimizer
        self._micro_batch = micro_batch

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.model.dtype

    @property
    def scorer(self) -> ShardedModel:
        """Whose held-out losses are scored."""
        return self.model

    def held(self) -> dict[str, int]:
        """Bytes on this process's device by component, after a step whose gradients are still there."""
        pairs = list(self.model.leaves)
        weights, gradients = [leaf.tensor for leaf, _ in pairs], [_local(weight) for _, weight in pairs]
        return held_bytes(weights, gradients, self.optimizer.moments_here(), self.device)

    def collected(self) -> Collected:
        """See `ShardedAdamW.collected`."""
        return self.optimizer.collected()

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`; `should_stop` says the same on all processes."""
        model, optimizer = self.model, self.optimizer
        optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float32, device=model.device)
        for piece in micro_batches(world.share(rows), self._micro_batch):
            if should_stop():
                optimizer.zero_grad()
                return None
            loss = model(to_batch(piece, model.device))
            (loss / max(1, tokens_loss)).backward(scale_of(loss))
            loss_sum += loss.detach()
        world.add_up([loss_sum])
        if first:
            require_gradients(optimizer.gradients())
        result = optimizer.step(lr)
        return StepOutcome(torch.stack((loss_sum, result.norm, result.updated)))


def _local(weight: DTensor) -> Tensor | None:
    grad = weight.grad
    if grad is None:
        return None
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _require(leaf: Leaf, grad: Tensor | None) -> Tensor:
    if grad is None:
        raise FailedError(f"{leaf.names[0]}: got no gradient in this step although it learns")
    return grad
