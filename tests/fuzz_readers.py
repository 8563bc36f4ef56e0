"""One reader a class: valid files in a folder, a mutation of one of them, and what reading it must come to.

`Case.one(chance)` makes one mutated input and reads it. It returns whether the input was accepted; a typed error is a
refusal; everything else that comes out is a fault of the reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_cases import CASES, SHAPE
from fuzz_fixture import VALUES, mutated, scrambled
from safetensors.torch import save_file
from snapshot_fixture import IDENTITY, save
from store_fixture import make_store_folder

from elo_engine.checkpoint import diff_checkpoints, open_checkpoint, verify_commit
from elo_engine.checkpoint.header import parse_header
from elo_engine.checkpoint.index import _config
from elo_engine.checkpoint.partial_record import PARTIAL_NAME, PartialShard, Record, _sealed_text, read_record
from elo_engine.checkpoint.patch_file import PatchFile
from elo_engine.config import load_config, make_config
from elo_engine.data.documents import inspect_inputs, read_documents
from elo_engine.data.manifest import MANIFEST
from elo_engine.data.store import TokenStore
from elo_engine.errors import EloError
from elo_engine.model.layers import Packing, RopeTable
from elo_engine.model.spec import read_spec
from elo_engine.train.state import read_progress

CONFIG = {
    "model": "m", "output": "o", "dtype": "bf16", "seed": 3,
    "data": {"shards": {"ja": "x", "en": "y"}, "mix": {"ja": 9, "en": 1.5}, "sequence_length": 64},
    "detach": {"layers": ["first", "2-3", -1], "bridge": "linear", "ridge": 1e-2},
    "pretrain": {"tokens": "900M", "tokens_per_step": 4096, "optimizer": {"lr": "3e-4", "betas": [0.9, 0.95]}},
    "align": {"tokens": 1e8, "micro_batch": 1, "stream": {"store": "memory"}, "schedule": {"warmup": 0.1}},
    "evaluate": {"every": 3, "shards": {"ja": "z"}}, "snapshot": {"keep": 2},
}  # fmt: skip
YAML = (
    "&a [*a]", "*a", "{? [1]: 2}", "{<<: 1}", "2001-99-99", "2001-02-03", "!!int x", "!!int ''", "!!float x",
    "!!bool x", "!!timestamp x", "!!binary é", "!!set {a}",
    "!!python/object:os.system x", "0b_", "0x_", "1:99", "=", "~", ".nan",
    ".inf", "-.inf", "0x" + "f" * 6000, "0o7", '"\\0"', '"\\ud800"', "|", "? ", "{a: 1, a: 2}", "[*b, *b]",
    "[&b [" + "1," * 40 + "1], &c [" + "*b," * 40 + "*b], &d [" + "*c," * 40 + "*c], &e [" + "*d," * 40 + "*d], "
    "&f [" + "*e," * 40 + "*e], &g [" + "*f," * 40 + "*f]]",
)  # fmt: skip


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


class Case:
    """folder: of its own, to be written at will."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def one(self, chance: random.Random) -> bool:
        try:
            self.read(chance)
        except EloError as error:
            assert str(error) and len(str(error)) < 20_000, "a message that nobody can read"
            str(error).encode("utf-8", "backslashreplace")
            return False
        return True

    def read(self, chance: random.Random) -> None:
        raise NotImplementedError


class Header(Case):
    """The header of a safetensors file."""

    def read(self, chance: random.Random) -> None:
        shapes = {"a": [2, 3], "b.weight": [5], "empty": [0, 7], "c": []}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shapes.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
        data = bytes(position)
        if chance.random() < 0.3:
            blob = scrambled(with_header(json.dumps(header).encode(), data), chance)
        else:
            blob = with_header(mutated(header, chance), data)
        entries, _ = parse_header(blob, shard="s", file_size=len(blob))
        for entry in entries.values():
            assert 0 <= entry.begin <= entry.end <= len(blob)


