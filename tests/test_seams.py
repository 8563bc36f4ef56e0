"""The seam meter: its three numbers where they are known, against transformers' hidden states, its memory, a run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planner_cases import only_what_is_made_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from elo_engine.checkpoint import open_checkpoint
from elo_engine.data import TokenStore, sequential_rows
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import Packing
from elo_engine.model.spec import read_spec
from elo_engine.seams import HiddenSums, Likeness, compare_hidden, describe_seams, seam_meter, seams_command, seams_of
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import layer_elements
from elo_engine.train.loop import to_batch

CPU, FP32 = torch.device("cpu"), torch.float32
ONE = pytest.approx(1.0, abs=1e-12)


class AtOnce(Executor):
    """Reads on the thread that asks, whose memory is traced."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def weights(folder: Path) -> CheckpointWeights:
    index = open_checkpoint(folder)
    return CheckpointWeights(index, read_spec(index.config), CPU, FP32, executor=AtOnce)


def some_batches(shards: dict[str, str], language: str, count: int = 2, length: int = 16) -> list[Batch]:
    rows = sequential_rows(TokenStore(Path(shards[f"{language}-heldout"])), length, 2)
    return [to_batch(part, CPU) for part, _ in zip(rows, range(count), strict=False)]


def random_states(N: int, D: int, seed: int) -> Tensor:
    """With columns of different sizes and means."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator) * torch.linspace(0.1, 3, D) + torch.linspace(-2, 2, D)


def rotation(D: int) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]


@pytest.fixture(scope="module")
def changed(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tied` with another first and last layer."""
    folder = Path(shutil.copytree(tied, tmp_path_factory.mktemp("changed") / "model"))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".layers.0." in name or ".layers.3." in name:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# -- the three numbers


def test_equal_states_are_alike() -> None:
    x_ND = random_states(200, 12, 0)
    assert compare_hidden(x_ND, x_ND) == Likeness(200, ONE, ONE, ONE)  # type: ignore[arg-type]


def test_a_factor_is_seen_by_the_rms_ratio_alone() -> None:
    x_ND = random_states(200, 12, 0)
    assert compare_hidden(x_ND, 2.5 * x_ND) == Likeness(200, pytest.approx(2.5, rel=1e-7), ONE, ONE)  # type: ignore[arg-type]
    assert compare_hidden(x_ND, -x_ND).cosine == pytest.approx(-1.0)


def test_cka_sees_neither_a_rotation_nor_a_shift_but_other_maps() -> None:
    x_ND = random_states(300, 12, 0).double()
    turned = compare_hidden(x_ND, x_ND @ rotation(12))
    assert (turned.rms_ratio, turned.cka) == (ONE, ONE) and turned.cosine is not None and turned.cosine < 0.8
    assert compare_hidden(x_ND, x_ND + 100.0).cka == pytest.approx(1.0, abs=1e-9)
    skewed = compare_hidden(x_ND, x_ND * torch.linspace(3, 0.1, 12).double())
    assert skewed.cka is not None and skewed.cka < 0.9
    strange = compare_hidden(x_ND, random_states(300, 12, 1).double())
    assert strange.cka is not None and strange.cka < 0.1


def test_cka_is_that_of_the_centred_gram_matrices() -> None:
    """Kornblith et al., equations 2 to 4, over tokens in place of features."""
    x_ND, y_ND = random_states(90, 7, 0).double(), random_states(90, 7, 1).double() + random_states(90, 7, 0).double()
    centring = torch.eye(90, dtype=torch.float64) - 1 / 90

    def hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
        return torch.trace(k_NN @ centring @ l_NN @ centring)

    k_NN, l_NN = x_ND @ x_ND.T, y_ND @ y_ND.T
    expected = hsic(k_NN, l_NN) / (hsic(k_NN, k_NN) * hsic(l_NN, l_NN)).sqrt()
    found = compare_hidden(x_ND, y_ND).cka
    assert 0.2 < float(expected) < 0.9 and found == pytest.approx(float(expected), rel=1e-10)


