"""Several processes on one CPU, started by torchrun, by its agent or as it starts them, joined by gloo: the same
training as one.

What may differ is the order in which numbers are added. With two processes that take one micro-batch each, a gradient
is a + b in both worlds, and fp32 addition commutes: ELO pretraining then gives the same bits.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ELO, Forked
from safetensors.torch import load_file

from elo_engine.data import Mixture, TokenStore
from elo_engine.train import world

ROOT = Path(__file__).resolve().parents[1]
Tree = dict[str, Any]
Start = Callable[..., subprocess.CompletedProcess[str]]
# A weight moves by at most about one learning rate a step, whatever its gradient. Where a gradient is far above fp32's
# noise the difference of two orders of addition is some 1e-6 of that; where it is at the noise, Adam's ratio of two
# moments is noise too, and only one learning rate bounds it. eps 1e-5 below keeps such gradients from full steps: they
# are some 1e-8, a thousandth of eps.
EPS, TOLERANCE = 1e-5, 2e-6


def port() -> int:
    """One that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
    return found


def torchrun(processes: int, *arguments: object) -> list[str]:
    """Its command, on a port of its own."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port()),
        *map(str, arguments),
    ]  # fmt: skip


# torchrun's own agent, whose processes are forks of it instead of new interpreters.
AGENT = f"""
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def process():
    exec(compile({ELO!r}, "<forked>", "exec"), {{"__name__": "__main__"}})
port = sys.argv.pop(1)
elastic_launch(
    LaunchConfig(1, 1, 2, rdzv_backend="static", rdzv_endpoint="127.0.0.1:" + port, rdzv_configs={{"rank": 0}},
                 max_restarts=0, monitor_interval=0.1, start_method="fork"), process)()
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """In place of conftest.py's: FSDP2 is imported too, and what it imports with its first step, for seconds a process.
    """
    first = "import torch.distributed.fsdp, torch.distributed.tensor, torch.distributed.launcher.api, torch._dynamo"
    made = Forked(tmp_path_factory.mktemp("forked"), first, environment())
    yield made
    made.close()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"} | more


@pytest.fixture
def elo(forked: Forked) -> Start:
    """`elo(processes, verb, ...)`; by="agent": two that torchrun's agent starts and watches."""

    def call(processes: int, *arguments: object, by: str = "forks") -> subprocess.CompletedProcess[str]:
        if by == "agent":
            return forked(AGENT, port(), *arguments, environment=environment(), timeout_s=180)
        if processes == 1:
            return forked(ELO, *arguments, environment=environment(), timeout_s=180)
        return forked.ranks(processes, ELO, *arguments, port=port(), environment=environment())

    return call


def snapshot(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.glob("step-*"))
    return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


def losses(run: Path, stage: str) -> list[float]:
    """By step; the last line of a step counts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss_nats"] for line in lines if line.get("stage") == stage and "loss_nats" in line}
    return [found[step] for step in sorted(found)]


def followed(run: Path, stage: str) -> list[float]:
    """Held-out losses of the whole model while it trained, in their order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["heldout_loss_nats"] for line in lines if line.get("stage") == stage and "heldout_loss_nats" in line]
    assert found, f"{stage}: nothing was followed"
    return found


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.fixture
def tree(run_tree: Tree) -> Tree:
    """Four rows a step; of two processes each has one micro-batch."""
    tree = copy.deepcopy(run_tree)
    tree["pretrain"]["optimizer"]["eps"] = tree["align"]["optimizer"]["eps"] = EPS
    return tree


@pytest.fixture
def start(tree: Tree, write_config: Callable[..., Path], tmp_path: Path, elo: Start) -> Start:
    """`start(processes, verb, name, *overrides)`: into an output folder of that name; ends with status 0."""
    config = write_config(tree)

    def call(processes: int, verb: str, name: str, *overrides: str, **how: str) -> subprocess.CompletedProcess[str]:
        done = elo(processes, verb, config, f"output={tmp_path / name}", *overrides, **how)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return call


