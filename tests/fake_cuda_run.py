"""The command line on `fake_cuda`; started as a script with the library made of `fake_cuda.cpp` and lists of arguments
of `elo`, as JSON, each of which it calls. It prints their exit statuses, and what they printed, as JSON.

Where a number of the device would come to the host there is 1000 or 0, and where a tensor would, ones: so files,
reports and decisions are made, of numbers that mean nothing.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before torch

import contextlib
import io
import json

from fake_cuda import AtOnce, fake_cuda, install

from elo_engine import cli, report
from elo_engine.stream import reading


def main() -> None:
    install()
    report._plot = lambda *of: False  # nothing of a device is in it
    reading.ThreadPoolExecutor = AtOnce  # type: ignore[attr-defined]
    for text in sys.argv[2:]:
        said, status = io.StringIO(), 0
        sys.argv = ["elo", *json.loads(text)]
        with fake_cuda(), contextlib.redirect_stdout(said):
            try:
                cli.main()
            except SystemExit as stop:
                status = int(stop.code or 0)
        print(json.dumps({"status": status, "said": said.getvalue()}))


if __name__ == "__main__":
    main()
