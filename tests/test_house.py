"""The rules of the house that a reader relies on, each held by a test, and each test shown to fail where it should."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400

# Who may import whom: a module imports its own group and the groups named here. Groups are the sub-packages, `errors`,
# `config`, `cli`, and `verbs` for all other modules at the top of the package.
MAY_IMPORT = {
    "errors": set(),
    "native": set(),
    "config": {"errors"},
    "checkpoint": {"errors", "config", "native"},
    "data": {"errors", "config"},
    "model": {"errors", "config", "native", "checkpoint", "data"},
    "measure": {"errors", "config", "model.spec"},
    "train": {"errors", "config", "checkpoint", "data", "model", "measure"},
    "stream": {"errors", "config", "checkpoint", "data", "model", "measure", "train"},
    "verbs": {"errors", "config", "checkpoint", "data", "model", "measure", "train", "stream"},
    "cli": {"errors", "config", "checkpoint", "data", "model", "measure", "train", "stream", "verbs"},
}
GROUP_OF_TOP = {
    "errors": "errors",
    "native": "native",
    "config": "config",
    "strict_yaml": "config",
    "cli": "cli",
    "__main__": "cli",
    "__init__": "cli",
}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
# Slow to import, or not installed everywhere: inside the functions that need them.
LAZY = {"transformers", "huggingface_hub", "pyarrow", "matplotlib", "gguf", "triton"}


def package_modules() -> dict[str, Path]:
    """`elo_engine.model.ops` -> its file, for every module of the package except the kernels."""
    files = (ROOT / "elo_engine").rglob("*.py")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name: path for name, path in modules.items() if not name.startswith("elo_engine.kernels")}


def source_files() -> Iterator[Path]:
    for folder in ("elo_engine", "kernels", "csrc", "benchmarks", "tests", "docs", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".hpp"):
                yield path
    yield ROOT / "setup.py"


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it inside a function) of all that a module imports; `from a import b` gives `a.b`."""
    package = module.split(".") if module.endswith("__init__") else module.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{start}.{alias.name}", id(node) in inside


def group(module: str) -> str:
    """The group of a dotted name below elo_engine, longest known first: `model.spec` is both itself and of `model`."""
    parts = module.split(".")[1:]
    if not parts:
        return "cli"
    return GROUP_OF_TOP.get(parts[0], parts[0] if (ROOT / "elo_engine" / parts[0]).is_dir() else "verbs")


def import_offences(module: str, source: str) -> list[str]:
    """Every import of one module of the package that breaks a rule."""
    offences = []
    own = group(module)
    for name, lazy in imports(ast.parse(source), module):
        top = name.split(".")[0]
        if top in ("benchmarks", "tests", "kernels"):
            offences.append(f"{module} imports {name}: nothing in the package may")
        if top in LAZY and not lazy:
            offences.append(f"{module} imports {name} when it is itself imported; do it inside the function")
        if top != "elo_engine" or name == "elo_engine.__version__":
            continue
        if name.startswith("elo_engine.benchmarks"):
            if module != "elo_engine.bench" or not lazy:
                offences.append(f"{module} imports {name}: only elo_engine.bench does, inside its functions")
            continue
        if name.startswith("elo_engine.kernels"):
            if not module.startswith("elo_engine.model.ops."):
                offences.append(f"{module} imports {name}: only elo_engine.model.ops sees the kernels")
            continue
        target = group(name)
        spec_only = name.startswith("elo_engine.model.spec") and "model.spec" in MAY_IMPORT[own]
        if target != own and target not in MAY_IMPORT[own] and not spec_only:
            offences.append(f"{module} imports {name}: {own} may import {sorted(MAY_IMPORT[own])}")
    return offences


def kernel_offences(source: str) -> list[str]:
    """Imports of a file in kernels/ other than torch, triton, the standard library and its neighbours."""
    names = [name for name, _ in imports(ast.parse(source), "elo_engine.kernels.file")]
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    return [
        name for name in names if name.split(".")[0] not in allowed and not name.startswith("elo_engine.kernels.")
    ]


def unsafe_calls(source: str) -> list[str]:
    """Ways for a file's or a checkpoint's content to become code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "torch.save"):
            found.append(call)
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"{call}(trust_remote_code={keywords['trust_remote_code']})")
        if call in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append(f"{call} without allow_pickle=False")
        if keywords.get("shell", "False") != "False":
            found.append(f"{call}(shell={keywords['shell']})")
    return found


def listed_packages(source: str) -> list[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "packages":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError("setup.py has no literal packages=[...]")


def packages_on_disk() -> list[str]:
    folders = {path.parent for path in (ROOT / "elo_engine").rglob("*.py")}
    return sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def tree_entries(readme: str) -> set[str]:
    """Top-level names in the README's file tree: the block with a line `elo_engine/ ...`.

    Unindented lines count; names come first and what is said of them follows after two spaces or more.
    """
    for block in code_blocks(readme):
        if re.search(r"^elo_engine/?(\s|$)", block, re.MULTILINE):
            columns = [re.split(r"\s{2,}", line)[0] for line in block.splitlines() if line[:1].strip()]
            return {name.rstrip("/") for column in columns for name in column.split()}
    raise AssertionError("README.md has no code block with the file tree (a line that begins with elo_engine/)")


def top_level() -> set[str]:
    """What a clone has at the top, hidden files aside except .ci; git keeps no empty folders."""
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]
    names = {name for name in os.listdir(ROOT) if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    shown = {name for name in names if not name.startswith(".") or name == ".ci"}
    return {name for name in shown if (ROOT / name).is_file() or any(p.is_file() for p in (ROOT / name).rglob("*"))}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_kernels_is_no_package_at_the_top() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow PyPI's `kernels`: kernels/README.md"


def test_transformers_still_imports_from_the_root() -> None:
    """The root comes first on sys.path, as under `python -m pytest` or in a notebook started there."""
    program = "from transformers import LlamaForCausalLM; import elo_engine.kernels; print(LlamaForCausalLM.__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_a_package_named_kernels_goes_before_the_folder(tmp_path: Path) -> None:
    """What PyPI's `kernels` needs, even with the root first on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    program = "import sys, kernels; assert sys.path[0] == ''; print(kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "kernels" / "__init__.py"), done.stderr


