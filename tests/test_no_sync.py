"""A training step as a GPU would run it never waits for the device, and its shapes do not depend on the text.

Without a card the step runs on meta tensors, which have shapes and no values: whatever would have to look at a value
(`item`, `tolist`, a condition, `nonzero`, a copy to the host) raises there, where CUDA would stop and wait. Everything
else takes the way it takes on CUDA; kernels are not launched but noted. What this cannot see: a wait inside a library,
and memory that is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from rows_fixture import random_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elo_engine.config import OptimizerConfig, Recompute
from elo_engine.data.rows import RowBatch
from elo_engine.model import names
from elo_engine.model.bridge import Bridge
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops import choice
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.train import loop, resident
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

pytest.importorskip("triton")

T, ROWS = 32, 4
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 304, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
OLMO2 = LLAMA | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}


compiled: set[Any] = set()  # kernels by what they would be compiled for, since the fixture began


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Meta tensors take the way of CUDA tensors; the kernels that would have been launched, by name."""
    from triton.runtime.jit import JITFunction

    import elo_engine.kernels as package

    found: list[str] = []

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        found.append(self.fn.__name__)
        compiled.add((self.fn.__name__, *map(kind, arguments), *sorted((k, kind(v)) for k, v in options.items())))

    def kind(value: Any) -> Any:
        """What Triton compiles anew for: types, which pointers may be divisible by 16, integers by 1 and 16."""
        if isinstance(value, Tensor):
            return str(value.dtype)
        if type(value) is int:
            return value == 1, value % 16 == 0
        return str(value)

    product = torch._scaled_mm

    def scaled_mm(*operands: Any, out: Tensor | None = None) -> Tensor:
        """torch's has no form for meta tensors with an `out`."""
        made: Tensor = product(*operands)
        return made if out is None else out.copy_(made)

    compiled.clear()
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"))
    monkeypatch.setattr(choice, "use_triton", lambda tensor: True)
    for module in pkgutil.iter_modules(package.__path__):
        kernels = importlib.import_module(f"elo_engine.kernels.{module.name}")
        if hasattr(kernels, "check_device"):
            monkeypatch.setattr(kernels, "check_device", lambda **tensors: None)
    return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each `StepOutcome` sent to the host, which is no wait; whatever waits raises."""
    found: list[int] = []

    class Sent(loop.StepOutcome):
        def __init__(self, numbers_3: Tensor) -> None:
            found.append(numbers_3.numel())
            assert numbers_3.device.type == "meta"

    monkeypatch.setattr(resident, "StepOutcome", Sent)
    return found


class Shapes(TorchDispatchMode):
    """The operations on the device, with the shapes of what they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(tensor.device.type == "meta" for tensor in tensors):
            self.seen.append((str(func), tuple(tuple(tensor.shape) for tensor in tensors)))
        return out


def rows(seed: int, documents: int = 1) -> RowBatch:
    """Rows of T tokens, each cut into so many documents at random places."""
    return random_rows(seed, ROWS, T, documents)


def make(
    config: dict[str, Any], *, whole: bool = False, micro_batch: int = 2, recompute: Recompute = "none",
    bridge: bool = False, host: bool = False, fp8: Any = "none", dtype: torch.dtype = torch.bfloat16, **optimizer: Any,
) -> ResidentEngine:  # fmt: skip
    spec = read_spec(config)
    tensors = _empty(spec, dtype)
    if host:
        tensors[names.EMBEDDING] = torch.zeros(spec.V, spec.D, dtype=dtype)
    layers = tuple(range(spec.layers)) if whole else (0, spec.layers - 1)
    bridges = {}
    if bridge:
        D = spec.D
        bridges = {(0, spec.layers - 1): Bridge(torch.empty(D, D, device="meta"), torch.empty(D, device="meta"))}
    model = Decoder(spec, tensors, layers, train_outer=whole, recompute=recompute, bridges=bridges)
    model.use_fp8(fp8)
    return ResidentEngine(model, MasterAdamW(model, OptimizerConfig(**optimizer)), micro_batch)


