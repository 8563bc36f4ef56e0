"""The disk side of a model: which tensor lies where, reading some of them, writing changed ones back.
Computes nothing.

`index` opens a folder strictly and reads headers only; `reader` takes chosen tensors; `writer` and `publish`
make a new folder that is absent or complete; `hub` finds a model by path or id. Promises: the source's bytes
never change, an output is absent or complete and verifiable, and an interrupted run leaves at most one
temporary folder, removed at the next start.
"""

from elo_engine.checkpoint.commit import COMMIT_NAME, verify_commit, write_file
from elo_engine.checkpoint.hub import model_files, resolve_model
from elo_engine.checkpoint.index import CheckpointIndex, ShardInfo, TensorEntry, open_checkpoint
from elo_engine.checkpoint.publish import preflight_space, publish
from elo_engine.checkpoint.reader import CheckpointReader
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.checkpoint.writer import RewriteStats, rewrite_checkpoint, write_safetensors

__all__ = [
    "COMMIT_NAME",
    "SYSCALLS",
    "CheckpointIndex",
    "CheckpointReader",
    "RewriteStats",
    "ShardInfo",
    "TensorEntry",
    "model_files",
    "open_checkpoint",
    "preflight_space",
    "publish",
    "resolve_model",
    "rewrite_checkpoint",
    "verify_commit",
    "write_file",
    "write_safetensors",
]
