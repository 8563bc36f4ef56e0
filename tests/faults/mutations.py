"""Take each guard away in turn, in a copy of the package, and see its test fail: `python tests/faults/mutations.py`.

Not collected. Prints the table of docs/reliability.md; exit status 1 where a test passes without its guard.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KILLS, SIGNALS, BAD = "faults/test_kills.py", "faults/test_signals.py", "test_bad_input.py"
PUBLISH, READER, INDEX = "test_publish.py", "test_reader_faults.py", "test_index.py"
NOT_FINITE, RESUME, MEMORY = "faults/test_not_finite.py", "faults/test_resume.py", "faults/test_memory.py"

class Mutant(NamedTuple):
    """A guard that is taken away. fault: its number in RELIABILITY's list and in docs/reliability.md."""

    fault: int
    guard: str
    file: str
    text: str
    replacement: str
    test: str


SYNC_FILE = "        if sync:\n            SYSCALLS.fsync(fd)\n        while"
SYNC_FOLDER = "    try:\n        SYSCALLS.fsync(fd)\n    finally:"
READ_FAILED = "            raise TransferError(error.errno or errno.EIO, offset + done) from error\n"
READ_FAILED += "        if count <= 0:\n"
READ_FAILED += "            raise TransferError(0, offset + done)\n"
RESTORE = "    state.restore(folder, _saved(engine))"
SECOND = "(run.path / 'metrics.jsonl').read_text().count('\"resumed\"')"
PASS = "            pass\n        except FailedError as error:"
SEEN = "        global seen\n        seen = globals().get('seen', -1) + 1\n"
RETIRE_FIRST = "    for _, old in _steps(stage_folder):\n        _retire(old)\n    with publish(target) as folder:"
IN_PLACE = "    target.mkdir()\n    folder = target\n    if folder:"

