"""The bridge: a frozen affine map in place of the layers that ELO pretraining leaves out, so that the detached layers
meet hidden states like those of the whole model.

Between two present layers, y = x + x A^T + b takes the output x of the one to the input y of the next. A and b are
fitted in closed form to what the whole model makes of the same tokens, by ridge regression of the change y - x on x:
the penalty pulls A to zero, so the map to the identity, which is what happens at a gap without a bridge. docs/bridge.md
has the equations and the works that the idea comes from.

A gap (a, b) reaches from the output of present layer a, of a = -1 the embedding, to the input of present layer b, of
b = the number of layers the final norm. Letters as in the legend of `elo_engine`; `xx_DD` and the like are sums over
tokens of products of features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.errors import FailedError, UsageError

Gap = tuple[int, int]
Observer = Callable[[Tensor], None]

# A token whose hidden state is this many times as long as the median of its batch is left out of the fit. Massive
# activations (Sun et al. 2024, arXiv 2402.17762) are entries of at least 1000 times the median magnitude, on a few
# tokens such as the first one; where the other entries are normally distributed, one such entry makes the state
# 1000 / (1.48 sqrt(D)) times as long as others, which is more than 4 up to D = 28,000. The squares of such states would
# otherwise decide the fit of all tokens. docs/bridge.md has the lengths met in a trained model.
MASSIVE = 4.0
_CHUNK_BYTES = 64 << 20  # of fp64 copies of hidden states at a time


def gaps(spec_layers: int, layers: tuple[int, ...]) -> list[Gap]:
    """Where layers are missing between, before and behind the present `layers` (sorted) of a model of `spec_layers`."""
    return [(a, b) for a, b in pairwise((-1, *layers, spec_layers)) if b > a + 1]


@dataclass(frozen=True)
class Bridge:
    """y = x + x A^T + b, frozen. matrix_DD is A, in the compute dtype and on the device of the hidden states.

    The identity is added, not multiplied with: in every dtype it is exact.
    """

    matrix_DD: Tensor
    bias_D: Tensor

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]: 2 D^2 operations a token, and as many for the gradient, where the input needs one."""
        out: Tensor = _Affine.apply(hidden_ND, self.matrix_DD, self.bias_D)
        return out

    def to(self, device: torch.device, dtype: torch.dtype) -> Bridge:
        """A copy of the same map, rounded to `dtype`."""
        return Bridge(self.matrix_DD.to(device, dtype, copy=True), self.bias_D.to(device, dtype, copy=True))

    def copy_(self, other: Bridge) -> None:
        """Take the values of another one, in place, rounded to this one's dtype."""
        self.matrix_DD.copy_(other.matrix_DD)
        self.bias_D.copy_(other.bias_D)


