"""What kernels/rotary.py and rotary_norm.py compute, in plain torch, and the examples that their tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
POSITIONS = 12
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gammas = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """N tokens; H query and K key/value heads of width E, of which 2R dimensions turn."""

    N: int
    H: int
    K: int
    E: int
    R: int

    @property
    def heads(self) -> dict[str, int]:
        return {"q_heads": self.H, "k_heads": self.K, "head_width": self.E}


# One token and one head; SmolLM2's heads; more heads than a tile holds; no powers of two; a fifth of a head turns, and
# an odd number of dimensions does.
SHAPES = [
    Shape(1, 1, 1, 16, 8),
    Shape(4, 9, 3, 64, 32),
    Shape(2, 20, 2, 128, 64),
    Shape(2, 3, 2, 80, 40),
    Shape(2, 3, 2, 80, 10),
    Shape(3, 5, 1, 24, 7),
]
PARTIAL = Shape(4, 5, 2, 24, 7)


def example(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, Tables]:
    """qkv, and the tables with each token's position: documents of two tokens, then the table's last row."""
    generator = torch.Generator().manual_seed(shape.N * 1000 + shape.E)
    qkv = torch.randn(shape.N, (shape.H + 2 * shape.K) * shape.E, generator=generator).to(dtype)
    angles = torch.randn(POSITIONS, shape.R, generator=generator) * 3
    positions = torch.arange(shape.N) % 2
    positions[-1] = POSITIONS - 1
    return qkv, (angles.cos(), angles.sin(), positions)


def turned(qkv: torch.Tensor, tables: Tables, shape: Shape, inverse: bool = False) -> torch.Tensor:
    """The definition in plain torch, in the type of qkv."""
    cos, sin, positions = tables
    cos, sin = (table[positions.long()][:, None].to(qkv.dtype) for table in (cos, sin))
    sin = -sin if inverse else sin
    heads = qkv.view(len(qkv), shape.H + 2 * shape.K, shape.E)
    turning, v = heads[:, : shape.H + shape.K], heads[:, shape.H + shape.K :]
    low, high, rest = turning.split((shape.R, shape.R, shape.E - 2 * shape.R), dim=-1)
    turning = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
    return torch.cat((turning, v), dim=1).reshape(qkv.shape)


def normed(
    qkv: torch.Tensor, q_gamma: torch.Tensor, k_gamma: torch.Tensor, shape: Shape, unit_offset: bool
) -> torch.Tensor:
    """RMSNorm of each q and k head in plain torch, in the type of qkv."""
    heads = qkv.view(len(qkv), shape.H + 2 * shape.K, shape.E)
    q, k, v = heads.split((shape.H, shape.K, shape.K), dim=1)
    if unit_offset:
        q_gamma, k_gamma = 1 + q_gamma, 1 + k_gamma
    q, k = (F.rms_norm(x, (shape.E,), gamma, EPS) for x, gamma in ((q, q_gamma), (k, k_gamma)))
    return torch.cat((q, k, v), dim=1).reshape(qkv.shape)


def gammas(shape: Shape, dtype: torch.dtype) -> Gammas:
    generator = torch.Generator().manual_seed(shape.E)
    q_gamma, k_gamma = (1 + 0.3 * torch.randn(shape.E, generator=generator) for _ in range(2))
    return q_gamma.to(dtype), k_gamma.to(dtype) - 0.5


def plain_norm(
    qkv: torch.Tensor,
    tables: Tables,
    both: Gammas,
    d_out: torch.Tensor,
    shape: Shape,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, ...]:
    """What `run_norm` returns, by plain torch and autograd, in the type of the arguments."""
    qkv, q_gamma, k_gamma = (tensor.clone().requires_grad_() for tensor in (qkv, *both))
    out = turned(normed(qkv, q_gamma, k_gamma, shape, unit_offset), tables, shape)
    return out.detach(), *torch.autograd.grad(out, (qkv, q_gamma, k_gamma), d_out)


def true_norm(
    qkv: torch.Tensor,
    tables: Tables,
    both: Gammas,
    d_out: torch.Tensor,
    shape: Shape,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, ...]:
    doubles = (qkv.double(), tables, (both[0].double(), both[1].double()), d_out.double())
    return plain_norm(*doubles, shape, unit_offset)


def by_head(matrix: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Errors are measured by head: a head is what a row of this kernel is."""
    return matrix.view(-1, shape.E) if matrix.dim() == 2 else matrix
