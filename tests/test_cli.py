"""The verbs that are not stages: inspect, data, eval, doctor, version, and how the command line itself behaves."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Forked

import elo_engine
from elo_engine import console
from elo_engine.checkpoint import open_checkpoint, publish, rewrite_checkpoint
from elo_engine.checkpoint.patch_file import safetensors_header
from elo_engine.model import names
from elo_engine.model.spec import read_spec
from elo_engine.patch import _bars

Elo = Callable[..., tuple[int, str]]


def test_inspect_reads_headers_only_and_counts_bytes(untied: Path, elo: Elo) -> None:
    status, shown = elo("inspect", untied, "--json")
    assert status == 0, shown
    found = json.loads(shown)
    assert (found["family"], found["layers"], found["tied_head"], found["dtypes"]) == ("llama", 4, False, ["BF16"])
    assert (
        found["bytes"]["total"]
        == 2 * found["parameters"]
        == sum(p.stat().st_size for p in untied.glob("*.safetensors"))
        - (sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in untied.glob("*.safetensors")))
    )
    assert found["bytes"]["embedding"] == found["bytes"]["head"] == 2 * 320 * 48
    assert len(found["shards"]) >= 3
    status, shown = elo("inspect", untied)
    assert status == 0 and "untied head" in shown and "detaching first and last layer reads" in shown


def test_inspect_verify_finds_what_headers_cannot_show(tied: Path, elo: Elo) -> None:
    status, shown = elo("inspect", tied, "--verify")
    assert status == 0 and "no hashes to compare" in shown
    status, shown = elo("inspect", tied, "--verify", "--json")
    found = json.loads(shown)
    assert status == 0 and (found["verified_bytes"], found["verified_hashes"]) == (found["bytes"]["total"], None)


def test_inspect_verify_compares_a_published_folder_with_its_hashes(tied: Path, tmp_path: Path, elo: Elo) -> None:
    out = tmp_path / "out"
    with publish(out) as folder:
        rewrite_checkpoint(open_checkpoint(tied), {}, folder)
    status, shown = elo("inspect", out, "--verify")
    assert status == 0 and "the hash of every file is that of COMMIT.json" in shown, shown
    found = json.loads(elo("inspect", out, "--verify", "--json")[1])
    assert (found["verified_bytes"], found["verified_hashes"]) == (found["bytes"]["total"], "COMMIT.json")
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, shown = elo("inspect", out, "--verify")
    assert status == 1 and shard.name in shown and "sha256 differs" in shown and "verified" not in shown, shown


def test_inspect_verify_keeps_no_tensor_in_memory(tmp_path: Path, tied: Path, forked: Forked) -> None:
    """An embedding of 0.8 GB, a hole in a file, under a limit of 0.5 GiB on top of what the imports take."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {**json.loads((tied / "config.json").read_text()), "vocab_size": 1 << 23}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = names.expected_shapes(read_spec(config))
    header = safetensors_header([(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()], {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * math.prod(shape) for shape in shapes.values()))
    code = (
        "import re, resource, sys; from pathlib import Path; from elo_engine.inspection import inspect_model; "
        "now = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]); "
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**29,) * 2); "
        "print(inspect_model(sys.argv[1], verify=True)['verified_bytes'])"
    )
    done = forked(code, folder)
    assert done.returncode == 0 and int(done.stdout) > 800_000_000, done.stderr


