"""elo_engine: teach a multilingual LLM a new language by training its outer layers alone (ELO, arXiv 2601.03648).

The pipeline is the folder listing: `detach` -> `pretrain` -> `reattach` -> `align`, each from files to files, each
behind one verb of the `elo` command. `elo_engine.config` says what a run is, `elo_engine.run_dir` what it leaves on
disk.

Shape legend, used as suffixes of tensor names in every file that holds tensors:

    B  sequences (rows) in a micro-batch        H  query heads
    T  tokens a row                             K  key/value heads
    N  = B * T, tokens in a micro-batch         E  head width
    D  model width                              V  vocabulary
    F  MLP width

`hidden_ND` is a matrix of N tokens by D features; a gradient is `d_hidden_ND`.
"""

from __future__ import annotations

__version__ = "0.1.0"
