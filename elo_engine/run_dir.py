"""A run on disk: configuration, environment, plan, log, metrics, STATUS, and the folders of its stages.

Nothing is written over but STATUS, which is replaced whole, and once `revision` in the configuration, by the commit it
means. `metrics.jsonl` is append-only: after a resume, steps that were lost appear again, and the last line of a step is
the one that counts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.config import NEVER_CHANGE, RunConfig, changed_keys, flat, load_config
from elo_engine.errors import RefusedError, UsageError
from elo_engine.measure.environment import describe_environment

_CONFIG_NAME = "config.resolved.yaml"
# What a process that was killed while it made a run folder may leave, the lock being the first.
_UNFINISHED = {".lock", "run.json", "environment.json", *(
    f".{name}.tmp" for name in ("run.json", "environment.json", _CONFIG_NAME)
)}  # fmt: skip
_BEAT_S = 1.0  # STATUS is renewed at most this often by work that goes on


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with the commit of the hub's model that the run in its output folder was started from, and with
    what that run chose where a stage's `recompute` or `micro_batch` is auto.

    That commit stands for what was asked for then, also no revision at all: a branch may have moved since, and one run
    reads one commit. Any other `revision` stays as it is, and so does everything where no such run is.
    """
    path = Path(config.output)
    if not (path / _CONFIG_NAME).exists():
        return config
    before = load_config(path / _CONFIG_NAME)
    for name in ("pretrain", "align"):
        asked, had = getattr(config, name), getattr(before, name)
        again = {key: getattr(had, key) for key in ("recompute", "micro_batch") if getattr(asked, key) == "auto"}
        config = config.model_copy(update={name: asked.model_copy(update=again)})
    if before.revision is None or before.model != config.model:
        return config
    if config.revision is not None and config.revision != _run_json(path).get("revision"):
        return config
    return config.model_copy(update={"revision": before.revision})