class Checkpoint(Case):
    """A checkpoint's index, configuration and shards, as a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index: dict[str, Any] = {"metadata": {"total_size": 48}, "weight_map": {}}
        for number, names in ((1, ("a", "b")), (2, ("c",))):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: torch.zeros(2, 3) for name in names}, folder / shard, {"format": "pt"})
            self.index["weight_map"] |= dict.fromkeys(names, shard)
        self.config = {"model_type": "llama", "text_config": {"a": 1}, "layer_types": ["x"], "rope_theta": 1e4}
        self.valid = {
            "config.json": json.dumps(self.config).encode(),
            "model.safetensors.index.json": json.dumps(self.index).encode(),
            **{path.name: path.read_bytes() for path in folder.glob("*.safetensors")},
        }
        for name, raw in self.valid.items():
            (folder / name).write_bytes(raw)

    def read(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self.valid) + ["model.safetensors.index.json"] * 4)
        tree = {"config.json": self.config, "model.safetensors.index.json": self.index}.get(name)
        extra = {"extra": ("quantization_config", "auto_map")} if name == "config.json" else {}
        raw = scrambled(self.valid[name], chance) if tree is None else mutated(tree, chance, **extra)
        try:
            (self.folder / name).write_bytes(raw)
            index = open_checkpoint(self.folder)
            assert set(index.entries) == {"a", "b", "c"}
        finally:
            (self.folder / name).write_bytes(self.valid[name])


class ModelConfig(Case):
    """config.json of every family, to the tables of its rotary embedding."""

    EXTRA = (
        "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types", "quantization_config", "mlp_bias",
        "head_dim", "max_window_layers", "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval",
        "attn_logit_softcapping", "use_sliding_window", "hidden_activation", "rope_local_base_freq",
    )  # fmt: skip
    SCALING = (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1},
        {"type": "linear", "factor": 2.0}, None,
    )  # fmt: skip

    def read(self, chance: random.Random) -> None:
        family, fields = CASES[chance.choice(sorted(CASES))]
        config = {**SHAPE, "hidden_act": None, "model_type": family, **fields}
        if "rope_scaling" not in config and (scaling := chance.choice(self.SCALING)):
            config["rope_scaling"] = scaling
        (self.folder / "config.json").write_bytes(mutated(config, chance, extra=self.EXTRA))
        spec = read_spec(_config((self.folder / "config.json").read_bytes(), self.folder))
        assert spec.parameters > 0 and spec.scale > 0 and spec.norm_sizes and spec.windows is not None
        assert len({spec.kind(index) for index in range(0, spec.layers, max(1, spec.layers // 50))}) <= 4
        if spec.E <= 4096:
            packing = Packing([0, 2], torch.tensor([0, 1]))
            for rope in RopeTable(spec, torch.device("cpu")).gather(packing, 2):
                assert bool(rope.cos_PR.isfinite().all())


class RunConfiguration(Case):
    """The YAML of a run: what is accepted is written out and read back as itself."""

    def read(self, chance: random.Random) -> None:
        tree = json.loads(make_config(CONFIG).model_dump_json()) if chance.random() < 0.3 else CONFIG
        path = self.folder / "config.yaml"
        path.write_bytes(mutated(tree, chance, values=VALUES + YAML))
        config = load_config(path)
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config


def resealed(raw: bytes) -> bytes:
    """A manifest with the checksum of its content, as somebody would write it who changed it on purpose."""
    try:
        body = json.loads(raw)
        parts = [1, body["recipe"], body["shards"], body["totals"]]
        body["checksum"] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return json.dumps(body).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return raw


class Tokens(Case):
    """A token folder: its manifest, also sealed anew, tables and tokens, to the last document."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        make_store_folder(folder, [[5, 6, 0], [7, 0], [1] * 40 + [0], [9, 0]], shard_documents=3)
        super().__init__(folder)
        self.valid = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.manifest = json.loads(self.valid[MANIFEST])

    def read(self, chance: random.Random) -> None:
        name = chance.choice([*sorted(self.valid), MANIFEST, MANIFEST])
        if name == MANIFEST:
            raw = mutated(self.manifest, chance)
            raw = resealed(raw) if chance.random() < 0.7 else raw
        elif name.startswith("documents") and chance.random() < 0.7:
            table = np.frombuffer(self.valid[name], dtype="<i8").copy()
            for _ in range(chance.choice((1, 2, 4))):
                table[chance.randrange(len(table))] = chance.choice((0, 1, -1, 3, 2**62, 2**63 - 1, -(2**63), 46))
            raw = table.tobytes()
        else:
            raw = scrambled(self.valid[name], chance)
        try:
            (self.folder / name).write_bytes(raw)
            store = TokenStore(self.folder)
            total = 0
            for index in range(store.documents):
                tokens = store.document(index)
                assert len(tokens) == store.lengths[index] > 0
                total += len(tokens)
            assert total == store.tokens_total and int(store.text_bytes_by_doc.sum()) == store.text_bytes
            store.check_ids(store.vocab_size)
            store.verify()
        finally:
            (self.folder / name).write_bytes(self.valid[name])


