"""Nothing but the path to the top-level kernels/ folder, whose README.md says why it is there and why like
this.

In the source tree and in an editable install `elo_engine.kernels.swiglu` is kernels/swiglu.py, found through
this path. In a wheel setup.py puts those files at elo_engine/kernels/ itself and this one stays behind.
"""

from pathlib import Path

_beside = Path(__file__).resolve().parents[2] / "kernels"
# A folder with an __init__.py is not ours: it would be the package of that name from PyPI.
if _beside.is_dir() and not (_beside / "__init__.py").exists():
    __path__.append(str(_beside))
