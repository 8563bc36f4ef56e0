"""Records of measurements on disk: `<records>/<date>_<card>_<theme>/`, written whole or not at all, never written over.

config.json (theme, command, settings, commit), environment.json, raw.json (every step), result.json (one of the schemas
of tables.py), README.md (made from the rest; prose may be added to it), COMMIT.json (hashes: figures that were changed
afterwards are refused). A reading that turns out wrong stays and is withdrawn by a WITHDRAWN.md that says why; it feeds
no table. Folders from before this scheme have no result.json: they are listed, never parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.schemas import SCHEMA, check_raw, check_result
from elo_engine.benchmarks.tables import record_readme
from elo_engine.checkpoint.publish import publish
from elo_engine.checkpoint.publish_file import publish_file
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
RESULT, RAW, CONFIG, ENVIRONMENT = "result.json", "raw.json", "config.json", "environment.json"
WITHDRAWN, REJECTED = "WITHDRAWN.md", "result.rejected.json"


@dataclass(frozen=True)
class Record:
    """One folder. `theme` and what is read from JSON are None for an earlier record; `withdrawn` is the reason."""

    path: Path
    title: str
    withdrawn: str | None
    theme: str | None = None
    result: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None

    @property
    def order(self) -> tuple[str, str]:
        """Sorts from the oldest to the newest."""
        return str((self.config or {}).get("created", self.path.name[:10])), self.path.name

    def raw(self) -> dict[str, Any]:
        """Every step, read when asked for."""
        found = _read_json(self.path, RAW)
        check_raw(str(self.theme), found, str(self.path / RAW))
        return found


def read_records(records: Path) -> list[Record]:
    """All records, oldest first.

    Raises:
        UsageError: no such folder. FailedError: a result that does not fit its schema, or was changed after it was
            written.
    """
    if not records.is_dir():
        raise UsageError(f"{records}: no folder of records; a benchmark makes one, or name another with --records")
    found = [path for path in records.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted((read_record(path) for path in found), key=lambda record: record.order)


def read_record(path: Path) -> Record:
    """One record; raises as `read_records` does."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such record; the folders below benchmarks/records are records")
    withdrawn = None
    if (path / WITHDRAWN).exists():
        text = (path / WITHDRAWN).read_text(encoding="utf-8")
        withdrawn = " ".join(line for line in text.splitlines() if not line.startswith("#")).strip()
    readme = path / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.exists() else []
    title = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "(no README)")
    if not (path / RESULT).exists():
        return Record(path, title, withdrawn)
    result, config, environment = (_read_json(path, name) for name in (RESULT, CONFIG, ENVIRONMENT))
    check_result(result, str(path / RESULT))
    return Record(path, title, withdrawn, result["theme"], result, config, environment)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = (path / name).read_bytes()
        sealed = json.loads((path / "COMMIT.json").read_bytes())["files"][name]["sha256"]
        found = json.loads(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedError(f"{path / name} (or COMMIT.json beside it) cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != sealed:
        raise FailedError(
            f"{path / name}: was changed after it was written. Records are append-only: bring it back (git checkout), "
            f"withdraw it with a {WITHDRAWN} that says why, and measure again"
        )
    if not isinstance(found, dict):
        raise FailedError(f"{path / name}: is no JSON object")
    return found


def new_record(records: Path, theme: str, card: str) -> Path:
    """A folder that is not there yet: `<date>_<card>_<theme>`, with -2, -3 and so on while the name is taken.

    `theme` is a name of the record (letters, digits, dots and hyphens), such as `speedup-llama-3.1-8b`.
    """
    for what, value in (("theme", theme), ("card", card)):
        if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", value):
            raise UsageError(f"{what} {value!r} cannot be part of a record's name: lower case, digits, dots, hyphens")
    base = f"{time.strftime('%Y-%m-%d')}_{card}_{theme}"
    number, path = 1, records / base
    while os.path.lexists(path):
        number += 1
        path = records / f"{base}-{number}"
    return path


def write_record(
    records: Path,
    *,
    card: str,
    result: dict[str, Any],
    raw: dict[str, Any],
    environment: dict[str, Any],
    settings: dict[str, Any],
    command: Sequence[str],
    name: str | None = None,
) -> Path:
    """Keep a measurement; returns its folder, which is on the disk by then.

    `name`: last part of the folder's name, the theme by default. Numbers that JSON has no word for (a loss that is not
    finite) become null. Folders in `command` are shortened to their last component.

    Raises:
        FailedError: the result does not fit its schema, or the steps their form. What was measured is kept all the
            same, in a record without result.json (it is in result.rejected.json) that no table reads; the message
            names it.
    """
    result, raw = _plain(result), _plain(raw)
    rejected: FailedError | None = None
    try:
        check_result(result, RESULT)
        check_raw(result["theme"], raw, RAW)
    except FailedError as error:
        rejected = error
    theme = str(result.get("theme"))
    config = {
        "schema": SCHEMA, "theme": theme, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": portable_command(command), "settings": _portable(settings), "git": git_state(),
    }  # fmt: skip
    readme = f"# Not a result: {theme}\n\n{rejected}\n" if rejected else record_readme(result, config, environment)
    files = {RESULT if rejected is None else REJECTED: result, RAW: raw, CONFIG: config, ENVIRONMENT: environment}
    while True:
        path = new_record(records, name or theme, card)
        try:
            with publish(path) as folder:
                for file, content in files.items():
                    text = json.dumps(_plain(content), indent=None if file == RAW else 1, allow_nan=False) + "\n"
                    (folder / file).write_text(text, encoding="utf-8")
                (folder / "README.md").write_text(readme, encoding="utf-8")
            break
        except RefusedError:
            if not path.exists():  # else another writer took the name meanwhile: the next one
                raise
    if rejected:
        raise FailedError(f"{rejected}. What was measured is kept in {path}") from rejected
    return path


def withdraw(record: Path, why: str) -> Path:
    """Write WITHDRAWN.md: the record stays, listed with its reason, and feeds no table any more.

    Raises:
        UsageError: no record there, or no reason. RefusedError: it is withdrawn already.
    """
    if not any((record / name).exists() for name in (RESULT, "README.md")):
        raise UsageError(f"{record}: not a record (it has neither {RESULT} nor README.md)")
    if not why.strip():
        raise UsageError(f"{record}: a record is withdrawn for a reason; say it in a sentence")
    target = record / WITHDRAWN
    with publish_file(target) as (fd, _):
        os.write(fd, f"# Withdrawn\n\n{time.strftime('%Y-%m-%d')}: {why.strip()}\n".encode())
    return target


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN and no infinity, numbers of numpy and torch as Python's, a path as its name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return value.name
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def _portable(value: Any) -> Any:
    """Settings without this machine's folders."""
    if isinstance(value, dict):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return portable_command([value])[0] if isinstance(value, str) else value


def portable_command(command: Sequence[str]) -> list[str]:
    """A command line without this machine's folders: `/a/b/c` -> `c`, `--model=/a/b` -> `--model=b`."""
    return [re.sub(r"(^|=)/(?:[^/=]*/)*([^/=]*)$", r"\1\2", word) for word in command]


def git_state(root: Path = ROOT) -> dict[str, Any] | None:
    """Commit of the source tree and whether files other than records differ from it; None without git or repository."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # installed into somebody else's repository
        dirty = ask("status", "--porcelain", "--", ".", ":(exclude)benchmarks/records")
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.SubprocessError):
        return None


# CPUID family, first and last model, generation: for processors whose name says nothing of it, as in virtual machines
_ZEN = (
    (23, 0x00, 0x2F, "zen1"), (23, 0x30, 0xFF, "zen2"), (25, 0x00, 0x0F, "zen3"), (25, 0x10, 0x1F, "zen4"),
    (25, 0x20, 0x5F, "zen3"), (25, 0x60, 0xFF, "zen4"), (26, 0x00, 0xFF, "zen5"),
)  # fmt: skip


def card_name(device: str = "auto", environment: dict[str, Any] | None = None) -> str:
    """What ran it, as records' folders name it: `h200`, `rtx-4090`, `epyc-zen3-2core`.

    `device`: cpu, cuda, or auto for the GPU if the environment has one.
    """
    environment = describe_environment() if environment is None else environment
    if device != "cpu" and environment["gpus"]:
        return _slug(re.sub(r"NVIDIA|GeForce|Tesla|AMD|Radeon|Graphics", " ", environment["gpus"][0]["name"]))
    if device.startswith("cuda"):
        raise UsageError("the card of a GPU is asked for, and the environment has none")
    name = re.sub(r"\((R|TM|r|tm)\)|@.*$|\b\d+-Core\b|\b(AMD|Intel|CPU|Processor)\b", " ", environment["cpu"])
    slug = _slug(name)
    if not re.search(r"\d", slug):
        slug = "-".join(filter(None, (slug, _zen())))
    return f"{slug or 'cpu'}-{environment['cpu_cores']}core"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _zen() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", first, re.MULTILINE))
    if fields.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(fields.get("cpu family", 0)), int(fields.get("model", 0))
    return next((zen for f, first, last, zen in _ZEN if f == family and first <= model <= last), "")
