"""The chat vector: exact where it can be, the target's folder with other values, in bounded memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elo_engine.chat_vector import chat_vector
from elo_engine.checkpoint import open_checkpoint, verify_commit
from elo_engine.model.names import EMBEDDING, HEAD

from .chat_vector_fixture import NORM, assert_same_bits, calm, make_model, thirds, three, weights  # noqa: F401
from .checkpoint_fixture import INDEX, leftovers, state

# ruff: noqa: F811 (fixtures are parameters of their own name)

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["target is a copy of base", "target is base"])
def test_the_whole_difference_on_the_base_is_instruct_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    edit = calm if dtype == torch.float16 else (lambda tensors: None)

    def opposite_zeros(tensors: dict[str, Tensor]) -> None:
        edit(tensors)
        tensors[NORM][:3] = torch.tensor([-0.0, 0.0, -0.0])

    base = make_model(tmp_path / "base", 1, dtype, shards=2, edit=edit)
    instruct = make_model(tmp_path / "instruct", 2, dtype, edit=opposite_zeros)
    target = base
    if kind == "target is a copy of base":
        target = make_model(tmp_path / "target", 1, dtype, shards=3, edit=edit)
    chat_vector(str(base), str(instruct), str(target), tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), weights(instruct))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_or_no_difference_is_the_target_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base, instruct, target = (
        make_model(tmp_path / name, seed, dtype, shards=2) for seed, name in enumerate(("base", "instruct", "target"))
    )
    before = state(target)
    chat_vector(str(base), str(instruct), str(target), tmp_path / "zero", 0.0)
    for number, weight in enumerate((1.0, -2.0, 0.3)):
        chat_vector(str(base), str(base), str(target), tmp_path / f"same-{number}", weight)
    for name in ("zero", "same-0", "same-1", "same-2"):
        assert_same_bits(weights(tmp_path / name), weights(target))
        assert {p.name for p in (tmp_path / name).iterdir()} == {*before, "README.md", "COMMIT.json"}
    assert state(target) == before


@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_that_of_real_numbers_within_its_rounding(tmp_path: Path, weight: float, dtype: torch.dtype) -> None:
    """Against fp64. Bound: fp32 (of fp64 tensors fp64, as here) rounds the difference, the product and the sum, each by
    half a unit in the last place of a number that is not above |t| + |w| (|i| + |b|), and the cast to the target's
    dtype rounds the sum once more.
    """
    folders = [
        make_model(tmp_path / name, seed, dtype, shards=1 + seed, edit=thirds)
        for seed, name in enumerate(("base", "instruct", "target"))
    ]
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-24  # of fp64 both sides round
    seen: list[Path] = []
    chat_vector(*map(str, folders), tmp_path / "out", weight)
    b, i, t = (weights(folder) for folder in folders)
    for name, found in weights(tmp_path / "out").items():
        wide = [side[name].double() for side in (t, i, b)]
        exact = wide[0] + weight * (wide[1] - wide[2])
        size = wide[0].abs() + abs(weight) * (wide[1].abs() + wide[2].abs())
        bound = 3 * size * unit + exact.abs() * torch.finfo(dtype).eps / 2 * (1 + 2.0**-20)
        assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all(), name
        seen.append(Path(name))
    assert len(seen) == 5


def test_the_output_is_the_targets_folder_with_other_values(three: tuple[str, str, str], tmp_path: Path) -> None:
    target = Path(three[2])
    files = {"tokenizer_config.json": b'{"x":  1}\r\n', "LICENSE": b"free", "generation_config.json": b"{ }"}
    for name, content in files.items():
        (target / name).write_bytes(content)
    (Path(three[1]) / "chat_template.jinja").write_text("{{ messages }}")
    before = [state(Path(folder)) for folder in three]
    text = chat_vector(*three, tmp_path / "out", 0.5)
    assert "target + 0.5 x (instruct - base), 5 tensors" in text and "TARGET has no chat template" in text
    out = state(tmp_path / "out")
    for name in (*files, "config.json", INDEX):
        assert out[name][0] == before[2][name][0]
    assert open_checkpoint(tmp_path / "out").identity() == open_checkpoint(target).identity()
    commit = verify_commit(tmp_path / "out")
    assert commit["extra"]["kind"] == "chat-vector" and commit["extra"]["weight"] == 0.5
    assert commit["extra"]["instruct"] == open_checkpoint(Path(three[1])).identity()
    assert [state(Path(folder)) for folder in three] == before
    assert not leftovers(tmp_path)


def test_a_model_of_it_loads_and_computes_what_the_sum_says(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folders = [make_checkpoint(tied=False, shards=1 + seed, seed=seed) for seed in range(3)]
    chat_vector(*map(str, folders), tmp_path / "out", 0.6)
    base, instruct, target, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in [*folders, tmp_path / "out"]
    )
    ids = torch.arange(24)[None] * 7
    with torch.no_grad():
        alone = target(ids).logits
        for mine, up, down in zip(target.parameters(), instruct.parameters(), base.parameters(), strict=True):
            mine.copy_((mine.double() + 0.6 * (up.double() - down.double())).float())
        expected, logits = target(ids).logits, found(ids).logits
    assert (logits - expected).abs().max() < 1e-4 < 0.1 < (logits - alone).abs().max()


def test_a_tied_head_that_is_stored_twice_stays_the_embedding(tmp_path: Path) -> None:
    """In the target alone, and also where BASE stores another head that its tie makes meaningless."""
    base = make_model(tmp_path / "base", 1, edit=calm)
    instruct = make_model(tmp_path / "instruct", 2, edit=calm)

    def copy(tensors: dict[str, Tensor]) -> None:
        calm(tensors)
        tensors[HEAD] = tensors[EMBEDDING].clone()

    def other(tensors: dict[str, Tensor]) -> None:
        calm(tensors)
        tensors[HEAD] = torch.zeros(2, 2)

    target = make_model(tmp_path / "target", 3, shards=2, edit=copy)
    stale = make_model(tmp_path / "stale", 1, edit=other)
    for number, first in enumerate((base, stale)):
        chat_vector(str(first), str(instruct), str(target), tmp_path / f"out-{number}", 0.7)
        found = weights(tmp_path / f"out-{number}")
        assert torch.equal(found[HEAD], found[EMBEDDING]) and not torch.equal(found[HEAD], weights(target)[HEAD])


MEASURED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from elo_engine.chat_vector import chat_vector

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def run(folder):
    chat_vector(*(str(folder / name) for name in ("base", "instruct", "target")), folder / "out", float(sys.argv[3]))

run(Path(sys.argv[1]))  # code pages are mapped once they have run
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
before = status("VmRSS:")
run(Path(sys.argv[2]))
print(status("VmHWM:") - before)
"""