def test_sums_do_not_depend_on_the_cut() -> None:
    x_ND, y_ND = random_states(2500, 6, 0), random_states(2500, 6, 1)
    sums = HiddenSums(6, CPU)
    for begin, end in ((0, 1), (1, 2049), (2049, 2049), (2049, 2500)):
        sums.add(x_ND[begin:end], y_ND[begin:end])
    found, whole = sums.result(), compare_hidden(x_ND, y_ND)
    for name in ("tokens", "rms_ratio", "cosine", "cka"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_what_is_not_defined_is_none() -> None:
    x_ND = random_states(20, 6, 0)
    assert HiddenSums(6, CPU).result() == Likeness(0, None, None, None)
    assert compare_hidden(torch.zeros(20, 6), x_ND) == Likeness(20, None, None, None)
    alike = compare_hidden(x_ND[:1].expand(20, 6), x_ND)
    assert alike.cka is None and alike.rms_ratio is not None


# -- two models


def test_a_model_is_like_itself(untied: Path, shards: dict[str, str]) -> None:
    batches = {"en": some_batches(shards, "en"), "ja": some_batches(shards, "ja", 1)}
    shares: list[float] = []
    found = seam_meter(weights(untied), weights(untied), batches, range(5), progress=shares.append)
    assert [(seam.boundary, seam.language) for seam in found] == [(b, name) for b in range(5) for name in ("en", "ja")]
    assert all((seam.rms_ratio, seam.cosine, seam.cka) == (ONE, ONE, ONE) for seam in found)
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_languages_together_are_as_each_alone(tied: Path, changed: Path, shards: dict[str, str]) -> None:
    batches = {"en": some_batches(shards, "en"), "ja": some_batches(shards, "ja", 1)}
    together = seam_meter(weights(tied), weights(changed), batches, [1, 4])
    alone = [seam_meter(weights(tied), weights(changed), {name: batches[name]}, [1, 4]) for name in batches]
    assert [seam for seam in together if seam.language == "en"] == alone[0]
    assert [seam for seam in together if seam.language == "ja"] == alone[1]
    assert alone[0][0].cosine != pytest.approx(alone[1][0].cosine, abs=1e-4)


def test_equals_the_hidden_states_of_transformers(tied: Path, changed: Path, shards: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    store, T = TokenStore(Path(shards["en-heldout"])), 24
    rows_BT = torch.from_numpy(np.stack([store.document(number)[:T].astype(np.int64) for number in range(4)]))
    states: list[list[Tensor]] = []
    for folder in (tied, changed):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
        entering: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda module, given, into=entering: into.append(given[0]))
        with torch.no_grad():
            hidden = model(input_ids=rows_BT, output_hidden_states=True).hidden_states
        states.append([*hidden[:4], entering[0]])  # the last of `hidden` is behind the final norm
    labels_BT = torch.cat((rows_BT[:, 1:], torch.full((4, 1), -100)), 1)
    packing = Packing(list(range(0, 4 * T + 1, T)), torch.arange(T).repeat(4))
    batch = Batch(rows_BT.flatten(), labels_BT.flatten(), packing, T)
    found = seam_meter(weights(tied), weights(changed), {"en": [batch]}, range(5), massive=None)
    for seam in found:
        x_ND, y_ND = (side[seam.boundary][:, :-1].flatten(0, 1).double() for side in states)
        ratio = (y_ND.square().mean() / x_ND.square().mean()).sqrt()
        cosine = torch.nn.functional.cosine_similarity(x_ND, y_ND).mean()
        x_ND, y_ND = x_ND - x_ND.mean(0), y_ND - y_ND.mean(0)
        cka = (x_ND.T @ y_ND).norm() ** 2 / ((x_ND.T @ x_ND).norm() * (y_ND.T @ y_ND).norm())
        assert seam.tokens == 4 * (T - 1) and seam.left_out == 0
        # 1e-5: what four layers of fp32 rounding leave, with room; the neighbouring seam is further off than that
        expected = (float(ratio), float(cosine), float(cka))
        assert (seam.rms_ratio, seam.cosine, seam.cka) == pytest.approx(expected, rel=1e-5)
    assert found[0].cka == ONE and min(abs((seam.cosine or 1) - 1) for seam in found[1:]) > 1e-4


def test_massive_activations_are_left_out(tied: Path, changed: Path, shards: dict[str, str], tmp_path: Path) -> None:
    """A token whose embedding is huge in both models would make them look equal."""
    batches = {"en": some_batches(shards, "en")}
    loud = int(batches["en"][0].ids_N[3])
    folders = []
    for number, folder in enumerate((tied, changed)):
        copy = Path(shutil.copytree(folder, tmp_path / str(number)))
        tensors = load_file(copy / "model.safetensors")
        tensors["model.embed_tokens.weight"][loud] *= 1e4
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        folders.append(weights(copy))
    kept = torch.cat([batch.labels_N >= 0 for batch in batches["en"]])
    count = int((torch.cat([batch.ids_N for batch in batches["en"]])[kept] == loud).sum())
    (without,) = seam_meter(*folders, batches, [1])  # type: ignore[arg-type]
    (whole,) = seam_meter(*folders, batches, [1], massive=None)  # type: ignore[arg-type]
    assert without.left_out == count > 0 and without.tokens == int(kept.sum()) - count
    assert whole.left_out == 0 and whole.rms_ratio is not None and without.rms_ratio is not None
    assert abs(whole.rms_ratio - 1) < 1e-3 < abs(without.rms_ratio - 1)


@pytest.fixture
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


@pytest.mark.usefixtures("_bounded_search")
def test_neither_model_is_there_as_a_whole(make_checkpoint: Callable[..., Path], shards: dict[str, str]) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 32}
    batches, peaks = {"en": some_batches(shards, "en")}, {}
    for count in (4, 10):
        folder = make_checkpoint(tied=True, num_hidden_layers=count, num_key_value_heads=4, **shape)
        pair = weights(folder), weights(folder)
        seam_meter(*pair, batches, [0, 1, count])  # whatever is made once
        with traced_tensor_bytes() as trace:
            seam_meter(*pair, batches, [0, 1, count])
        peaks[count] = trace.peak_bytes - trace.base_bytes
        layer = 4 * layer_elements(pair[0].spec)
    assert 2 * layer < peaks[10] < 6 * layer, "two layers of each model, and what is small beside them"
    assert peaks[10] < peaks[4] + layer // 8, "whatever the depth"


