"""What is read becomes data and never code, and what is installed is named with its range."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("elo_engine", "kernels", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)
SOURCES += [ROOT / "setup.py"]
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_NAMES = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> list[str]:
    """What a file does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _calls(node)
    return found


def _calls(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    found = [name] if name in _NAMES or name in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load") else []
    if name == "torch.load" and options.get("weights_only") != "True":
        found.append(name)
    for option in ("trust_remote_code", "allow_pickle", "shell"):
        if options.get(option, "False") != "False":
            found.append(f"{name}({option}={options[option]})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval(text)", "yaml.load(file)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)", "os.system(text)",
    ],
)  # fmt: skip
def test_the_check_sees_it(line: str) -> None:
    assert dangers(line)
    assert not dangers("torch.load(path, weights_only=True); yaml.safe_load(file); re.sub('a', 'b', text)")


def requirements() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"dependencies": project["dependencies"], **project["optional-dependencies"]}


def test_every_dependency_has_a_lower_bound_and_none_an_exact_pin() -> None:
    """Ranges, so that a user's other packages can be there too, and mended versions reach them."""
    for extra, lines in requirements().items():
        for line in lines:
            if line.startswith("elo-engine"):
                continue
            bounds = line.partition(";")[0]
            assert re.search(r">=\s*\d", bounds), f"{extra}: {line} has no lower bound"
            assert "==" not in bounds, f"{extra}: {line} is an exact pin"


def test_the_tests_run_on_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins) > 20
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", pin) for pin in pins)


AUDITS = {
    "Found 2 known vulnerabilities in 1 package\nName Version ID Fix Versions\n": (2, "Found 2 known"),
    "No known vulnerabilities found\na  Not found on PyPI and could not be audited: a (1)\n": (0, "audit: 1 packages"),
    "ERROR: ConnectionError\n": (0, "could not be made here: ERROR: ConnectionError"),
}


@pytest.mark.parametrize("answer", AUDITS)
def test_the_audit_fails_for_vulnerabilities_and_says_what_it_could_not_ask(answer: str, tmp_path: Path) -> None:
    """`make audit` with a pip-audit that gives this answer."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}END\n")
    program.chmod(0o755)
    (tmp_path / "constraints.txt").touch()
    for stamp in (".torch", ".stamp-test"):
        (tmp_path / ".venv" / stamp).touch()
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.stamp-test", "audit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    status, said = AUDITS[answer]
    assert done.returncode == status and said in done.stdout + done.stderr, done