MUTANTS = tuple(Mutant(*fields) for fields in (
    (1, "leftovers of other steps are removed", "train/state.py",
     "        remove_leftovers(stage_folder, _STEP.pattern)", "        pass",
     f"{KILLS}::test_leftovers_of_a_step_that_is_not_reached_again_are_removed"),
    (2, "a snapshot is made beside its place and renamed", "train/state.py", "    with publish(target) as folder:",
     IN_PLACE, f"{KILLS}::test_killed_at_every_call_of_saving_and_retiring"),
    (3, "the newest step is the greatest that verifies", "train/state.py", "in reversed(_steps(stage_folder)):",
     "in _steps(stage_folder):", f"{KILLS}::test_killed_at_every_call_of_saving_and_retiring"),
    (4, "old snapshots go after the new one is there", "train/state.py", "    with publish(target) as folder:",
     RETIRE_FIRST, f"{KILLS}::test_killed_at_every_call_of_saving_and_retiring"),
    (5, "a resume restores weights and moments", "stage.py", RESTORE, "    pass",
     f"{KILLS}::test_killed_at_random_moments_again_and_again"),
    (6, "the second resume does too", "stage.py", RESTORE, f"    {SECOND} or state.restore(folder, _saved(engine))",
     f"{KILLS}::test_killed_at_random_moments_again_and_again"),
    (7, "a batch depends on the step alone", "train/loop.py", "        rows = mixture.rows(turn.row, turn.rows)",
     f"{SEEN}        rows = mixture.rows(seen * turn.rows, turn.rows)",
     f"{KILLS}::test_killed_in_the_middle_of_an_epoch_with_a_remainder"),
    (8, "both kinds of interleaved steps are counted apart", "train/shared_state.py",
     "{_REST + name if name in _COUNTS else name: t", "{name: t",
     "test_interleaved.py::test_killed_and_resumed_it_ends_with_the_same_bits"),
    (9, "the loop asks for signals", "train/resident.py", "            if should_stop():", "            if False:",
     f"{SIGNALS}::test_a_signal_in_any_phase_ends_cleanly"),
    (10, "a second signal is let pass", "command.py", "        if now - self._last >= GRACE_S:", "        if True:",
     f"{SIGNALS}::test_a_second_signal_while_a_model_is_given_up_leaves_nothing"),
    (11, "what is not complete is removed", "checkpoint/publish.py", "        if not renamed:\n            _discard",
     "        if False:\n            _discard", f"{PUBLISH}::test_a_full_disk_or_an_error_at_every_write"),
    (12, "space is asked for first", "checkpoint/publish.py", "    if need_bytes > free:", "    if False:",
     f"{PUBLISH}::test_preflight"),
    (13, "a failed sync is not tried again", "checkpoint/commit.py", SYNC_FILE,
     "        if sync:\n            try:\n                SYSCALLS.fsync(fd)\n            except OSError:\n"
     "                SYSCALLS.fsync(fd)\n        while",
     f"{PUBLISH}::test_a_failed_sync_is_never_success"),
    (14, "a read error is an error", "checkpoint/python_mover.py",
     f"        except OSError as error:\n{READ_FAILED}"
     "        done += count\n    return Transfer(0, length", "        except OSError:\n            count = length - done\n"
     "        done += count\n    return Transfer(0, length",
     f"{READER}::test_read_error_names_file_tensor_and_offset"),
    (15, "a short read is continued", "checkpoint/python_mover.py",
     '        done += count\n    return Transfer(0, length, "buffered")',
     '        done = length\n    return Transfer(0, length, "buffered")',
     f"{READER}::test_short_reads_and_interrupts_change_nothing"),
    (16, "tensors end inside their file", "checkpoint/header.py", "    if position > file_size:", "    if False:",
     f"{INDEX}::test_truncated_shard"),
    (17, "a shard is compared after it was read", "checkpoint/reader.py",
     "        for shard, file in self._files.items():", "        for shard, file in {}.items():",
     f"{READER}::test_change_in_place_while_reading"),
    (18, "hashes are compared", "checkpoint/commit.py", "            if _hash(present[name], sync=False) != wanted:",
     "            if False:", f"{PUBLISH}::test_damage_is_found"),
    (18, "COMMIT.json is sealed", "checkpoint/commit.py", " or _sealed_text(body, path) != raw:", ":",
     f"{PUBLISH}::test_every_flipped_bit_in_commit_is_found"),
    (19, "a step counts only if it verifies", "train/state.py",
     "            verify_commit(folder)\n        except FailedError as error:", PASS,
     f"{KILLS}::test_the_newest_step_is_the_greatest_number_that_verifies"),
    (20, "the index gives plain names", "checkpoint/index.py",
     "if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):", "if not isinstance(shard, str):",
     f"{INDEX}::test_weight_map_values_are_plain_basenames"),
    (20, "extra shards are refused", "checkpoint/index.py", "    if extra:\n", "    if False:\n",
     f"{INDEX}::test_missing_and_extra_shard"),
    (20, "a tensor is in one shard", "checkpoint/index.py", "                if entry.name in entries:",
     "                if False:", f"{INDEX}::test_tensor_in_two_shards"),
    (20, "index and headers agree", "checkpoint/index.py", "            _check_both_ways(weight_map, entries, folder)",
     "            pass", f"{INDEX}::test_stale_index"),
    (21, "shards are regular files", "checkpoint/syscalls.py", "    if not stat.S_ISREG(mode):", "    if False:",
     f"{INDEX}::test_special_files_are_refused_and_do_not_hang"),
    (22, "keys are there once", "checkpoint/header.py", "        if len(found) != len(items):", "        if False:",
     "test_header.py::test_malformed_header_is_refused"),
    (23, "a loss that is not finite spoils the gradient", "train/resident.py", ".backward(scale_of(loss))",
     ".backward()", f"{NOT_FINITE}::test_a_loss_that_is_no_number_is_skipped_and_counted"),
    (23, "four in a row stop the run", "train/guards.py", "skipped_in_a_row >= NON_FINITE_LIMIT",
     "skipped_in_a_row >= 99", f"{NOT_FINITE}::test_four_in_a_row_stop_with_their_own_status_and_name_the_batch"),
    (24, "an infinite norm leaves the step out", "model/ops/adamw.py", "    updated = torch.isfinite(norm)",
     "    updated = ~torch.isnan(norm)", f"{NOT_FINITE}::test_an_infinity_in_one_gradient_is_never_committed"),
    (25, "a spike is told", "train/guards.py", "self.count >= SPIKE_AFTER and loss > limit", "False",
     f"{NOT_FINITE}::test_a_loss_spike_is_logged_and_changes_nothing"),
    (26, "slots come back after an error", "checkpoint/reader.py", "            finally:\n                _settle(read)",
     "            finally:\n                pass", f"{READER}::test_an_error_in_the_middle_leaves_the_ring_whole"),
    (27, "a slot waits for its copy", "checkpoint/targets.py", "    while in_use and target.done(in_use[0][1]):",
     "    while in_use:", "test_targets.py::test_a_slow_device_gets_every_byte"),
    (28, "a filesystem that cannot share is copied from", "checkpoint/clone.py",
     "            break  # another filesystem, or one that cannot", "            raise",
     "test_writer.py::test_every_way_of_cloning_gives_the_same"),
    (29, "an output outside its source", "checkpoint/writer.py",
     "    if target == source or source in target.parents:", "    if False:",
     "faults/test_disk.py::test_an_output_that_is_its_source_is_refused"),
    (29, "one process on a run", "run_dir.py", "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
     "        pass", f"{BAD}::test_two_processes_on_one_run"),
    (30, "files have the umask's mode", "checkpoint/writer.py", "            os.fchmod(fd, mode)", "            pass",
     f"{PUBLISH}::test_modes_follow_the_umask"),
    (30, "nothing is linked unasked", "checkpoint/writer.py", "        if job.hard_links and not entries:",
     "        if not entries:", "test_write_back.py::test_without_being_asked_nothing_is_linked"),
    (31, "the thread count is recorded", "stage.py", '        "threads": torch.get_num_threads(),\n', "",
     f"{RESUME}::test_what_costs_bit_for_bit_equality_is_recorded"),
    (31, "a snapshot's identity is held against the run's", "train/state.py", "    if refused:", "    if False:",
     f"{RESUME}::test_other_data_or_another_checkpoint_in_the_same_place_is_refused"),
    (31, "another version is refused", "stage.py", "    if versions and not run.anyway:", "    if False:",
     f"{RESUME}::test_another_version_is_refused_unless_told"),
    (31, "another configuration is refused", "run_dir.py", "        if never or (keys and not anyway):",
     "        if never:", f"{RESUME}::test_another_configuration_is_refused_by_its_key"),
    (32, "the range is the one asked for", "checkpoint/ranges.py",
     "if match is None or tuple(map(int, match.groups())) != (begin, end - 1, file.size):", "if match is None:",
     "test_ranges.py::test_an_answer_that_is_not_what_was_asked_for"),
    (32, "a short body is continued", "checkpoint/ranges.py", "        while position < end:\n            with",
     "        if position < end:\n            with",
     "test_ranges.py::test_a_short_body_is_continued_where_it_stopped"),
    (32, "one version of a file", "checkpoint/ranges.py", '                file.agree(linked, response.headers.get("ETag"))',
     "                pass", "test_ranges.py::test_one_etag_for_all_ranges"),
    (32, "a busy server is asked again", "checkpoint/ranges.py", "status_forcelist=_AGAIN,", "status_forcelist=(),",
     "test_ranges.py::test_a_busy_server_is_asked_again"),
    (32, "the token is the hub's", "checkpoint/ranges.py",
     "if self._token and request.url and _origin(request.url) == self._origin:", "if self._token and request.url:",
     "test_ranges.py::test_the_token_goes_to_the_hub_alone"),
    (33, "what does not fit is refused", "plan.py", "    if refusal is not None:\n        raise RefusedError(refusal)\n"
     "    memory = ", "    memory = ", f"{MEMORY}::test_a_cap_below_the_plan_is_refused_with_numbers"),
    (33, "memory that runs out is explained", "out_of_memory.py", "            if not is_out_of_memory(error):",
     "            if True:", f"{MEMORY}::test_memory_that_runs_out_is_told_with_the_plan_and_the_levers"),
    (34, "handlers are put back", "command.py", "                signal.signal(number, old)", "                pass",
     f"{SIGNALS}::test_handlers_are_restored_after_a_run_of_any_end"),
    (35, "files are synced", "checkpoint/commit.py", SYNC_FILE, "        while",
     "faults/test_power_loss.py::test_power_loss_at_every_moment_of_a_save"),
    (35, "folders are synced", "checkpoint/commit.py", SYNC_FOLDER, SYNC_FOLDER.replace("SYSCALLS.fsync(fd)", "pass"),
     "faults/test_power_loss.py::test_power_loss_at_every_moment_of_a_save"),
))  # fmt: skip


