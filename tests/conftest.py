"""Tiny real parts that most tests need: checkpoints made by transformers, token shards, a whole run configuration."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Workers of pytest-xdist, and the processes that tests start, share the cores: a thread that waits for one whose core
# another worker has costs more than it brings, above all one that spins. Before torch is imported, whose OpenMP reads
# both once.
_WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
if _WORKERS != "1":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(_WORKERS))))

import torch  # noqa: E402
import typer.main  # noqa: E402

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the fixture modules beside the tests; the repository root stays off the path
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import quick_interpreter  # noqa: E402
from forked import Forked  # noqa: E402
from store_fixture import make_store_folder  # noqa: E402
from tokenizer_fixture import make_tokenizer  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quick_interpreter.install()

VOCABULARY = 320
WORDS = (
    "light", "water", "earth", "heaven", "day", "night", "man", "woman", "tree", "fruit", "river", "stone", "bread",
    "house", "word", "king", "son", "field", "seed", "star",
)  # fmt: skip
SYLLABLES = list("かきくけこさしすせそたちつてとなにぬねのはひふへほ")


# Those that take longest, first: at the end a worker with one of them left would keep the others waiting.
SLOWEST = (
    "test_kernels_and_references_train_alike", "test_planted_errors_make_the_losses_part",
    "test_taped_steps_train_as_launched_ones", "test_the_same_under_tritons_interpreter",
    "test_gradients_are_closer_to_the_truth_than_those_of_transformers",
    "test_speedup_of_a_checkpoint_keeps_a_record", "test_killed_without_warning_resumes_bit_for_bit",
    "test_demo_with_own_model_and_text", "test_the_loader_runs_under_pytest_benchmark",
    "test_memory_does_not_depend_on_sizes", "test_memory_does_not_grow_with_the_input",
    "test_interrupted_killed_and_resumed_is_bit_for_bit_what_it_was", "test_a_short_soak_and_a_planted_leak",
)  # fmt: skip
# Files whose tests share one costly thing, before those: one worker takes all of them, where two would make it twice.
TOGETHER = ("test_fake_cuda.py", "test_kernels_compile.py", "test_quality.py", "test_planner_processes.py")
# What computes in several threads is tested with several, however few a worker is given; the beginnings of ids.
IN_THREADS = (
    "test_cpu_", "test_csrc.py", "test_tensor_trace.py",
    "test_loop.py::test_interrupted_and_resumed_twice_equals_uninterrupted_bit_for_bit",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that stay together come first, then the slowest tests, then the others in their order."""

    def rank(item: pytest.Item) -> int:
        return 0 if item.path.name in TOGETHER else 1 if getattr(item, "originalname", item.name) in SLOWEST else 2

    items.sort(key=rank)