def test_kernels_are_found_where_they_lie() -> None:
    from elo_engine import kernels

    assert str(ROOT / "kernels") in list(kernels.__path__) or (Path(kernels.__path__[0]) / "swiglu.py").exists()


@pytest.mark.parametrize("module", sorted(package_modules()))
def test_imports_go_one_way(module: str) -> None:
    assert import_offences(module, package_modules()[module].read_text(encoding="utf-8")) == []


def test_the_kernels_import_torch_and_triton_alone() -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert len(files) >= 4
    assert {path.name: offences for path in files if (offences := kernel_offences(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elo_engine.errors", "from elo_engine.config import RunConfig"),
        ("elo_engine.config", "def f():\n    from elo_engine.model import names"),
        ("elo_engine.checkpoint.index", "from elo_engine.model.spec import ModelSpec"),
        ("elo_engine.checkpoint.index", "from ..train import loop"),
        ("elo_engine.measure.meter", "from elo_engine.model import ops"),
        ("elo_engine.model.reference", "from elo_engine.kernels import swiglu"),
        ("elo_engine.cli", "def f():\n    from elo_engine.benchmarks import speedup"),
        ("elo_engine.bench", "from elo_engine.benchmarks import speedup"),
        ("elo_engine.model.layers", "import elo_engine.train.loop"),
        ("elo_engine.train.loop", "from elo_engine import pretrain"),
        ("elo_engine.pretrain", "from elo_engine.cli import app"),
        ("elo_engine.pretrain", "from benchmarks import arms"),
        ("elo_engine.detach", "import transformers"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(import_offences(module, source)) == 1


def test_right_imports_are_not_taken_for_wrong_ones() -> None:
    assert import_offences("elo_engine.measure.flops", "from elo_engine.model.spec import ModelSpec") == []
    assert import_offences("elo_engine.model.ops.swiglu", "def f():\n    from elo_engine.kernels import swiglu") == []
    assert import_offences("elo_engine.stage", "from elo_engine import __version__, console") == []
    assert kernel_offences("from .arguments import check_rows\nimport triton.language as tl") == []
    assert kernel_offences("from elo_engine.errors import EloError") == ["elo_engine.errors.EloError"]


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert len(lengths) > 20
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_nothing_read_from_disk_becomes_code() -> None:
    files = [path for path in source_files() if path.suffix == ".py" and path.parent.name != "tests"]
    assert {str(path): found for path in files if (found := unsafe_calls(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=options.trust)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_an_unsafe_call_is_seen(source: str) -> None:
    assert len(unsafe_calls(source)) == 1
    assert unsafe_calls("model.eval(); yaml.safe_load(text); np.load(path, allow_pickle=False)") == []


def test_no_merge_is_left_half_made() -> None:
    marks = tuple(mark * 7 + " " for mark in "<>")
    texts = [path for path in ROOT.glob("*") if path.is_file()] + list((ROOT / "docs").glob("*.md")) + [*source_files()]
    lines = {path.name: path.read_text(encoding="utf-8", errors="replace").splitlines() for path in texts}
    assert len(lines) > 100
    assert [(name, line) for name, found in lines.items() for line in found if line.startswith(marks)] == []


def test_setup_lists_every_package() -> None:
    assert sorted(listed_packages((ROOT / "setup.py").read_text())) == packages_on_disk()


def test_the_readme_shows_the_top_of_the_tree() -> None:
    entries = tree_entries((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {name for name in entries if not name.startswith(".") or name == ".ci"} == top_level()
    assert [name for name in entries if not (ROOT / name).exists()] == []


def test_the_readmes_make_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join([*code_blocks(text), *re.findall(r"`([^`\n]+)`", text)])))
    assert "test" in used and "demo" in used, "the README shows neither `make test` nor `make demo`"
    assert used <= make_targets()


def test_the_tree_is_read_as_it_is_written() -> None:
    block = "elo_engine/     the package\n  cli.py        verbs\nMakefile setup.py  building\n.ci/  checks\n"
    readme = f"text\n```\n{block}```\n"
    assert tree_entries(readme) == {"elo_engine", "Makefile", "setup.py", ".ci"}
    assert {
        "setup", "demo", "test", "test-all", "test-oldest", "lint", "audit", "faults", "fuzz", "fuzz-readers", "soak",
        "scale", "bench", "card", "clean",
    } == make_targets()  # fmt: skip