def test_memory_does_not_depend_on_the_models_size(tmp_path: Path) -> None:
    """Three checkpoints of 160 MiB, most of it in one tensor of 120 MiB, raise the peak by less than 40 MiB.

    Bound: a piece of 1 Mi elements in fp32 (4 MiB) is in two slots of the ring, as the sum and in its check of finite
    values; the three sides of a chunk take less. What the allocator keeps of that is no more than the same again.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel of this machine does not tell a process's peak")
    for folder, rows in (("tiny", 1), ("big", 40)):
        for name in ("base", "instruct", "target"):
            sparse_model(tmp_path / folder / name, rows)
    command = [sys.executable, "-c", MEASURED, tmp_path / "tiny", tmp_path / "big", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * MIB
    assert (tmp_path / "big" / "out" / "model.safetensors").stat().st_size > 160 * MIB
    shutil.rmtree(tmp_path / "big")


def sparse_model(folder: Path, rows: int) -> None:
    """A checkpoint of 4 MiB a row, of which the disk holds the header: its values are zeros."""
    folder.mkdir(parents=True)
    sizes = {EMBEDDING: 3 * rows, NORM: rows}
    header, position = {}, 0
    for name, count in sizes.items():
        header[name] = {"dtype": "F32", "shape": [count, 1 << 18], "data_offsets": [position, position + count * MIB]}
        position += count * MIB
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    (folder / "config.json").write_text('{"model_type": "llama"}')
