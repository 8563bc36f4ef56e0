"""What an arm really does, seen from outside it: which tokens pass through the model, which layers run and how often,
which parameters get a gradient, which tensors change. The comparison is refused when this is not what the arm claims.

Nothing here asks the arm: tokens and layer runs are counted by hooks (in this engine by wrapping the functions that
every token passes), labels where the loss gets them, changes by checksums of every tensor before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elo_engine.benchmarks.models import checksum
from elo_engine.errors import FailedError
from elo_engine.measure.components import held_bytes
from elo_engine.measure.setting import SHALLOW, Setting
from elo_engine.model import names


@dataclass
class Evidence:
    """Counted over the life of an arm; `steps` is the only claim in it."""

    steps: int = 0
    tokens: int = 0
    labelled: int = 0  # tokens that carry a loss
    longest_row: int = 0
    shortest_row: int = 1 << 62
    layer_runs: int = 0
    gradients: dict[str, int] = field(default_factory=dict)  # parameters that ever got one -> elements
    before: dict[str, int] = field(default_factory=dict)
    _labelled: list[Tensor] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)  # bytes by component when the optimizer steps; {}: not counted
    captured: int = 0  # CUDA graphs of a step
    repeated: int = 0  # steps that were one
    still: list[str] = field(default_factory=list)  # tensors that no repetition of a graph changed
    # bounds and labels of micro-batches that the device alone knows, until it is through with the step: `read_padded`
    padded: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def saw_rows(self, lengths: list[int]) -> None:
        """Documents of one micro-batch, as the attention sees them."""
        self.tokens += sum(lengths)
        self.longest_row = max(self.longest_row, *lengths)
        self.shortest_row = min(self.shortest_row, *lengths)

    def saw_labels(self, labels: Tensor) -> None:
        """Labels of one micro-batch; counted on their device, without a wait."""
        self._labelled.append((labels >= 0).sum())

    def read_padded(self) -> None:
        """Count the micro-batches of the step that was made, whose bounds and labels are on the device."""
        for offsets_S1, labels_N in self.padded:
            starts: list[int] = offsets_S1.tolist()
            assert starts[-1] == len(labels_N)
            self.saw_rows([stop - start for start, stop in pairwise(starts) if stop > start])
            self.labelled += int((labels_N >= 0).sum())
        self.padded.clear()

    def saw_gradient(self, name: str, elements: int) -> None:
        """A parameter got a gradient."""
        self.gradients[name] = elements

    def photograph(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Before the first step; the sums are made on the device, one tensor after another."""
        self.before = {name: checksum(tensor.to(device)) for name, tensor in tensors.items()}

    def saw_held(
        self, weights: Iterable[Tensor], gradients: Iterable[Tensor | None], optimizer: Any, device: torch.device
    ) -> None:
        """Count, once, what the first step holds at the optimizer: its state is there, and the gradients still are."""
        if not self.held:
            self.held = held_bytes(weights, gradients, optimizer, device)

    def compare(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """After the last step."""
        for name, tensor in tensors.items():
            (self.unchanged if self.before[name] == checksum(tensor.to(device)) else self.changed).append(name)

    def to_json(self) -> dict[str, Any]:
        """For the record; checksums are left out."""
        found = {name: value for name, value in vars(self).items() if name not in ("before", "padded", "_labelled")}
        return found | {"labelled": self.labelled + sum(int(count) for count in self._labelled)}


def watch_engine(model: Any, evidence: Evidence) -> None:
    """Count in this engine: wraps the model's `hidden_states` and `outer_gradients`, which hands out what autograd does
    not have, and the decoder's `decoder_layer` and `layer_gradient`, which runs a layer again.
    """
    from elo_engine.model import decoder
    from elo_engine.model.layers import PaddedPacking

    hidden_states, layer, again = model.hidden_states, decoder.decoder_layer, decoder.layer_gradient
    outer_gradients = model.outer_gradients

    def counted_states(batch: Any) -> Tensor:
        if isinstance(batch.packing, PaddedPacking):
            evidence.padded.append((batch.packing.offsets, batch.labels_N))
            return hidden_states(batch)  # type: ignore[no-any-return]
        starts = batch.packing.segment_starts
        evidence.saw_rows([stop - start for start, stop in pairwise(starts)])
        assert starts[-1] == len(batch.ids_N)
        evidence.saw_labels(batch.labels_N)
        return hidden_states(batch)  # type: ignore[no-any-return]

    def counted_layer(*args: Any, **options: Any) -> Tensor:
        evidence.layer_runs += 1
        return layer(*args, **options)

    def counted_again(*args: Any, **options: Any) -> Tensor | None:
        evidence.layer_runs += 1
        return again(*args, **options)

    def counted_outer(scale: float) -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, gradient in outer_gradients(scale):
            leaf = next(leaf for leaf in model.leaves if leaf.tensor is tensor)
            evidence.saw_gradient("+".join(leaf.names), gradient.numel())
            yield tensor, gradient
            del gradient  # before the next one is made

    def arrived(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # the embedding's node ends without one
            evidence.saw_gradient(name, gradient.numel())

    model.hidden_states, model.outer_gradients = counted_states, counted_outer
    decoder.decoder_layer, decoder.layer_gradient = counted_layer, counted_again
    for leaf in model.leaves:
        leaf.tensor.register_hook(partial(arrived, "+".join(leaf.names)))


def watch_streamed(engine: Any, evidence: Evidence) -> None:
    """Count in the streamed engine: wraps the step's `decoder_layer`, `layer_gradient` and the loss it asks `ops` for,
    where the hidden states come from, and where complete gradients go.

    Tokens are those that enter the first layer's forward pass, in documents as its attention sees them.
    """
    from elo_engine.stream import step

    layer, again, loss, units, hidden = (
        step.decoder_layer, step.layer_gradient, step.ops.linear_cross_entropy, engine.device_units, engine.hidden,
    )  # fmt: skip
    get, send, update_now = hidden.get, units.send, units.update_now
    place = [-1]  # of the hidden states that were asked for last

    def counted_get(where: int, m: int) -> Tensor:
        place[0] = where
        return get(where, m)  # type: ignore[no-any-return]

    def counted_layer(
        spec: Any, index: int, weights: Any, hidden_ND: Tensor, ropes: Any, packing: Any
    ) -> Tensor:
        evidence.layer_runs += 1
        starts = packing.segment_starts
        assert starts[-1] == len(hidden_ND)
        if place[0] == 0:
            evidence.saw_rows([stop - start for start, stop in pairwise(starts)])
        return layer(spec, index, weights, hidden_ND, ropes, packing)

    def counted_again(*args: Any, **options: Any) -> Tensor | None:
        evidence.layer_runs += 1
        return again(*args, **options)

    def counted_loss(normed_ND: Tensor, head_VD: Tensor, labels_N: Tensor, **options: Any) -> Tensor:
        evidence.saw_labels(labels_N)
        return loss(normed_ND, head_VD, labels_N, **options)

    def arrived(number: int, grads: Sequence[Tensor]) -> None:
        for part, grad in zip(engine.store.units[number].parts, grads, strict=True):
            evidence.saw_gradient("+".join(part.names), grad.numel())

    def counted_send(number: int, grads: Sequence[Tensor]) -> list[Tensor]:
        arrived(number, grads)
        return send(number, grads)  # type: ignore[no-any-return]

    def counted_update(present: Any, grads: Sequence[Tensor], numbers: Any) -> None:
        arrived(present.number, grads)
        update_now(present, grads, numbers)

    step.decoder_layer, step.layer_gradient, step.ops.linear_cross_entropy = counted_layer, counted_again, counted_loss
    hidden.get, units.send, units.update_now = counted_get, counted_send, counted_update


def watch_transformers(model: Any, evidence: Evidence) -> None:
    """Count in a transformers model (or peft's wrapper of one) by forward hooks."""

    def embedded(module: Any, args: Any, kwargs: Any = None) -> None:
        ids = args[0] if args else kwargs["input"]
        evidence.saw_rows([ids.shape[1]] * ids.shape[0])

    def ran(module: Any, args: Any) -> None:
        evidence.layer_runs += 1

    def asked(module: Any, args: Any, kwargs: Any) -> None:
        evidence.saw_labels(kwargs["shift_labels"])

    model.register_forward_pre_hook(asked, with_kwargs=True)
    model.get_input_embeddings().register_forward_pre_hook(embedded, with_kwargs=True)
    for layer in decoder_layers(model):
        layer.input_layernorm.register_forward_pre_hook(ran)  # inside what checkpointing runs again
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch_parameter(name, parameter, evidence)


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a transformers model, under peft's wrapper too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model.layers


def watch_parameter(name: str, parameter: Tensor, evidence: Evidence) -> None:
    """Note when a gradient arrives."""
    parameter.register_post_accumulate_grad_hook(lambda tensor: evidence.saw_gradient(name, tensor.numel()))


def expected_parameters(setting: Setting) -> int:
    """How many parameters the arm must train."""
    spec = setting.spec
    if setting.arm == "lora":
        parts = [part for part in names.layer_parts(spec) if not part.key.startswith("norm") and "bias" not in part.key]
        shapes = [shape for part in parts for shape in part.shapes]
        return spec.layers * sum(setting.lora_rank * (out + into) for out, into in shapes)
    if setting.arm in SHALLOW or setting.arm == "outer_unfrozen":
        return len(setting.layers) * spec.layer_parameters
    return spec.parameters


def faults(setting: Setting, evidence: dict[str, Any]) -> Iterator[str]:
    """Everything in which an arm differs from what it claims; nothing when it is what it says.

    A vector that learns may stay as it is in bf16, where a step of the learning rate is less than half of 1's last
    place; a matrix may not.
    """
    steps, T = evidence["steps"], setting.sequence_length
    if evidence["tokens"] != steps * setting.tokens_per_step:
        yield f"{evidence['tokens']} tokens passed in {steps} steps, not {steps * setting.tokens_per_step}"
    if evidence["labelled"] != steps * setting.tokens_per_step:
        yield f"{evidence['labelled']} tokens carried a loss, not {steps * setting.tokens_per_step}"
    if (evidence["shortest_row"], evidence["longest_row"]) != (T, T):
        yield f"rows of {evidence['shortest_row']} to {evidence['longest_row']} tokens passed, not of {T}"
    depth = len(setting.layers) if setting.arm in SHALLOW else setting.spec.layers
    runs = steps * setting.micro_batches * depth * (2 if setting.recompute == "layer" else 1)
    if evidence["layer_runs"] != runs:
        yield f"decoder layers ran {evidence['layer_runs']} times, not {runs}"
    trained = sum(evidence["gradients"].values())
    if trained != expected_parameters(setting):
        yield f"{trained} parameters got a gradient, not {expected_parameters(setting)}"
    learns = {name for joined in evidence["gradients"] for name in joined.split("+")}
    if setting.graph:
        from elo_engine.train.graphed import EAGER_STEPS

        if not evidence["captured"]:
            yield "no step was captured: all were launched kernel by kernel"
        elif evidence["repeated"] != steps - EAGER_STEPS:
            yield f"{evidence['repeated']} of {steps} steps were graphs, not {steps - EAGER_STEPS}"
        still = [name for name in evidence["still"] if name in learns and not _is_vector(name)]
        yield from (f"{name} learns, and the graphs did not change it" for name in still)
    for name in evidence["changed"]:
        if name not in learns:
            yield f"{name} is frozen and changed"
    for name in evidence["unchanged"]:
        if name in learns and not _is_vector(name):
            yield f"{name} learns and did not change"


def _is_vector(name: str) -> bool:
    return "norm" in name or name.endswith("bias")


def require_engagement(setting: Setting, evidence: dict[str, Any]) -> None:
    """Raises FailedError, naming the arm and all that is wrong with it."""
    wrong = list(faults(setting, evidence))
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FailedError(
            f"arm {setting.arm} is not what it claims, so it is not compared: {'; '.join(wrong[:3])}{more}"
        )
