"""A small real tokenizer for tests: byte-level BPE, trained on a few sentences in well under a second."""

from __future__ import annotations

import json
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_TEXT = "<|begin|>"

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep near the river.",
    "A small model learns a new language from the first and the last of its layers.",
    "She sells sea shells by the sea shore, and the shells she sells are surely sea shells.",
    "Every layer of the model reads what the layer before it has written, and writes for the next.",
    "The weather in the mountains changes quickly: rain in the morning, sunshine in the afternoon.",
    "日本語の文章も少しだけ混ぜておきます。日本語のトークンが必要です。",
)


def make_tokenizer(folder: Path, vocab_size: int = 320, *, adds_bos: bool = False) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder` and return it.

    The vocabulary has exactly `vocab_size` entries with the ids 0 .. vocab_size - 1: the end-of-text token
    (id 0), with `adds_bos` a begin-of-text token (id 1) that the tokenizer puts in front of every text, the
    256 bytes, merges as far as the sentences give any, and unused entries up to the size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, BEGIN_OF_TEXT] if adds_bos else [END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN_OF_TEXT} $A", special_tokens=[(BEGIN_OF_TEXT, 1)]
        )
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(len(vocabulary), vocab_size):
        vocabulary[f"unused{number}"] = number
    if len(vocabulary) != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is too small: {len(vocabulary)} entries are needed")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    if adds_bos:
        settings["bos_token"] = BEGIN_OF_TEXT
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def add_chat_template(folder: Path, template: str | None = CHATML, tokens: tuple[str, ...] = CHAT_TOKENS) -> Path:
    """Give the tokenizer in `folder` a chat template (None: none), and special tokens with the ids behind its last."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    first = 1 + max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, token in enumerate(tokens):
        content["added_tokens"].append({"id": first + number, "content": token, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
