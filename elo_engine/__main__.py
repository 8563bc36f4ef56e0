"""`python -m elo_engine` is `elo`."""

from elo_engine.cli import main

main()