class _Affine(torch.autograd.Function):
    """Saves no activation: the gradient of the input needs A alone, and A itself learns nothing, so no dA is made."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, matrix_DD: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(matrix_DD)
        # two roundings in place of one product with I + A, whose sums would round at the size of x all along
        return F.linear(hidden_ND, matrix_DD, bias_D).add_(hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (matrix_DD,) = ctx.saved_tensors
        (d_out_ND,) = grads
        d_hidden_ND = torch.mm(d_out_ND, matrix_DD)
        return d_hidden_ND.add_(d_out_ND), None, None


@dataclass(frozen=True)
class Fit:
    """A fitted bridge, in fp32, and how well it does on the tokens it was fitted to.

    Attributes:
        r2_change: share of the variance of y - x that the map explains, over all features; 0 is no better than moving
            every state by the mean change.
        r2_output: the same of y.
        tokens, left_out: tokens that were fitted, and those left out for massive activations; after forgetting, their
            weights.
    """

    bridge: Bridge
    r2_change: float
    r2_output: float
    tokens: float
    left_out: float


class GapStatistics:
    """What the fit of one gap needs of all tokens seen: sums in fp64, 16 D^2 bytes, whatever their number."""

    def __init__(self, D: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.D = D
        self._sums = {
            "count": zeros(), "left_out": zeros(), "x": zeros(D), "y": zeros(D), "yy": zeros(D),
            "xx": zeros(D, D), "xy": zeros(D, D),
        }  # fmt: skip

    @torch.no_grad()
    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Count the hidden states of a batch's tokens before and behind the gap, but for tokens that are MASSIVE in
        either; without a wait for the device. The fp64 products are made in chunks of tokens.
        """
        sums = self._sums
        out_N = _massive(x_ND) | _massive(y_ND)
        sums["left_out"] += out_N.sum()
        sums["count"] += (~out_N).sum()
        rows = max(1, _CHUNK_BYTES // (2 * 8 * self.D))
        for begin in range(0, len(x_ND), rows):
            here = slice(begin, begin + rows)
            x, y = (t[here].to(torch.float64, copy=True) for t in (x_ND, y_ND))
            x.masked_fill_(out_N[here, None], 0.0)
            y.masked_fill_(out_N[here, None], 0.0)
            sums["x"] += x.sum(0)
            sums["y"] += y.sum(0)
            sums["xx"].addmm_(x.T, x)
            sums["xy"].addmm_(x.T, y)
            sums["yy"] += y.square_().sum(0)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Forget: everything counted so far weighs `factor` times as much."""
        for total in self._sums.values():
            total *= factor

    @torch.no_grad()
    def clear(self) -> None:
        """Nothing is counted any more; the sums stay where they are."""
        for total in self._sums.values():
            total.zero_()

    @torch.no_grad()
    def merge(self, other: GapStatistics) -> None:
        """Add what another one has counted."""
        for name, total in self._sums.items():
            total += other._sums[name].to(total.device)

    @property
    def tokens(self) -> float:
        """Weight of the tokens counted; waits for the device."""
        return float(self._sums["count"])

    @torch.no_grad()
    def fit(self, ridge: float) -> Fit:
        """Solve (S_xx + lambda I) A^T = S_xd for the change d = y - x, where S are sums over centred tokens and lambda
        is `ridge` times the mean diagonal of S_xx; b takes the mean of x to that of y and is not penalised.

        Raises:
            UsageError: not more tokens than features. FailedError: hidden states are not finite, or the equations
                are singular.
        """
        count, left_out = self.tokens, float(self._sums["left_out"])
        if count < self.D + 1:
            raise UsageError(
                f"bridge: {count:.0f} tokens ({left_out:.0f} more were left out for massive activations) cannot "
                f"determine a map of {self.D} features; it takes {self.D + 1} at least, and several times as many to "
                "hold for other text. Raise detach.bridge_tokens"
            )
        if not all(bool(total.isfinite().all()) for total in self._sums.values()):
            raise FailedError(
                "bridge: hidden states of the base model are not finite, so nothing can be fitted to them; check the "
                "checkpoint with elo inspect --verify and elo eval, or compute with dtype: fp32"
            )
        xx_DD, xd_DD, mean_x_D, mean_d_D = self._centred()
        diagonal_D = xx_DD.diagonal()
        diagonal_D += ridge * diagonal_D.mean()
        factor_DD, info = torch.linalg.cholesky_ex(xx_DD)
        if int(info):
            raise FailedError(
                f"bridge: the equations for {self.D} features of {count:.0f} tokens are singular (pivot {int(info)}); "
                f"raise detach.ridge above {ridge:g}, or detach.bridge_tokens"
            )
        matrix_DD = torch.cholesky_solve(xd_DD, factor_DD).T
        bias_D = mean_d_D - matrix_DD @ mean_x_D
        bridge = Bridge(matrix_DD.float().contiguous(), bias_D.float())
        return Fit(bridge, *self.r2(bridge), count, left_out)

    @torch.no_grad()
    def r2(self, bridge: Bridge) -> tuple[float, float]:
        """`Fit.r2_change` and `Fit.r2_output` of any bridge on the tokens counted here; below 0 where it does worse
        than their means. NaN without a token.
        """
        count = self.tokens
        if count == 0:
            return float("nan"), float("nan")
        xx_DD, xd_DD, mean_x_D, mean_d_D = self._centred()
        matrix_DD, bias_D = (t.to(xx_DD.device, torch.float64) for t in (bridge.matrix_DD, bridge.bias_D))
        yy = self._sums["yy"].sum() - (self._sums["y"] ** 2).sum() / count
        dd = yy - 2 * xd_DD.trace() - xx_DD.trace()  # of y - x, where y = x + d
        rest = dd - 2 * (matrix_DD.T * xd_DD).sum() + ((matrix_DD @ xx_DD) * matrix_DD).sum()
        rest += count * ((mean_d_D - matrix_DD @ mean_x_D - bias_D) ** 2).sum()
        return float(1 - rest / dd), float(1 - rest / yy)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> S_xx, S_xd, mean of x, mean of d."""
        sums, count = self._sums, self._sums["count"]
        mean_x_D, mean_y_D = sums["x"] / count, sums["y"] / count
        xx_DD = sums["xx"].addr(sums["x"], mean_x_D, alpha=-1)
        xd_DD = sums["xy"].addr(sums["x"], mean_y_D, alpha=-1).sub_(xx_DD)
        return xx_DD, xd_DD, mean_x_D, mean_y_D - mean_x_D

    def state(self) -> dict[str, Tensor]:
        """The sums by name, as they are: they change with the next `add`."""
        return dict(self._sums)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, in place.

        Raises:
            FailedError: other names or shapes, or not fp64.
        """
        for name, total in self._sums.items():
            given = state.get(name)
            if given is None or given.shape != total.shape or given.dtype != total.dtype:
                found = "nothing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise FailedError(
                    f"bridge statistics: {name!r} should be {total.dtype} {list(total.shape)} and is {found}; they "
                    "belong to another model or were damaged"
                )
        for name, total in self._sums.items():
            total.copy_(state[name])


def _massive(states_ND: Tensor) -> Tensor:
    """[N]: far longer than the median. States that are not finite are not among them: they must be seen, in `fit`."""
    wide = torch.promote_types(states_ND.dtype, torch.float32)
    length_N = torch.linalg.vector_norm(states_ND, dim=1, dtype=wide)
    massive_N: Tensor = (length_N > MASSIVE * length_N.median()) & length_N.isfinite()
    return massive_N


class Collector:
    """Feeds the statistics of gaps from the hidden states that enter layers, as `Decoder.observers` hand them out.

    Several batches may be under way, in the same order at either end of a gap, as when a model is gone through layer by
    layer. `observers` has an entry for each end: a + 1 and b of every gap (a, b).
    """

    def __init__(self, statistics: Mapping[Gap, GapStatistics]) -> None:
        self.statistics = dict(statistics)
        self._waiting: dict[Gap, deque[Tensor]] = {gap: deque() for gap in self.statistics}
        self.observers: dict[int, Observer] = {}
        for gap in self.statistics:  # no layer is at the end of two: between two gaps lies a present layer
            self.observers[gap[0] + 1] = self._waiting[gap].append
            self.observers[gap[1]] = self._other_end(gap)

    def _other_end(self, gap: Gap) -> Observer:
        def add(y_ND: Tensor) -> None:
            self.statistics[gap].add(self._waiting[gap].popleft(), y_ND)

        return add

    def drop(self) -> None:
        """A pass was given up: states that wait for the other end of their gap are let go."""
        for waiting in self._waiting.values():
            waiting.clear()
