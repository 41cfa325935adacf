"""The table of docs/security.md: every test that it names exists, and every obligation names one."""

from __future__ import annotations

import ast
import re

from tests.support.serving import ROOT

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


def dangers(node: ast.AST) -> set[str]:
    """What a node calls, imports, sets or reads that is dangerous. `re.compile` and the like are not `compile`, and a
    module's own `eval()` (torch) is not `eval`; the other names have no harmless namesakes here."""
    match node:
        case ast.Call(func=ast.Name(name)):
            return {name} & DANGEROUS
        case ast.Call(func=ast.Attribute(attr=name)):
            return {name} & (DANGEROUS - {"eval", "compile"})
        case ast.Import(names):
            return {alias.name for alias in names} & MODULES
        case ast.ImportFrom(module=str(name)):
            return {name} & MODULES
        case ast.keyword(arg="trust_remote_code" | "allow_pickle" | "shell" as name, value=value):
            return set() if isinstance(value, ast.Constant) and value.value is False else {name}
        case ast.Attribute(value=ast.Name("torch" | "yaml" | "np" as name), attr="load"):
            return {f"{name}.load"}
    return set()


def test_the_source_has_no_dangerous_call() -> None:
    """In the server: nothing is evaluated, unpickled or fetched, and no checkpoint's code is trusted."""
    files = sorted((ROOT / "server").rglob("*.py"))
    assert len(files) > 60
    for file in files:
        found = [dangers(node) for node in ast.walk(ast.parse(file.read_text("utf-8")))]
        assert not set().union(*found), file


def test_what_is_dangerous_is_found() -> None:
    bad = ("eval(x)", "os.system(x)", "exec(x)", "import pickle", "from dill import x", "f(shell=1)", "np.load(f)")
    good = ("model.eval()", "re.compile(x)", "import json", "f(shell=False)", "json.load(f)")
    found = [any(dangers(node) for node in ast.walk(ast.parse(code))) for code in (*bad, *good)]
    assert found == [True] * len(bad) + [False] * len(good)