def survives(folder: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the test passes without the guard, and the first line that pytest says about it."""
    path = folder / "elo_engine" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutant.text, mutant.replacement), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, f"tests/{mutant.test}"], cwd=folder, env=environment, text=True, capture_output=True
        )
    finally:
        path.write_text(whole, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.test}: pytest could not run it\n{done.stdout[-2000:]}")
    said = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E ")]
    return done.returncode == 0, (said or [""])[0]


def main() -> int:
    """The table, line by line as it is found; FAULT numbers on the command line choose some."""
    chosen = [one for one in MUTANTS if not sys.argv[1:] or str(one.fault) in sys.argv[1:]]
    for one in chosen:
        found = (ROOT / "elo_engine" / one.file).read_text(encoding="utf-8").count(one.text)
        if found != 1:
            raise SystemExit(f"{one.file}: the guard is there {found} times, not once: {one.text!r}")
    survivors = 0
    print("| # | guard taken away | in | test | seen |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "elo_engine", folder / "elo_engine", ignore=shutil.ignore_patterns("__pycache__"))
        for other in ("tests", "kernels", "csrc", "benchmarks", "docs", "pyproject.toml"):
            (folder / other).symlink_to(ROOT / other)
        for one in chosen:
            passed, said = survives(folder, one)
            survivors += passed
            seen = "NO" if passed else "yes"
            print(f"| {one.fault} | {one.guard} | `{one.file}` | `{one.test}` | {seen} |", flush=True)
            print(f"{one.fault} {one.guard}: {said[:200]}", file=sys.stderr, flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
