"""The table of docs/security.md: every test that it names exists, and every obligation names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "security.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")

# Calls that run, unpickle or fetch what they are given.
DANGEROUS = {"eval", "exec", "compile", "__import__", "system", "popen", "urlopen", "urlretrieve"}
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "requests", "urllib.request", "ftplib", "telnetlib"}


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| obligation")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_obligation_names_a_test() -> None:
    assert len(rows()) >= 45
    for obligation, how, tests in rows():
        assert obligation
        assert how
        assert NAMED.search(tests), obligation


def test_every_named_test_exists() -> None:
    named = NAMED.findall(TABLE)
    assert len(named) == TABLE.count("::")
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{file}::{name}"


def calls(tree: ast.AST) -> set[str]:
    """Names of plain functions and of attributes that are called (`re.compile` and the like are not `compile`)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "compile":
            found.add(node.func.attr)
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_source_has_no_dangerous_call() -> None:
    """In the server: nothing is evaluated, unpickled or fetched, and no checkpoint's code is trusted."""
    files = sorted((ROOT / "server").rglob("*.py"))
    assert len(files) > 60
    for file in files:
        text = file.read_text("utf-8")
        tree = ast.parse(text)
        # A module's own `eval()` (torch) takes no argument; `exec` and the rest have no harmless namesakes here.
        assert not (calls(tree) - {"eval"}) & DANGEROUS, file
        assert not any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "eval"
            for node in ast.walk(tree)
        ), file
        assert not imports(tree) & MODULES, file
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                assert isinstance(node.value, ast.Constant), file
                assert node.value.value is False, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("yaml", "load"), ("np", "load")}, file