def test_eval_equals_a_direct_computation(tied: Path, shards: dict[str, str], elo: Elo) -> None:
    folder = shards["en-heldout"]
    status, shown = elo("eval", tied, "--tokens", folder, shards["ja-heldout"], "--sequence-length", 64, "--json")
    assert status == 0, shown
    found = json.loads(shown)
    assert set(found) == {folder, shards["ja-heldout"]}
    result = found[folder]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss_nats"]))
    nats = result["loss_nats"] * result["tokens_loss"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["text_bytes"])
    texts = [json.loads(line)["text"] for line in (Path(folder).parent / "en-heldout.jsonl").read_text().splitlines()]
    assert result["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_eval_gives_the_same_by_every_engine(untied: Path, shards: dict[str, str], elo: Elo) -> None:
    arguments = ("eval", untied, "--tokens", shards["en-heldout"], "--sequence-length", 64)
    found = [elo(*arguments, "--json", "--engine", engine) for engine in ("resident", "streamed", "auto")]
    assert found[0][0] == 0 and found[0] == found[1] == found[2], found
    status, shown = elo(*arguments, "--engine", "streamed")
    assert status == 0 and f"evaluate {untied}: streamed, asked for" in shown and "nats/token" in shown
    assert "resident, the whole model takes" in elo(*arguments)[1]
    status, shown = elo(*arguments, "--engine", "some")
    assert status == 2 and "--engine some: use auto, resident, streamed" in shown


def test_data_is_made_once_and_refused_twice(tied: Path, tmp_path: Path, elo: Elo) -> None:
    (tmp_path / "text.txt").write_text("light and water\n\nnight and day\n")
    arguments = (
        "data",
        tmp_path / "text.txt",
        "--tokenizer",
        tied,
        "--out",
        tmp_path / "tokens",
        "--split-blank-lines",
    )
    status, shown = elo(*arguments)
    assert status == 0 and "2 documents" in shown
    assert elo(*arguments)[0] == 3


def test_doctor_says_what_is_off_and_why(elo: Elo) -> None:
    status, shown = elo("doctor")
    assert status == 0
    assert f"torch {torch.__version__}" in shown or torch.cuda.is_available()
    assert "C++ extension" in shown and "kernels:" in shown
    status, shown = elo("doctor", "--json")
    assert json.loads(shown)["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__


def test_patches_from_the_command_line(tied: Path, tmp_path: Path, elo: Elo) -> None:
    from safetensors.torch import load_file, save_file

    for number in (1, 2):
        shutil.copytree(tied, tmp_path / f"c{number}")
        path = next((tmp_path / f"c{number}").glob("*.safetensors"))
        tensors = load_file(path)
        tensors[max(tensors)] = tensors[max(tensors)] * (1 + number)
        save_file(tensors, path, {"format": "pt"})
        status, shown = elo("patch", "diff", tied, tmp_path / f"c{number}", "--out", tmp_path / f"p{number}")
        assert (status, "1 tensors differ" in shown) == (0, True), shown
    p1, p2, mean, new, old = (tmp_path / name for name in ("p1", "p2", "mean", "new", "old"))
    assert elo("patch", "verify", tied, p1) == (0, f"{tied}: base\n")
    assert elo("patch", "verify", tmp_path / "c1", p1)[1].endswith(": patched\n")
    status, shown = elo("patch", "verify", tmp_path / "c2", p1)
    assert status == 1 and "is neither that of the base" in shown
    status, shown = elo("patch", "apply", tied, p1, "--out", new)
    assert status == 0 and "patched" in shown and "written" in shown, shown
    assert elo("patch", "apply", tied, p1, "--out", new)[0] == 3
    assert elo("patch", "apply", new, p1, "--out", tmp_path / "no")[0] == 3
    assert elo("patch", "revert", new, p1, "--out", old)[0] == 0
    for path in tied.glob("*.safetensors"):
        assert (old / path.name).read_bytes() == path.read_bytes()
    assert elo("patch", "average", tied, p1, p2, "--out", mean, "--weights", "0.25,0.75")[0] == 0
    assert elo("patch", "average", tied, p1, p2, "--out", tmp_path / "no", "--weights", "0.5,x")[0] == 2
    assert elo("patch", "average", tied, p1, p2, "--out", tmp_path / "no", "--weights", "0.5,0.6")[0] == 2
    status, shown = elo("patch", "diff", tied, tied, "--out", tmp_path / "empty")
    assert status == 0 and "no tensor differs" in shown
    assert elo("patch", "verify", tied, tmp_path / "gone")[0] == 2
    assert elo("patch", "diff", tied)[0] == 2


def test_bars_of_patches_are_in_megabytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    with _bars() as progress:
        for what in ("comparing", "writing p"):  # of the same total: two bars all the same
            progress(what, 250_000_000, 1_000_000_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("comparing (MB) 250/1000 ") and "GB/s" in first
    assert second.startswith("writing p (MB) 250/1000 ")


def test_version_and_usage(elo: Elo) -> None:
    assert elo("version") == (0, f"{elo_engine.__version__}\n")
    assert elo("no-such-verb")[0] == 2
    assert elo("run")[0] == 2
    status, shown = elo("--help")
    assert status == 0
    verbs = ["inspect", "plan", "data", "pretrain", "reattach", "align", "run", "eval", "patch", "doctor", "demo"]
    verbs += ["bench", "profile", "seams", "search", "chat-vector"]
    for verb in verbs:
        assert verb in shown
    places = [shown.index(f" {verb} ") for verb in ("chat-vector", "eval", "seams", "search", "profile", "doctor")]
    assert places == sorted(places), "verbs of other files are shown in their places"


def test_starting_the_command_line_imports_nothing_heavy() -> None:
    """`elo --help` should not wait for torch or transformers."""
    code = "import sys, elo_engine.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