@pytest.mark.parametrize("bridge", ["none", "linear"])
def test_pretraining_on_two_processes_gives_the_bits_of_one(start: Start, tmp_path: Path, bridge: str) -> None:
    overrides = (f"detach.bridge={bridge}", "detach.bridge_tokens=1024", "evaluate.every=0")
    start(1, "pretrain", "one", *overrides)
    done = start(2, "pretrain", "two", *overrides, by="agent" if bridge == "none" else "forks")
    one, two = tmp_path / "one", tmp_path / "two"
    assert differing(snapshot(one / "pretrain"), snapshot(two / "pretrain")) == []
    assert losses(one, "pretrain") == losses(two, "pretrain")
    assert done.stderr.count("2 processes, each with its share") == 1, "one process speaks"
    assert (two / "log.txt").read_text().count("detach: layers") == 1


@pytest.mark.parametrize(("engine", "processes"), [("auto", 4), ("resident", 2)])
def test_the_whole_chain_on_several_processes(start: Start, tmp_path: Path, engine: str, processes: int) -> None:
    """With four every process has one row; `auto` spreads the whole model by FSDP2, `resident` has it in each."""
    overrides = ("evaluate.every=2", "align.recompute=" + ("layer" if engine == "auto" else "none"))
    start(1, "run", "one", *overrides)
    start(processes, "run", "many", f"align.engine={engine}", *overrides)
    one, many = tmp_path / "one", tmp_path / "many"
    for stage in ("pretrain", "align"):
        assert furthest(snapshot(one / stage), snapshot(many / stage)) < TOLERANCE
        assert losses(many, stage) == pytest.approx(losses(one, stage), rel=1e-6)
    scores = [json.loads((run / "results.json").read_text())["evaluations"] for run in (one, many)]
    for moment in ("base", "reattached", "aligned"):
        for language in ("ja", "en"):
            found = [score[moment][language]["loss_nats"] for score in scores]
            assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert (many / "model" / "COMMIT.json").exists() and (many / "report.md").exists()
    ran = [line for line in map(json.loads, (many / "metrics.jsonl").read_text().splitlines()) if "memory" in line]
    parts = ran[-1]["memory"]["components"]
    for name in ("weights", "gradients", "optimizer"):  # of one process: the plan's, and what was counted
        assert parts["measured"][name] == pytest.approx(parts["predicted"][name], abs=256), name
    assert followed(many, "align") == pytest.approx(followed(one, "align"), rel=1e-6)


def test_bf16_shares_stay_near_the_resident_model(start: Start, tmp_path: Path) -> None:
    """Masters are fp32 in both; products in bf16 with gradients rounded at other places, 2^-8 of a loss at most."""
    start(1, "align", "one", "dtype=bf16")
    start(2, "align", "two", "dtype=bf16")
    found = losses(tmp_path / "two", "align")
    assert found == pytest.approx(losses(tmp_path / "one", "align"), rel=2**-8) and found[-1] < found[0]


