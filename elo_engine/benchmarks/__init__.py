"""Nothing but the path to the top-level benchmarks/ folder, so that `elo bench` finds it in the source tree, in an
editable install and in a wheel; made as elo_engine/kernels/__init__.py is, and for the same reasons.
"""

from pathlib import Path

_beside = Path(__file__).resolve().parents[2] / "benchmarks"
if _beside.is_dir() and not (_beside / "__init__.py").exists():
    __path__.append(str(_beside))
