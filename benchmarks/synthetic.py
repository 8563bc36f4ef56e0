"""A sharded Llama checkpoint of given shapes with random weights, for benchmarks that need its size and layout.

    python benchmarks/synthetic.py llama-2b FOLDER

Shards and index lie byte for byte as `save_pretrained` of transformers 5 leaves these weights. They are random bf16
between 2^-7 and 2^-6 in size (norms between 1 and 2), so that they are finite and nothing on the way can compress or
skip them. Memory is bounded by one block.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from elo_engine.console import progress_bar
from elo_engine.errors import RefusedError

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Shapes:
    """A Llama; letters as in the shape legend. `shard_bytes` as save_pretrained's max_shard_size."""

    layers: int
    V: int
    D: int
    F: int
    H: int
    K: int
    E: int
    tied: bool = False
    shard_bytes: int = 10**9

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order in which save_pretrained of transformers 5 splits them: by name, numbers as
        numbers. (transformers 4 went by the state dict, with the head last.)
        """
        D, F, q, kv = self.D, self.F, self.H * self.E, self.K * self.E
        if not self.tied:
            yield "lm_head.weight", (self.V, D)
        yield "model.embed_tokens.weight", (self.V, D)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield from (
                (prefix + "input_layernorm.weight", (D,)),
                (prefix + "mlp.down_proj.weight", (D, F)),
                (prefix + "mlp.gate_proj.weight", (F, D)),
                (prefix + "mlp.up_proj.weight", (F, D)),
                (prefix + "post_attention_layernorm.weight", (D,)),
                (prefix + "self_attn.k_proj.weight", (kv, D)),
                (prefix + "self_attn.o_proj.weight", (D, q)),
                (prefix + "self_attn.q_proj.weight", (q, D)),
                (prefix + "self_attn.v_proj.weight", (kv, D)),
            )
        yield "model.norm.weight", (D,)

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": self.V,
            "hidden_size": self.D, "intermediate_size": self.F, "num_hidden_layers": self.layers,
            "num_attention_heads": self.H, "num_key_value_heads": self.K, "head_dim": self.E, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "attention_bias": False,
            "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


PRESETS = {
    # 4.00 GB in 5 shards of up to 1 GB; first and last layer, embedding, norm and head are 1.03 GB (26 %)
    "llama-2b": Shapes(layers=30, V=100352, D=2048, F=6912, H=32, K=8, E=64),
    # 16.06 GB; 2.97 GB (18.5 %). The published one has 4 shards of up to 5 GB.
    "llama-3.1-8b": Shapes(layers=32, V=128256, D=4096, F=14336, H=32, K=8, E=128),
    "tiny": Shapes(layers=4, V=256, D=64, F=192, H=4, K=2, E=16, shard_bytes=100_000),
}


def split_shards(shapes: Shapes) -> dict[str, list[str]]:
    """{file name: tensors in it}, by the function with which save_pretrained splits."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    meta = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.tensors()}
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=shapes.shard_bytes
    )
    return split.filename_to_tensors


def make_checkpoint(folder: Path, shapes: Shapes, seed: int = 0) -> Path:
    """Write the checkpoint, or find it complete from an earlier call; returns `folder`.

    Raises:
        RefusedError: the folder exists and is not this checkpoint, or the disk has no room.
    """
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.tensors()}
    total, stamp = sum(sizes.values()), json.dumps(asdict(shapes) | {"seed": seed}, sort_keys=True)
    mark = folder / "synthetic.json"
    if folder.exists():
        if mark.is_file() and mark.read_text() == stamp:
            return folder
        raise RefusedError(f"{folder}: exists and is not this synthetic checkpoint. Name another folder or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * total:
        raise RefusedError(f"{folder}: needs {total / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    shards = split_shards(shapes)
    generator = np.random.Generator(np.random.SFC64(seed))
    shape_of, done = dict(shapes.tensors()), 0
    with progress_bar("writing MB", total // 10**6) as update:

        def report(count: int) -> None:
            nonlocal done
            done += count
            update(done // 10**6, "")

        for name, held in shards.items():
            with open(part / name, "xb") as file:
                file.write(_header({tensor: shape_of[tensor] for tensor in sorted(held)}))
                for tensor in sorted(held):
                    _write_random(file, sizes[tensor], 0x3F80 if "norm" in tensor else 0x3C00, generator, report)
                file.flush()
                os.fsync(file.fileno())  # dirty pages cannot be dropped from the page cache
    if len(shards) > 1:
        metadata = {"total_parameters": total // 2, "total_size": total}
        weight_map = {tensor: name for name, held in shards.items() for tensor in held}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (part / "model.safetensors.index.json").write_text(index)
    (part / "config.json").write_text(json.dumps(shapes.config(), indent=2, sort_keys=True) + "\n")
    (part / mark.name).write_text(stamp)
    part.rename(folder)
    return folder


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Length and JSON of a safetensors file as the library writes them, for tensors in this order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + 2 * int(np.prod(shape))
        fields[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_random(
    file: IO[bytes], count: int, exponent: int, generator: np.random.Generator, report: Callable[[int], None]
) -> None:
    """`count` bytes of bf16 with random sign and mantissa and the given exponent bits."""
    keep, base = (np.uint64(bits * 0x0001_0001_0001_0001) for bits in (0x807F, exponent))
    if exponent == 0x3F80:
        keep = np.uint64(0x007F_007F_007F_007F)  # a norm's weight is positive
    while count:
        size = min(count, BLOCK_BYTES)
        bits = generator.integers(0, 2**64 - 1, -(-size // 8), dtype=np.uint64, endpoint=True)
        bits &= keep
        bits |= base
        file.write(bits.view(np.uint8)[:size].data)
        count -= size
        report(size)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-bytes", type=int, help="largest shard (default: the preset's)")
    options = parser.parse_args()
    shapes = PRESETS[options.preset]
    if options.shard_bytes:
        shapes = replace(shapes, shard_bytes=options.shard_bytes)
    print(make_checkpoint(options.folder, shapes))


if __name__ == "__main__":
    main()
