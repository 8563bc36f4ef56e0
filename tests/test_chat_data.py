"""Conversations to token shards: which tokens carry a loss, in the shards, in rows and in training."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elo_engine.data import NO_LABEL, Mixture, TokenStore, build_tokens, sequential_rows, tokenizer_hash, tokens
from elo_engine.data.chat import chat_encoder
from elo_engine.data.documents import inspect_inputs
from elo_engine.data.tokenizer import load_tokenizer
from elo_engine.errors import FailedError, UsageError

from .tokenizer_fixture import CHATML, SENTENCES, add_chat_template

ROOT = Path(__file__).resolve().parents[1]
Messages = list[dict[str, str]]


def talk(*contents: str, system: str = "") -> Messages:
    """User and assistant in turns."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


CONVERSATIONS = (
    talk("What do dogs do?", "They sleep near the river."),
    talk("日本語は。", "はい、日本語です 🦊。", "And then?", "  two  spaces ", system="Be short."),
    talk("one", "two", "three"),
    talk("Say the name <|im_end|> of a token.", "It is <|im_end|>, as you see.", "x", ""),
    talk("a", "line\n\nline\n", "b", "c" * 300),
)


@pytest.fixture(scope="session")
def folder(make_tokenizer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_chat_template(make_tokenizer(tmp_path_factory.mktemp("chat-tokenizer")))


def write_chat(path: Path, conversations: Any) -> Path:
    lines = [json.dumps({"messages": messages, "id": 1}, ensure_ascii=False) for messages in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build(path: Path, folder: Path, out: Path, **more: Any) -> TokenStore:
    build_tokens([path], folder, out, chat=True, **more)
    return TokenStore(out)


def flags_of(store: TokenStore, index: int) -> np.ndarray:
    length = int(store.lengths[index])
    out = np.full(length, 9, dtype=np.uint8)
    store.gather_loss(np.array([index]), np.array([0]), np.array([length]), out)
    return out


def some_conversations(count: int, seed: int = 1) -> list[Messages]:
    rng = random.Random(seed)
    return [
        talk(*(" ".join(rng.choices(SENTENCES, k=rng.randint(1, 2))) for _ in range(rng.choice((2, 3, 4, 6)))))
        for _ in range(count)
    ]


def test_ids_and_losses_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Its `return_assistant_tokens_mask` reads the {% generation %} marks, which are not looked at here."""
    store = build(write_chat(tmp_path / "a.jsonl", CONVERSATIONS), folder, tmp_path / "out")
    oracle = load_tokenizer(folder)
    for number, messages in enumerate(CONVERSATIONS):
        expected = oracle.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert store.document(number).tolist() == expected["input_ids"]
        assert flags_of(store, number).tolist() == expected["assistant_masks"]
        assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    said = [
        sum(len(m["content"].strip().encode()) for m in messages if m["role"] == "assistant")
        for messages in CONVERSATIONS
    ]
    assert store.text_bytes_by_doc.tolist() == said
    loss = np.concatenate([flags_of(store, number) for number in range(len(CONVERSATIONS))])
    assert store.manifest.totals.loss_tokens == int(loss.sum())
    assert store.masked and store.manifest.recipe.text_field == "messages"
    store.verify()


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + (m['content'] | trim) + '<|im_end|>\n\n' }}"
TRIMS += "{% endfor %}"
TRIMS += "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n###\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
LINES = PLAIN.replace("\n###", "")
THINKS = PLAIN.replace(
    "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
)  # an empty thought in every turn


@pytest.mark.parametrize(
    ("template", "messages", "loss"),
    [
        (LLAMA2, talk("u", "a", "v", "b"), [" a <|endoftext|>", " b <|endoftext|>"]),
        (TRIMS, talk("u", " a \n", "v", "<|im_end|>b "), ["a<|im_end|>", "<|im_end|>b<|im_end|>"]),
        (PLAIN, talk("u", "a", "v", "b c"), ["a\n###", "b c\n###"]),
        (LINES, talk("u", "a", "v", "b"), ["a\n", "b\n"]),
        (THINKS, talk("u", "think", "v", "b"), ["<think>\n\n</think>\n\nthink\n###", "<think>\n\n</think>\n\nb\n###"]),
        (CHATML, talk("u", "", "v", "b"), ["<|im_end|>", "b<|im_end|>"]),
        (CHATML, [{"role": "system", "content": "s"}, *talk("u", "b")[1:]], ["b<|im_end|>"]),
    ],
)
def test_the_loss_is_on_what_the_model_writes(
    make_tokenizer: Callable[..., Path], tmp_path: Path, template: str, messages: Messages, loss: list[str]
) -> None:
    folder = add_chat_template(make_tokenizer(tmp_path / "tokenizer"), template)
    encoder = chat_encoder(folder, load_tokenizer(folder))
    (file,) = inspect_inputs([write_chat(tmp_path / "a.jsonl", [messages])], "text")
    (document,) = encoder.read(file, 0, 0)
    assert document.loss is not None and document.offset == file.size and document.line == 1
    assert [document.text[begin:end] for begin, end in document.loss] == loss
    ((ids, flags),) = encoder.encode([document])
    said = encoder.tokenizer.decode(ids[flags])
    if template in (PLAIN, LINES, THINKS):  # the prompt ends with a space, which is in the first word's token
        said = said.replace(" ", "", 1).replace("\n### b", "\n###b") if template == PLAIN else said.replace(" ", "")
    assert said == "".join(loss)


DROPS = PLAIN.replace("m['content']", "(m['content'] if loop.last else m['content'] | replace('a', ''))")
FAILS = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + PLAIN
CHANGES = PLAIN.replace("m['content']", "m['content'] | replace('abc', 'xyz')")
COUNTS = "{% if messages | length == 3 %}{{ 'Three: ' }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("message", "template", "line"),
    [
        (r"up to message 4 does not begin with its text up to the one before", DROPS, talk("u", "a", "v", "b")),
        (r"of the conversation does not begin with its text up to the last", COUNTS, talk("u", "b", "v")),
        (r"cannot render the first \d messages \(too many turns\)", FAILS, talk("u", "a", "v", "b")),
        (r"changes the text of message 2", CHANGES, talk("u", "abc")),
        (r"no message has the role 'assistant' \(roles here: user\)", CHATML, talk("u")),
        (r"cannot render no message before the assistant's first", CHATML, talk("u", "b")[1:]),
        (r"no list of messages", CHATML, []),
        (r"message 1 has no role or no content", CHATML, [{"role": "user"}]),
        (r"message 2 has no role or no content", CHATML, [*talk("u"), {"role": "assistant", "content": None}]),
        (r"message 1 has no role or no content", CHATML, ["text"]),
        (r"half of a surrogate pair", CHATML, talk("u", "\ud800")),
    ],
)
def test_lines_that_cannot_be_meant_are_named(
    make_tokenizer: Callable[..., Path], tmp_path: Path, message: str, template: str, line: Any
) -> None:
    folder = add_chat_template(make_tokenizer(tmp_path / "tokenizer"), template)
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": talk("u", "b")})
    path.write_text(f"{good}\n\n" + json.dumps({"messages": line}) + "\n")
    with pytest.raises(UsageError, match=rf"a\.jsonl, line 3: .*{message}"):
        build(path, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_and_tokenizers_without_conversations_are_refused(
    make_tokenizer: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    path = write_chat(tmp_path / "a.jsonl", CONVERSATIONS)
    with pytest.raises(UsageError, match="has no chat template"):
        build(path, make_tokenizer(tmp_path / "plain"), tmp_path / "out")
    text = tmp_path / "a.txt"
    text.write_text("text")
    with pytest.raises(UsageError, match=r"a\.txt: conversations are read from \.jsonl"):
        build(text, folder, tmp_path / "out")
    for content, message in (('{"text": "x"}\n', "line 1: no list of messages"), ("[1]\n", "no list"), ("{\n", "JSON")):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            build(path, folder, tmp_path / "out")
    write_chat(path, [talk("u", " "), talk("u", "\n", "v", "")])
    with pytest.raises(UsageError, match="no text in this file"):
        build(path, folder, tmp_path / "out")
    write_chat(path, [talk("u", " "), *CONVERSATIONS])
    assert build(path, folder, tmp_path / "out").manifest.totals.empty_documents == 1


def test_text_shards_are_what_they_were(folder: Path, tmp_path: Path) -> None:
    """The manifest as the format had it before there were masks, written out by hand."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The quick brown fox."}\n{"text": ""}\n{"text": "x"}\n')
    build_tokens([path], folder, tmp_path / "out")
    found = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert found.keys() == {"manifest.json", "tokens-00000.bin", "documents-00000.bin"}
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    count = len(found["tokens-00000.bin"]) // 2
    recipe = {
        "tokenizer_sha256": tokenizer_hash(folder), "vocab_size": 322, "dtype": "uint16", "eos_id": 0, "bos_id": None,
        "text_field": "text", "split_blank_lines": False, "shard_tokens": 1 << 24,
        "inputs": [{
            "name": "a.jsonl", "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }],
    }  # fmt: skip
    shard = {
        "tokens": count, "documents": 2, "text_bytes": 21, "tokens_sha256": sha["tokens-00000.bin"],
        "documents_sha256": sha["documents-00000.bin"],
    }  # fmt: skip
    totals = {"tokens": count, "documents": 2, "text_bytes": 21, "empty_documents": 1}
    checksum = hashlib.sha256(json.dumps([1, recipe, [shard], totals], sort_keys=True).encode()).hexdigest()
    manifest = {"format": 1, "recipe": recipe, "shards": [shard], "totals": totals, "checksum": checksum}
    assert found["manifest.json"] == (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    store = TokenStore(tmp_path / "out")
    assert not store.masked
    assert (next(sequential_rows(store, 4, 1)).labels_BT >= 0).all()


@pytest.mark.parametrize("packing", ["document", "concat"])
def test_rows_have_labels_where_the_next_token_carries_a_loss(folder: Path, tmp_path: Path, packing: str) -> None:
    path = write_chat(tmp_path / "a.jsonl", some_conversations(40))
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES * 9))
    store = build(path, folder, tmp_path / "chat", shard_tokens=2000)
    assert len(store.manifest.shards) > 2
    build_tokens([text], folder, tmp_path / "text")
    mixture = Mixture({"chat": store, "text": TokenStore(tmp_path / "text")}, {"chat": 2, "text": 1}, 48, 7, packing)
    # what the rows are cut from, the documents in the order of the epoch
    order, _ = mixture._epoch("chat", 0)
    ids = np.concatenate([store.document(index).astype(np.int64) for index in order])
    flags = np.concatenate([flags_of(store, index) for index in order])
    first = np.concatenate([[True] + [False] * (int(store.lengths[index]) - 1) for index in order])
    rows = mixture.rows(0, 60)
    chat = [n for n, language in enumerate(rows.languages) if language == "chat"]
    assert len(chat) == 40
    count = len(chat) * 48
    assert (rows.ids_BT[chat].ravel() == ids[:count]).all()
    wanted = np.where(flags[1 : count + 1] == 1, ids[1 : count + 1], NO_LABEL)
    if packing == "document":
        wanted[first[1 : count + 1]] = NO_LABEL
    assert (rows.labels_BT[chat].ravel() == wanted).all()
    plain = [n for n, language in enumerate(rows.languages) if language == "text"]
    assert (rows.labels_BT[plain] != NO_LABEL).mean() > 0.9
    assert 0.1 < (rows.labels_BT[chat] != NO_LABEL).mean() < 0.9
    scored = sum(batch.tokens_loss for batch in sequential_rows(store, 48, 5))
    assert scored == store.manifest.totals.loss_tokens  # no conversation begins with a token that carries a loss


def test_an_interrupted_call_continues_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_chat(tmp_path / "a.jsonl", some_conversations(300))
    expected = build(path, folder, tmp_path / "once", shard_tokens=5_000)
    monkeypatch.setattr(tokens, "_BATCH_DOCUMENTS", 16)

    class Stop(Exception):
        pass

    def stop_after(shards: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if len(list((tmp_path / ".out.partial").glob("loss-*"))) > shards:
                raise Stop

        return progress

    for shards in (1, 3):
        with pytest.raises(Stop):
            build(path, folder, tmp_path / "out", shard_tokens=5_000, progress=stop_after(shards))
    state = json.loads((tmp_path / ".out.partial" / "progress.json").read_text())
    assert state["shards"] and state["recipe"]["chat_template_sha256"]
    build(path, folder, tmp_path / "out", shard_tokens=5_000)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("once", "out")]
    assert files[0] == files[1] and len(expected.manifest.shards) > 5


def test_another_template_is_another_recipe(make_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    path = write_chat(tmp_path / "a.jsonl", CONVERSATIONS)
    seen = set()
    for number, template in enumerate((CHATML, PLAIN)):
        folder = add_chat_template(make_tokenizer(tmp_path / f"tokenizer-{number}"), template)
        store = build(path, folder, tmp_path / f"out-{number}")
        seen.add((store.tokenizer_sha256, store.manifest.recipe.chat_template_sha256))
    assert len({tokenizer for tokenizer, _ in seen}) == 1 and len(seen) == 2


def test_a_damaged_mask_is_seen(folder: Path, tmp_path: Path) -> None:
    store = build(write_chat(tmp_path / "a.jsonl", CONVERSATIONS), folder, tmp_path / "out")
    path = tmp_path / "out" / "loss-00000.bin"
    content = path.read_bytes()
    assert len(content) == store.tokens_total
    path.write_bytes(bytes([1 - content[0]]) + content[1:])
    with pytest.raises(FailedError, match=r"loss-00000\.bin: content differs"):
        TokenStore(tmp_path / "out").verify()
    with pytest.raises(FailedError, match=r"loss-00000\.bin: changed while in use"):
        store.check_unchanged()
    path.write_bytes(content[:-1])
    with pytest.raises(FailedError, match=r"loss-00000\.bin: \d+ bytes where the manifest has"):
        TokenStore(tmp_path / "out")
    path.unlink()
    with pytest.raises(FailedError, match=r"loss-00000\.bin: cannot be opened"):
        TokenStore(tmp_path / "out")


def test_memory_does_not_grow_with_the_conversations(folder: Path, tmp_path: Path) -> None:
    """After 0.8 MB of conversations, 2.5 MB raise the process's peak by less than 3 MiB.

    Bound: what is kept is 16 bytes a document, and a batch of texts (0.5 MB) is in both. Holding the texts would take
    their size, holding their ids and flags 9 bytes for each of more than half a million tokens.
    """
    line = json.dumps({"messages": talk("What do the dogs do near the river? " * 200, "They sleep. " * 450)}) + "\n"
    for name, count in (("small", 60), ("large", 200)):
        (tmp_path / f"{name}.jsonl").write_text(line * count)
    code = f"""
import resource
from pathlib import Path
from elo_engine.data.tokens import build_tokens
for name in ("small", "large"):
    folder = Path({str(tmp_path)!r})
    manifest = build_tokens([folder / f"{{name}}.jsonl"], Path({str(folder)!r}), folder / name, chat=True)
    print(manifest.totals.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (_, small_bytes), (tokens_total, large_bytes) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert tokens_total > 500_000
    assert large_bytes - small_bytes < 3 << 20, large_bytes - small_bytes


def test_fine_tuning_learns_from_the_assistant_alone(
    make_checkpoint: Callable[..., Path],
    elo: Callable[..., tuple[int, str]],
    write_config: Callable[[dict[str, Any]], Path],
    run_tree: dict[str, Any],
    tmp_path: Path,
) -> None:
    """`elo align` on the shards: the first step's loss is transformers' with the labels of transformers' own mask."""
    import torch
    from transformers import AutoModelForCausalLM

    model = add_chat_template(make_checkpoint(tied=True, vocab_size=336))
    store = build(write_chat(tmp_path / "a.jsonl", some_conversations(30)), model, tmp_path / "chat")
    data = {"shards": {"chat": str(tmp_path / "chat")}, "sequence_length": 128}
    stage = {"tokens_per_step": 512, "micro_batch": 2}
    tree = run_tree | {
        "model": str(model), "data": data, "pretrain": stage | {"tokens": 512},
        "align": stage | {"tokens": 1536, "optimizer": {"lr": 3e-3}}, "evaluate": {"every": 0},
    }  # fmt: skip
    status, shown = elo("align", write_config(tree))
    assert status == 0, shown
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line.get("stage") == "align" and "loss_nats" in line]
    assert len(steps) == 3 and steps[2]["loss_nats"] < steps[0]["loss_nats"]
    rows = Mixture({"chat": store}, {"chat": 1}, 128, 42).rows(0, 4)
    assert steps[0]["tokens_loss"] == rows.tokens_loss < 0.7 * rows.ids_BT.size
    total, bounds = 0.0, rows.segment_starts.tolist()
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for begin, end in itertools.pairwise(bounds):
            ids, labels = (torch.from_numpy(a.ravel()[begin:end]) for a in (rows.ids_BT, rows.labels_BT))
            losses = torch.nn.functional.cross_entropy(
                oracle(ids[None]).logits[0], labels, ignore_index=NO_LABEL, reduction="sum"
            )
            total += float(losses)
    assert steps[0]["loss_nats"] == pytest.approx(total / rows.tokens_loss, rel=1e-5)