class Snapshot(Case):
    """COMMIT.json and state.json of a snapshot; state.json is also read without what COMMIT.json says of it."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        super().__init__(folder)
        self.snapshot = save(folder, 4)
        self.valid = {path.name: path.read_bytes() for path in self.snapshot.iterdir()}

    def read(self, chance: random.Random) -> None:
        name = chance.choice(("COMMIT.json", "state.json"))
        raw = mutated(json.loads(self.valid[name]), chance)
        if name == "COMMIT.json" and chance.random() < 0.6:
            raw = self._sealed(raw)
        try:
            (self.snapshot / name).write_bytes(raw)
            if name == "COMMIT.json" or chance.random() < 0.2:
                verify_commit(self.snapshot)
            progress, numerics, _ = read_progress(self.snapshot, IDENTITY)
            assert progress.step >= 0 and isinstance(numerics, dict)
        finally:
            (self.snapshot / name).write_bytes(self.valid[name])

    @staticmethod
    def _sealed(raw: bytes) -> bytes:
        def text(body: dict[str, Any]) -> bytes:
            return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

        try:
            body = json.loads(raw)
            body.pop("commit_sha256", None)
            return text({**body, "commit_sha256": hashlib.sha256(text(body)).hexdigest()})
        except (ValueError, AttributeError, TypeError, RecursionError):
            return raw


class Patch(Case):
    """The header of a patch, also sealed anew."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, value in (("base", 0.0), ("changed", 1.0)):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
            save_file({"a": torch.full((3,), value), "b": torch.zeros(2)}, folder / name / "model.safetensors")
        path = folder / "patch.safetensors"
        path.unlink(missing_ok=True)
        diff_checkpoints(folder / "base", folder / "changed", path)
        self.raw = path.read_bytes()
        self.length = int.from_bytes(self.raw[:8], "little")

    def read(self, chance: random.Random) -> None:
        path = self.folder / "mutated.safetensors"
        header = json.loads(self.raw[8 : 8 + self.length])
        if chance.random() < 0.2:
            path.write_bytes(scrambled(self.raw, chance))
        else:
            metadata = header["__metadata__"]
            if chance.random() < 0.7:
                metadata["contents"] = mutated(json.loads(metadata["contents"]), chance).decode(errors="replace")
            if chance.random() < 0.7:
                tensors = [[n, e["dtype"], e["shape"]] for n, e in header.items() if n != "__metadata__"]
                parts = [metadata["elo_patch"], metadata["base"], metadata["contents"], tensors]
                metadata["seal"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
                text = json.dumps(header).encode()
            else:
                text = mutated(header, chance)
            path.write_bytes(with_header(text, self.raw[8 + self.length :]))
        with PatchFile(path) as patch:
            assert patch.contents.tensors.keys() == patch.entries.keys()


class Partial(Case):
    """PARTIAL.json of a checkpoint that is being fetched, also sealed anew."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shard = PartialShard(900, "a" * 64, '"x"', [(0, 9), (20, 900)])
        Record("a/b", "c" * 40, "https://hub.invalid", {"model.safetensors": shard}).write(folder)
        self.body = json.loads((folder / PARTIAL_NAME).read_bytes())

    def read(self, chance: random.Random) -> None:
        raw = mutated(self.body, chance)
        if chance.random() < 0.6:
            with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
                raw = _sealed_text({k: v for k, v in json.loads(raw).items() if k != "sha256"})
        (self.folder / PARTIAL_NAME).write_bytes(raw)
        record = read_record(self.folder)
        assert record is not None and all(shard.size > 0 for shard in record.shards.values())


class Texts(Case):
    """Text and JSON lines on their way to the tokenizer."""

    LINES = ('{"text": "one あ"}\n', '{"text": "two", "id": 3}\n', "\n", '{"text": ""}\n')

    def read(self, chance: random.Random) -> None:
        kind = chance.choice((".jsonl", ".txt"))
        path = self.folder / f"in{kind}"
        lines = [line.encode() for line in self.LINES]
        if kind == ".jsonl" and chance.random() < 0.7:
            lines[chance.randrange(3)] = mutated({"text": "three", "id": 3}, chance) + b"\n"
            path.write_bytes(b"".join(lines))
        else:
            path.write_bytes(scrambled(b"".join(lines), chance) or b" ")
        [file] = inspect_inputs([path], "text")
        for document in read_documents(file, text_field="text", split_blank_lines=chance.random() < 0.5):
            assert document.utf8_bytes == len(document.text.encode()) and document.offset <= file.size


READERS: dict[str, Callable[[Path], Case]] = {
    "header": Header, "checkpoint": Checkpoint, "model config": ModelConfig, "run config": RunConfiguration,
    "tokens": Tokens, "snapshot": Snapshot, "patch": Patch, "partial": Partial, "texts": Texts,
}  # fmt: skip