# What is there for good, the imports and the tests themselves, is no longer looked through by every gc.collect() of the
# engine, which would take longer than most of what is tested.
_known = [0]


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    _known[0] = len(sys.modules)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the first test, in the process that runs it."""
    if not session.config.option.collectonly and getattr(session.config.option, "dist", "no") == "no":
        _freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """And after a test that imported much."""
    yield
    if nextitem is not None and len(sys.modules) > _known[0] + 100:
        _freeze()


@pytest.fixture(scope="session", autouse=True)
def _plot() -> Iterator[Callable[..., bool]]:
    """No run draws report.png, which would take longer than all of a tiny run, but where `draws` asks for it."""
    from elo_engine import report

    plain = report._plot
    report._plot = lambda *of: False
    yield plain
    report._plot = plain


@pytest.fixture(scope="session", autouse=True)
def _one_command() -> Iterator[None]:
    """typer makes the whole command line anew for every call, from the same functions: a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def draws(_plot: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their report.png."""
    monkeypatch.setattr("elo_engine.report._plot", _plot)


@pytest.fixture(autouse=True)
def _several_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two threads at least for the tests of IN_THREADS, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    if before == 1 and request.node.nodeid.rpartition("tests/")[2].startswith(IN_THREADS):
        torch.set_num_threads(2)
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """`forked(program, *arguments)`: a process of its own that need not import torch, as forked.py says."""
    made = Forked(tmp_path_factory.mktemp("forked"))
    yield made
    made.close()


@pytest.fixture
def arms_fork(forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arms of `elo bench`, and what measures the machine, processes still, need not import torch."""

    def run(command: list[str], **streams: Any) -> Any:
        return forked(command[2], *command[3:])  # python -c program arguments

    made = SimpleNamespace(**vars(subprocess) | {"Popen": forked.piped, "run": run})
    monkeypatch.setattr("elo_engine.benchmarks.processes.subprocess", made)


@pytest.fixture(scope="session", name="make_tokenizer")
def _make_tokenizer() -> Callable[..., Path]:
    """`make_tokenizer(folder, vocab_size=320, adds_bos=False)`."""
    return make_tokenizer


@pytest.fixture(scope="session", name="make_store_folder")
def _make_store_folder() -> Callable[..., Path]:
    """`make_store_folder(folder, documents, ...)`: a token folder straight from lists of ids."""
    return make_store_folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(tied=True, shards=1, **LlamaConfig fields)` -> folder with weights, config and tokenizer."""

    def make(
        *,
        family: str = "llama",
        tied: bool = True,
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **fields: Any,
    ) -> Path:
        from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

        shape: dict[str, Any] = {
            "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "initializer_range": 0.15, "tie_word_embeddings": tied, "bos_token_id": 0,
            "eos_token_id": 0,
        }  # fmt: skip
        config = {"llama": LlamaConfig, "mistral": MistralConfig}[family](**(shape | fields))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        folder = tmp_path_factory.mktemp("checkpoint")
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size="5GB" if shards == 1 else total // shards)
        make_tokenizer(folder, VOCABULARY)
        return folder

    return make


@pytest.fixture(scope="session")
def tied(make_checkpoint: Callable[..., Path]) -> Path:
    """One shard, tied head."""
    return make_checkpoint(tied=True)


@pytest.fixture(scope="session")
def untied(make_checkpoint: Callable[..., Path]) -> Path:
    """Several shards, untied head, bf16."""
    return make_checkpoint(tied=False, shards=3, dtype=torch.bfloat16)


def write_texts(folder: Path) -> dict[str, Path]:
    """Two small made-up languages as jsonl, train and held-out."""
    rng = random.Random(7)
    files: dict[str, Path] = {}
    for language, words, glue in (("ja", SYLLABLES, ""), ("en", WORDS, " ")):
        for kind, count in (("train", 60), ("heldout", 6)):
            path = folder / f"{language}-{kind}.jsonl"
            lines = [glue.join(rng.choice(words) for _ in range(rng.randint(8, 60))) for _ in range(count)]
            path.write_text(
                "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
            )
            files[f"{language}-{kind}"] = path
    return files


@pytest.fixture(scope="session")
def shards(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Token folders `ja-train`, `ja-heldout`, `en-train`, `en-heldout`, made by the fixture checkpoints' tokenizer."""
    from elo_engine.data import build_tokens

    folder = tmp_path_factory.mktemp("corpus")
    found: dict[str, str] = {}
    for name, path in write_texts(folder).items():
        build_tokens([path], tied, folder / name)
        found[name] = str(folder / name)
    return found


@pytest.fixture
def run_tree(tied: Path, shards: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A whole configuration as a tree: 6 + 3 steps on the tiny model, seconds on a CPU."""
    return {
        "model": str(tied),
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "data": {
            "shards": {"ja": shards["ja-train"], "en": shards["en-train"]},
            "mix": {"ja": 9, "en": 1},
            "sequence_length": 32,
        },
        "pretrain": {
            "tokens": 768, "tokens_per_step": 128, "micro_batch": 2, "recompute": "none", "optimizer": {"lr": 3e-3},
        },
        "align": {
            "tokens": 384, "tokens_per_step": 128, "micro_batch": 2, "recompute": "layer", "optimizer": {"lr": 1e-3},
        },
        "evaluate": {"every": 3, "shards": {"ja": shards["ja-heldout"], "en": shards["en-heldout"]}},
        "snapshot": {"every": 2, "keep": 2},
    }  # fmt: skip


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A tree as a YAML file."""
    import yaml

    def write(tree: dict[str, Any], name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture
def elo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`elo("run", path)` -> exit status and everything printed, through the real command line in this process."""
    from elo_engine import cli

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["elo", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return call