def test_reading_ends_with_the_last_seam(tied: Path, shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from elo_engine.checkpoint import CheckpointReader

    asked: list[str] = []
    read = CheckpointReader.read

    def noted(self: CheckpointReader, names: list[str], **more: Any) -> dict[str, Tensor]:
        asked.extend(names)
        return read(self, names, **more)

    monkeypatch.setattr(CheckpointReader, "read", noted)
    seam_meter(weights(tied), weights(tied), {"en": some_batches(shards, "en", 1)}, [0, 1])
    assert any(".layers.0." in name for name in asked) and not any(".layers.2." in name for name in asked)


def test_what_cannot_be_compared(
    tied: Path, make_checkpoint: Callable[..., Path], shards: dict[str, str], tmp_path: Path
) -> None:
    batches = {"en": some_batches(shards, "en", 1)}
    with pytest.raises(RefusedError, match="5 layers"):
        seam_meter(weights(tied), weights(make_checkpoint(num_hidden_layers=5)), batches, [0])
    for boundaries in ([5], [-1], []):
        with pytest.raises(UsageError, match="seams 0 to 4"):
            seam_meter(weights(tied), weights(tied), batches, boundaries)
    with pytest.raises(UsageError, match="no token of ja"):
        seam_meter(weights(tied), weights(tied), batches | {"ja": []}, [0])
    copy = Path(shutil.copytree(tied, tmp_path / "broken"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = math.inf
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(FailedError, match="not finite"):
        seam_meter(weights(tied), weights(copy), batches, [1])


# -- the command


def test_seams_of_detached_layers() -> None:
    assert seams_of((0, 3), 4) == (0, 1, 3, 4)
    assert seams_of((0, 1, 28, 29), 30) == (0, 1, 2, 28, 29, 30)
    assert seams_of((2,), 5) == (2, 3, 5)


def test_of_a_run_before_and_after_alignment(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]]
) -> None:
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    found = seams_command(run_tree["output"], None, [])
    assert json.loads(json.dumps(found)) == found and found["layers"] == [0, 3]
    assert list(found["models"]) == ["reattached", "aligned"] and found["base"] == run_tree["model"]
    by = {(row["model"], row["language"], row["boundary"]): row for row in found["seams"]}
    assert set(by) == {(m, t, b) for m in ("reattached", "aligned") for t in ("ja", "en") for b in (0, 1, 3, 4)}
    for language in ("ja", "en"):
        assert by["reattached", language, 0]["cosine"] == ONE, "reattaching leaves the embedding alone"
        assert by["aligned", language, 0]["cosine"] < 1 - 1e-9, "and aligning does not"
        assert by["reattached", language, 1]["cosine"] < 1 - 1e-6
    results = json.loads((Path(run_tree["output"]) / "results.json").read_text())["evaluations"]
    for language in ("ja", "en"):
        expected = {moment: results[moment][language]["loss_nats"] for moment in ("base", "reattached", "aligned")}
        assert found["loss_nats"][language] == expected
    lines = "\n".join(describe_seams(found))
    assert "into final norm" in lines and f"aligned {results['aligned']['ja']['loss_nats']:.4f}" in lines
    one = seams_command(
        run_tree["output"] + "/model", run_tree["model"], [Path(run_tree["evaluate"]["shards"]["ja"])],
        sequence_length=32, dtype="fp32", device="cpu",
    )  # fmt: skip
    numbers = [[row[key] for key in ("boundary", "tokens", "rms_ratio", "cosine", "cka")] for row in one["seams"]]
    assert numbers == [
        [row[key] for key in ("boundary", "tokens", "rms_ratio", "cosine", "cka")]
        for row in found["seams"] if row["model"] == "aligned" and row["language"] == "ja"
    ]  # fmt: skip
    assert one["loss_nats"] == {}


def test_what_the_command_needs(tied: Path, changed: Path, shards: dict[str, str], tmp_path: Path) -> None:
    text = [Path(shards["en-heldout"])]
    with pytest.raises(UsageError, match="--base MODEL"):
        seams_command(str(changed), None, text)
    with pytest.raises(UsageError, match="--tokens DIR"):
        seams_command(str(changed), str(tied), [])
    with pytest.raises(UsageError, match="token shards"):
        seams_command(str(changed), str(tied), [tmp_path])
    with pytest.raises(UsageError, match="toaster"):
        seams_command(str(changed), str(tied), text, device="toaster")
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        seams_command(str(changed), str(tied), text, layers="first,9")
    found = seams_command(str(changed), str(tied), text, layers="1-2", max_tokens=64, sequence_length=64)
    assert [row["boundary"] for row in found["seams"]] == [1, 2, 3, 4] and found["layers"] == [1, 2]
    with pytest.raises(UsageError, match="max-tokens"):
        seams_command(str(changed), str(tied), text, max_tokens=0)