class RunDir:
    """An open run folder, locked against a second writer until `close`."""

    def __init__(self, path: Path, config: RunConfig, run_id: str, lock: int) -> None:
        self.path, self.config, self.run_id = path, config, run_id
        self._lock = lock
        self._log = (path / "log.txt").open("a", encoding="utf-8")
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        if self._metrics.tell() and not (path / "metrics.jsonl").read_bytes().endswith(b"\n"):
            self._metrics.write("\n")  # a line torn by a crash must not swallow the next one
        self._board = _tensorboard(path)
        self._status: dict[str, Any] = {}
        self._beaten = 0.0
        self.anyway = False  # whether a resume may go on with other data or another version, and say so

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make a new run folder.

        Raises:
            RefusedError: it exists and is not empty.
        """
        path = Path(config.output)
        if path.exists() and not _free(path):
            hint = "continue it with --resume auto, or" if (path / _CONFIG_NAME).exists() else ""
            raise RefusedError(
                f"{path}: the output folder exists and nothing is ever written over; {hint} choose another output"
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        run_id = uuid.uuid4().hex
        created = {"run_id": run_id, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "revision": config.revision}
        _write_durably(path / "run.json", json.dumps(created) + "\n")
        _write_durably(path / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
        # the resolved configuration is what makes the folder a run, so it comes last
        _write_durably(path / _CONFIG_NAME, config.to_yaml())
        return cls(path, config, run_id, lock)

    @classmethod
    def open(cls, path: Path, expected: RunConfig | None = None, *, anyway: bool = False) -> RunDir:
        """Open an existing run; with `expected`, only if that is the configuration it was started with, or `anyway`:
        then it is the run's from now on, the one before stays as `config.resolved-1.yaml` (2, 3), and
        `metrics.jsonl` has what changed.

        Raises:
            UsageError: no run there. RefusedError: another configuration, or another process writes to it.
        """
        resolved = path / _CONFIG_NAME
        if not resolved.exists():
            raise UsageError(
                f"{path}: not a run folder (it has no config.resolved.yaml); start one with elo run or elo pretrain"
            )
        config = load_config(resolved)
        if expected is None:
            config = config.model_copy(update={"output": str(path)})  # it may have been moved
            return cls(path, config, _run_json(path)["run_id"], _lock(path))
        expected = pinned(expected.model_copy(update={"output": str(path)}))
        keys = changed_keys(config, expected)
        never = [key for key in keys if key in NEVER_CHANGE]
        if never or (keys and not anyway):
            ways = "resume with the same one, or start a new run in another output folder"
            if not never:
                ways += ", or go on with --resume anyway, which is recorded as not exact"
            raise RefusedError(
                f"{path}: was started with another configuration, differing in {', '.join(never or keys)}; {ways}"
            )
        run = cls(path, expected, _run_json(path)["run_id"], _lock(path))
        run.anyway = anyway
        if keys:
            run._reconfigured(config, keys)
        return run

    @classmethod
    def obtain(cls, config: RunConfig, resume: bool, *, anyway: bool = False) -> RunDir:
        """`create`, or with `resume` open what is there (`anyway`: see `open`) and create otherwise."""
        path = Path(config.output)
        if resume and (path / _CONFIG_NAME).exists():
            return cls.open(path, config, anyway=anyway)
        return cls.create(config)

    def _reconfigured(self, before: RunConfig, keys: list[str]) -> None:
        """Keep both configurations, and record what differs."""
        number = 1 + len(list(self.path.glob("config.resolved-*.yaml")))
        _write_durably(self.path / f"config.resolved-{number}.yaml", before.to_yaml())
        _write_durably(self.path / _CONFIG_NAME, self.config.to_yaml())
        old, new = flat(before), flat(self.config)
        changed = {key: [old.get(key), new.get(key)] for key in keys}
        self.metric({"event": "configuration changed", "changed": changed})
        self.say(f"continues with another configuration, so not bit for bit: {changed}")

    def pin(self, revision: str | None) -> None:
        """Keep the commit of the hub's model for the rest of this run, before anything is made from it; None: the model
        is a folder.
        """
        if revision is None or revision == self.config.revision:
            return
        started = load_config(self.path / _CONFIG_NAME)
        _write_durably(self.path / _CONFIG_NAME, started.model_copy(update={"revision": revision}).to_yaml())
        self.config = self.config.model_copy(update={"revision": revision})
        self.say(f"model: {self.config.model} at the commit {revision}, from here to the end of this run")

    def settle(self, chosen: RunConfig, said: list[str]) -> None:
        """Keep what was chosen for keys that are `auto` for the rest of this run, before anything is made with it."""
        started = load_config(self.path / _CONFIG_NAME)
        for name in ("pretrain", "align"):
            started = started.model_copy(update={name: getattr(chosen, name)})
        _write_durably(self.path / _CONFIG_NAME, started.to_yaml())
        self.config = chosen
        for line in said:
            self.say(line)

    def folder(self, name: str) -> Path:
        """A sub-folder's path: `pretrain`, `align`, `reattached`, `model`."""
        return self.path / name

    def say(self, text: str) -> None:
        """One line to the log and to the person."""
        self.log(text)
        console.err.print(text, markup=False)

    def log(self, text: str) -> None:
        """One line to the log alone."""
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def metric(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, units in the names; numbers go to tensorboard too when it is installed."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._metrics.write(json.dumps(known) + "\n")  # JSON has no NaN
        self._metrics.flush()
        if self._board is not None and "step" in record:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(f"{record.get('stage', 'run')}/{key}", value, record["step"])

    def status(self, **fields: Any) -> None:
        """Replace STATUS: what the run is doing, which process does it, and when it last gave a sign of life."""
        temporary = self.path / ".STATUS.tmp"
        self._status, self._beaten = dict(fields), time.monotonic()
        fields |= {"pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "heartbeat_s": time.time()}
        temporary.write_text(json.dumps(fields) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / "STATUS")

    def beat(self, doing: str | None = None) -> None:
        """A sign of life: STATUS with the time of now, at once where the run begins to do something else, otherwise
        every _BEAT_S. `doing`: evaluating, loading, saving, stepping; None: as before.
        """
        changed = doing is not None and doing != self._status.get("doing")
        if changed or time.monotonic() - self._beaten > _BEAT_S:
            self.status(**self._status | ({"doing": doing} if changed else {}))

    def beating(self, doing: str, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """The same callback (bytes done, bytes in all), with a sign of life at each call."""

        def told(done: int, total: int) -> None:
            self.beat(doing)
            progress(done, total)

        return told

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A small JSON file at the top of the run, whole or not at all."""
        _write_durably(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flush everything and let go of the lock."""
        self._log.close()
        self._metrics.close()
        if self._board is not None:
            self._board.close()
        os.close(self._lock)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.log(f"stopped: {type(error).__name__}: {error}")
            stopped = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_status", 1) == 130
            self.status(state="interrupted" if stopped else "failed", reason=str(error) or type(error).__name__)
        self.close()


def _free(path: Path) -> bool:
    """Whether a folder is empty, but for what a run that never began has left."""
    names = set(os.listdir(path)) if path.is_dir() else {""}
    return not names or (".lock" in names and names <= _UNFINISHED)


def _run_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _write_durably(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk before anything that depends on it is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _lock(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RefusedError(
            f"{path}: another process is working on this run (see its STATUS); wait for it or stop it"
        ) from None
    return descriptor


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path / "tensorboard"))
