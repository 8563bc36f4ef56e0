"""Conversations to documents for supervised fine-tuning: the chat template's text, and which of it carries a loss.

A line is {"messages": [{"role", "content"}, ...]}; it is rendered with the tokenizer's own chat template and is one
document, exactly the ids that the model sees in use, with nothing put around them. A loss is on what the model has to
write itself: from behind the prompt of each assistant turn to its end-of-turn token, that included, and not on the
line break that many templates put behind it.

Templates differ, and few mark their turns ({% generation %}). So the turns are found by rendering: the conversation up
to a turn with the generation prompt, then with the turn, then the whole; each text has to be the beginning of the
next. A template that shows a turn otherwise once another follows (one that drops earlier reasoning, for example) breaks
this, and is refused at the first line where it does. A template that asks for the date gives another text on
another day.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elo_engine.data.documents import Document, InputFile, make_document, read_records
from elo_engine.errors import UsageError

MESSAGES = "messages"
ASSISTANT = "assistant"
_PREFIX_ADVICE = (
    "so its turns cannot be told apart. Split the conversation so that this turn is the last, or use a template that "
    "shows a turn the same whatever follows"
)


@dataclass(frozen=True)
class ChatEncoder:
    """Conversations of JSON lines to ids and loss flags, by a tokenizer with a chat template.

    template_sha256: of the template and the special tokens that it may insert. added: the tokenizer's added tokens
    with visible text, the longest first.
    """

    tokenizer: Any
    template_sha256: str
    added: tuple[str, ...]

    def read(self, file: InputFile, offset: int, line: int) -> Iterator[Document]:
        """Documents of one file from the position that an earlier one carried.

        `text` is the whole rendered conversation, `utf8_bytes` counts what the assistant says alone, so that bits per
        byte are those of what is predicted. Raises UsageError naming file and line.
        """
        for record, end, number in read_records(file.path, offset, line):
            where = f"{file.path}, line {number}"
            messages = _messages(record, where)
            text = self._render(messages, where)
            loss, said = self._turns(messages, text, where)
            yield make_document(file.path, f"line {number}", text, end, number)._replace(utf8_bytes=said, loss=loss)

    def encode(self, documents: Sequence[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids, int64 [length], and which of them carry a loss, bool [length]: those with a character in a stretch.

        So a token that joins a prompt's last space with the first word behind it carries one: the word is in no other.
        """
        texts = [document.text for document in documents]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for document, encoding in zip(documents, encodings, strict=True):
            begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
            loss = np.zeros(len(begins), dtype=bool)
            for begin, end in document.loss or ():
                loss |= (ends > begin) & (begins < end)
            yield np.array(encoding.ids, dtype=np.int64), loss

    def _render(self, messages: list[dict[str, Any]], where: str, *, prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template is a program, and may fail in any way that jinja has
            until = f"the first {len(messages)} messages" if messages else "no message before the assistant's first"
            raise UsageError(
                f"{where}: the tokenizer's chat template cannot render {until} ({error}); mend or remove the line"
            ) from None

    def _turns(
        self, messages: list[dict[str, Any]], text: str, where: str
    ) -> tuple[tuple[tuple[int, int], ...], int]:
        """The stretches of `text` that carry a loss, and the UTF-8 bytes of the assistant's words in them."""
        loss: list[tuple[int, int]] = []
        said, shown = 0, ""
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self._render(messages[:number], where, prompt=True)
            turn = self._render(messages[: number + 1], where) if number + 1 < len(messages) else text
            if not (prompt.startswith(shown) and turn.startswith(prompt)):
                raise UsageError(
                    f"{where}: the chat template's text up to message {number + 1} does not begin with its text up to "
                    f"the one before, {_PREFIX_ADVICE}"
                )
            begin, shown = len(prompt), turn
            words = message["content"].strip()
            at = _find(turn[begin:], words)
            if at < 0:
                raise UsageError(
                    f"{where}: the chat template changes the text of message {number + 1}, so its end cannot be found; "
                    "mend or remove the line"
                )
            loss.append((begin, self._end_of_turn(turn, begin + at + len(words))))
            said += len(words.encode(errors="replace"))  # halves of surrogate pairs are refused with the document
        if not text.startswith(shown):
            raise UsageError(
                f"{where}: the chat template's text of the conversation does not begin with its text up to the last "
                f"assistant turn, {_PREFIX_ADVICE}"
            )
        if not loss:
            roles = ", ".join(sorted({message["role"] for message in messages}))
            raise UsageError(
                f"{where}: no message has the role {ASSISTANT!r} (roles here: {roles}), so nothing carries a loss"
            )
        return tuple(loss), said

    def _end_of_turn(self, turn: str, end: int) -> int:
        """Where the loss ends behind the words that end at `end`: behind the added token that follows; without one,
        behind what the template writes there, but for white space at its end.
        """
        rest = turn[end:]
        blank = len(rest) - len(rest.lstrip())
        for token in self.added:
            if rest.startswith(token, blank):
                return end + blank + len(token)
        return end + (len(rest.rstrip()) or len(rest))


def _find(turn: str, words: str) -> int:
    """Where the words are in a turn that may begin otherwise (an empty thought); -1 when they are not."""
    blank = len(turn) - len(turn.lstrip())
    if not words:
        return 0
    return blank if turn.startswith(words, blank) else turn.rfind(words)


def chat_encoder(folder: Path, tokenizer: Any) -> ChatEncoder:
    """For the tokenizer of a local folder. UsageError: it has no chat template."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(
            f"{folder}: the tokenizer has no chat template, so conversations cannot be rendered; put the "
            "chat_template.jinja of an instruction-tuned model of the same vocabulary beside tokenizer.json"
        ) from None
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    seal = json.dumps([template, special], sort_keys=True).encode()
    return ChatEncoder(tokenizer, hashlib.sha256(seal).hexdigest(), tuple(sorted(added, key=len, reverse=True)))


def require_jsonl(files: list[InputFile]) -> None:
    """UsageError unless all inputs are JSON lines."""
    for file in files:
        if file.kind != "jsonl":
            raise UsageError(f"{file.path}: conversations are read from .jsonl files alone; write one a line")


def _messages(record: object, where: str) -> list[dict[str, Any]]:
    messages = record.get(MESSAGES) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        shape = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        raise UsageError(f"{where}: no list of messages in it; a line must be {shape}")
    for number, message in enumerate(messages):
        fields = [message.get(key) if isinstance(message, dict) else None for key in ("role", "content")]
        if not all(isinstance(field, str) for field in fields):
            raise UsageError(
                f"{where}: message {number + 1} has no role or no content that is a string; other kinds of content, "
                "such as calls of tools, are not supported"
            )
    return messages
