"""The disk side of a model: which tensor lies where, reading some of them, writing changed ones back.
Computes nothing.

`index` opens a folder strictly and reads headers only; `reader` takes chosen tensors; `writer` and `publish`
make a new folder that is absent or complete; `hub` finds a model by path or id, and `partial` fetches of a
hub's model what is read. Promises: the source's bytes
never change, an output is absent or complete and verifiable, and an interrupted run leaves at most one
temporary folder, removed at the next start.
"""

from elo_engine.checkpoint.commit import COMMIT_NAME, verify_commit, write_file
from elo_engine.checkpoint.header import strict_json
from elo_engine.checkpoint.hub import model_files, resolve_model
from elo_engine.checkpoint.index import CheckpointIndex, ShardInfo, TensorEntry, open_checkpoint
from elo_engine.checkpoint.partial import PartialStore, cache_folder
from elo_engine.checkpoint.patch import apply_patch, diff_checkpoints, revert_patch, verify_patch
from elo_engine.checkpoint.patch_average import average_patches
from elo_engine.checkpoint.patch_writer import PatchStats, Progress
from elo_engine.checkpoint.pieces import Pieces, StoredTensor, stored_tensors
from elo_engine.checkpoint.publish import preflight_space, publish, remove_leftovers
from elo_engine.checkpoint.reader import CheckpointReader
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.checkpoint.writer import RewriteStats, rewrite_checkpoint, space_needed, write_safetensors

__all__ = [
    "COMMIT_NAME",
    "SYSCALLS",
    "CheckpointIndex",
    "CheckpointReader",
    "PartialStore",
    "PatchStats",
    "Pieces",
    "Progress",
    "RewriteStats",
    "ShardInfo",
    "StoredTensor",
    "TensorEntry",
    "apply_patch",
    "average_patches",
    "cache_folder",
    "diff_checkpoints",
    "model_files",
    "open_checkpoint",
    "preflight_space",
    "publish",
    "remove_leftovers",
    "resolve_model",
    "revert_patch",
    "rewrite_checkpoint",
    "space_needed",
    "stored_tensors",
    "strict_json",
    "verify_commit",
    "verify_patch",
    "write_file",
    "write_safetensors",
]