def _empty(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = names.expected_shapes(spec)
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def step(engine: ResidentEngine, batch: RowBatch) -> None:
    assert engine.step(batch, batch.tokens_loss, 1e-3, first=False, should_stop=lambda: False) is not None


CASES: dict[str, dict[str, Any]] = {
    "pretraining": {"config": LLAMA},
    "with a bridge": {"config": LLAMA, "bridge": True},
    "one micro-batch": {"config": LLAMA, "micro_batch": 4},
    "recomputed": {"config": LLAMA, "recompute": "layer"},
    "first product of the MLP made again": {"config": LLAMA, "recompute": "selective"},
    "8-bit state": {"config": LLAMA, "state": "8bit"},
    "8-bit state, masters": {"config": LLAMA, "state": "8bit", "master": "32"},
    "no clipping": {"config": LLAMA, "clip": None},
    "norms of q and k": {"config": QWEN3},
    "norms behind": {"config": OLMO2},
    "embedding on the host": {"config": LLAMA | {"tie_word_embeddings": False}, "host": True},
    "untied head": {"config": LLAMA | {"tie_word_embeddings": False}},
    "8-bit head": {"config": LLAMA, "fp8": "head"},
    "8-bit products": {"config": LLAMA, "fp8": "all"},
    "8-bit products, recomputed": {"config": QWEN3, "fp8": "all", "recompute": "layer"},
    "8-bit products, first of the MLP's made again": {"config": QWEN3, "fp8": "all", "recompute": "selective"},
    "whole model": {"config": LLAMA, "whole": True, "recompute": "layer"},
    "whole model, untied": {"config": LLAMA | {"tie_word_embeddings": False}, "whole": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_host_never_waits_in_a_step(case: str, launched: list[str], sent: list[int]) -> None:
    engine = make(**CASES[case])
    step(engine, rows(0))  # the first sends the optimizer's plan and may wait
    sent.clear()
    launched.clear()
    step(engine, rows(1, documents=3))
    assert sent == [3], "loss, norm and whether the step was made, sent together"
    assert launched, "no kernel was met, so this was not the way of a GPU"


@pytest.mark.parametrize("case", [case for case in CASES if "whole" not in case])
def test_shapes_and_launches_do_not_depend_on_the_text(case: str, launched: list[str], sent: list[int]) -> None:
    """Of ELO pretraining, for one number of documents: what a CUDA graph would have to ask for. (The whole model's
    embedding gradient has a row for each token that occurs, unless the step is a graph: tests/test_graphed.py.)
    """
    engine = make(**CASES[case])
    step(engine, rows(0))  # whole rows: the rotary tables have all positions from here on
    seen = []
    for seed in (1, 2):
        launched.clear()
        with Shapes() as shapes:
            step(engine, rows(seed, documents=2))
        seen.append((shapes.seen, list(launched)))
    assert len(seen[0][0]) > 50
    different = [pair for pair in zip(seen[0][0], seen[1][0], strict=True) if pair[0] != pair[1]]
    assert different == [] and seen[0][1] == seen[1][1]


def test_other_text_compiles_nothing_new(launched: list[str], sent: list[int]) -> None:
    """A first step that has compiled its kernels has compiled those of all others: nothing is tuned by trial."""
    engine = make(LLAMA)
    step(engine, rows(0))
    before = set(compiled)
    for seed in range(1, 6):
        step(engine, rows(seed, documents=seed))
    assert compiled == before and 8 <= len(before) < 16


@pytest.mark.parametrize(
    "plant",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: bool(hidden.sum() > 0),
        lambda hidden: hidden.cpu(),
        lambda hidden: hidden.nonzero(),
        lambda hidden: torch.unique(hidden),
        lambda hidden: hidden[hidden > 0],
    ],
    ids=["item", "condition", "copy", "nonzero", "unique", "mask"],
)
def test_a_planted_wait_is_seen(plant: Any, launched: list[str], sent: list[int]) -> None:
    engine = make(LLAMA)
    engine.model.observers = {3: plant}
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(engine, rows(0))


def test_launches_of_a_step_with_8_bit_operands(launched: list[str], sent: list[int]) -> None:
    """Beside those of the step in bf16, whose loss has another kernel: a layer has four projections, each of which
    rounds both operands forward, and backward d_out once, both ways, and weight and input the other way around, but for
    the first projection's weight, since nothing before it learns. The head's loss rounds the hidden rows, and adds the
    targets' term. Before all that the head itself is rounded for the step, rows and columns.
    """
    engine = make(LLAMA, fp8="all")
    step(engine, rows(0))
    launched.clear()
    step(engine, rows(1))
    layers, micro_batches = 2, 2
    found = Counter(launched)
    assert found["_quantize_tensor_kernel"] == micro_batches * (layers * 4 * (2 + 3) - 1)
    assert found["_quantize_rows_kernel"] == micro_batches + 1 and found["_quantize_columns_kernel"] == 1
    assert found["_cross_entropy_fp8_kernel"] == micro_batches
    assert found["_add_target_kernel"] == micro_batches and "_cross_entropy_forward_kernel" not in found


def test_launches_of_a_step(launched: list[str], sent: list[int]) -> None:
    """Counted by hand for two layers and two micro-batches, so that another launch is noticed: forward a layer has two
    norms, a rotation and an activation; backward the same and the two norms again, since what they gave was not kept.
    The first norm of all has no backward kernel: nothing before it learns, and its gain's gradient is of a product.
    """
    engine = make(LLAMA)
    step(engine, rows(0))
    launched.clear()
    step(engine, rows(1))
    layers, micro_batches = 2, 2
    assert Counter(launched) == {
        "_rms_norm_forward_kernel": micro_batches * (4 * layers + 1),
        "_rms_norm_backward_kernel": micro_batches * 2 * layers,
        "_rotary_kernel": micro_batches * 2 * layers,
        "_gated_forward_kernel": micro_batches * layers,
        "_gated_backward_kernel": micro_batches * layers,
        "_cross_entropy_forward_kernel": micro_batches,
        "_sum_of_squares_kernel": 1, "_control_kernel": 1, "_update_fp32_kernel": 1,
    }  # fmt: skip