def test_interrupted_killed_and_resumed_is_bit_for_bit_what_it_was(
    start: Start, tmp_path: Path, forked: Forked
) -> None:
    """SIGTERM to torchrun in the pretraining, SIGKILL to one process in the alignment; then the rest of the run."""
    long = ("evaluate.every=0", "pretrain.tokens=3200", "align.tokens=3200", "snapshot.every=5")
    start(2, "run", "whole", *long)
    cut = tmp_path / "cut"
    command = ("run", tmp_path / "config.yaml", f"output={cut}", "--resume=auto", *long)

    def reach(stage: str, ended: Callable[[], int | None]) -> None:
        ends = time.monotonic() + 120
        while not any((cut / stage).glob("step-*/COMMIT.json")):
            assert ended() is None and time.monotonic() < ends, "the run ended before it was cut"
            time.sleep(0.02)

    def is_cut(stage: str, status: int) -> None:
        assert status != 0
        assert not (cut / stage / "step-00000025").exists(), "it was over before it was cut"

    process = subprocess.Popen(
        torchrun(2, "-m", "elo_engine", *command), env=environment(), stderr=subprocess.PIPE, text=True
    )
    reach("pretrain", process.poll)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=90)
    is_cut("pretrain", process.returncode)
    assert "interrupted by SIGTERM after step" in shown
    agent = forked.start(AGENT, port(), *command, environment=environment())
    reach("align", agent.poll)
    os.kill(json.loads((cut / "STATUS").read_text())["pid"], signal.SIGKILL)
    is_cut("align", agent.wait(90).returncode)
    start(2, "run", "cut", "--resume", "auto", *long)
    for stage in ("pretrain", "align"):
        assert differing(snapshot(tmp_path / "whole" / stage), snapshot(cut / stage)) == []
    changed = [json.loads(line).get("changed") for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [one for one in changed if one is not None] == [{}, {}]


def test_another_number_of_processes_continues_and_says_that_it_is_not_exact(start: Start, tmp_path: Path) -> None:
    start(2, "align", "run", "align.tokens=512", "evaluate.every=0")
    for name in ("step-00000004",):  # as if the run had been cut there
        assert (tmp_path / "run" / "align" / name).exists()
        for path in sorted((tmp_path / "run" / "align" / name).iterdir()):
            path.unlink()
        (tmp_path / "run" / "align" / name).rmdir()
    shutil.rmtree(tmp_path / "run" / "model")
    start(1, "align", "run", "align.tokens=512", "evaluate.every=0", "--resume", "auto")
    resumed = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in resumed if line.get("event") == "resumed"]
    assert [event["changed"] for event in events] == [{"processes": [2, 1]}] and events[0]["bit_exact"] is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pretrain.tokens_per_step=96",), "pretrain: 3 rows a step do not divide by 2 processes"),
        (("align.when=interleaved",), "align.when: interleaved is for one process, and there are 2"),
        (("align.engine=streamed",), "align.engine: streamed is for one process, and there are 2"),
    ],
)
def test_what_goes_with_one_process_alone_is_refused(
    tree: Tree, write_config: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...], message: str, elo: Start
) -> None:
    done = elo(2, "run", write_config(tree), *overrides)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_of_rank_0_is_said_once(start: Start, tmp_path: Path, elo: Start) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("")
    done = elo(2, "run", tmp_path / "config.yaml", by="agent")
    assert done.returncode != 0 and done.stderr.count("nothing is ever written over") == 1
    assert "cli.py" not in done.stderr, "a traceback of this package"  # torchrun ends with one of its own


def test_8_bit_state_of_shares_is_refused(start: Start, tmp_path: Path, elo: Start) -> None:
    done = elo(2, "align", tmp_path / "config.yaml", "align.optimizer.state=8bit")
    assert done.returncode != 0 and "align.optimizer.state: 8bit is for whole leaves" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    start: Start, tmp_path: Path, given: dict[str, str], message: str, forked: Forked
) -> None:
    done = forked(ELO, "run", tmp_path / "config.yaml", environment=environment(**given), timeout_s=60)
    assert done.returncode == 2 and message in done.stderr


PARTED = """
import sys, torch
from elo_engine.errors import FailedError
from elo_engine.train import world
with world.joined("cpu"):
    weights = [torch.arange(1000.0), torch.ones(300, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int8)]
    world.require_equal(weights, "equal")
    for planted in range(3):
        own = [weight.clone() for weight in weights]
        if world.rank() == 1 and planted == 0:
            own[0][[3, 4]] = own[0][[4, 3]]  # the sum of the bits is the same
        elif world.rank() == 1 and planted == 1:
            own[1][299] = torch.nextafter(own[1][299], own[1][0] + 1)
        elif world.rank() == 1:
            own[2][0] = 1
        try:
            world.require_equal(own, f"planted {planted}")
            sys.exit(f"not seen: {planted}")
        except FailedError as error:
            assert f"planted {planted} differ between the processes" in str(error), error
"""


def test_processes_whose_weights_part_are_noticed(forked: Forked) -> None:
    done = forked.ranks(2, PARTED, port=port(), environment=environment())
    assert done.returncode == 0, done.stderr[-2000:]


def test_shares_are_the_rows_of_the_step(tied: Path, shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For every number of processes: together all rows in the mixture's order, cut where documents are."""
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    mixture = Mixture(stores, {"ja": 9, "en": 1}, 32, 1)
    rows = mixture.rows(5, 8)
    for size in (1, 2, 4, 8):
        monkeypatch.setattr(world, "size", lambda size=size: size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
            parts.append(world.share(rows))
        assert (np.concatenate([part.ids_BT for part in parts]) == rows.ids_BT).all()
        assert sum(part.tokens_loss for part in parts) == rows.tokens_loss
        starts = [part.segment_starts[:-1] + i * 256 // size for i, part in enumerate(parts)]
        assert (np.concatenate(starts) == rows.segment_starts[:-1]).all()
        assert all(part.segment_starts[-1] == part.ids_BT.size for part in parts)
