"""The documents: commands that exist, links that lead somewhere, requests that the server would take."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clients.cli import parser
from docs import tables
from server.api.fields import ChatCompletionRequest, CompletionRequest
from tests.support.serving import ROOT, Launch

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """The lines of code blocks, continued lines joined."""
    return [line for block in blocks(document) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def test_the_tables_of_the_contract_are_the_servers_own() -> None:
    text = tables.DOCUMENT.read_text("utf-8")
    assert tables.written(text) == text, "run `python -m docs.tables`"


FOLDERS = "|".join(path.name for path in (ROOT / "server").iterdir() if path.is_dir())
NAMED = re.compile(rf"`((?:server|kernels|clients|deploy|tests|docs|demo|benchmarks|{FOLDERS})/[\w./-]+)`")


def test_documents_and_the_promised_targets_are_there() -> None:
    names = {str(d.relative_to(ROOT)) for d in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/operations.md"} <= names
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    promised = "setup serve test check bench bench-kernels gpu-check conformance faults soak clean help"
    assert set(promised.split()) <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_targets_links_and_files_that_a_document_names_exist(document: Path) -> None:
    """Files by their path from the root, or, in the server, from its own folder and perhaps without `.py`."""
    text = document.read_text("utf-8")
    code = "\n".join(re.findall(r"`([^`\n]+)`", text) + commands(document))
    assert set(re.findall(r"^make ([a-z][a-z-]*)", code, re.MULTILINE)) <= TARGETS
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert "://" in link or (document.parent / link).exists(), link
    for name in NAMED.findall(text):
        if "NAME" not in name and name != "text/event-stream":
            places = [folder / name.rstrip("/") for folder in (ROOT, ROOT / "server", document.parent)]
            assert any(path.exists() or path.with_suffix(".py").exists() for path in places), name


def test_the_readmes_requests_are_valid() -> None:
    bodies = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", "\n".join(commands(ROOT / "README.md")))]
    assert bodies
    assert any(body.get("guidance") == "entrgi" for body in bodies)
    for body in bodies:
        schema = ChatCompletionRequest if "messages" in body else CompletionRequest
        assert schema.model_validate_json(json.dumps(body)).model_dump(exclude_unset=True)


@pytest.mark.parametrize("document", ["README.md", "docs/clients.md"])
def test_client_commands_parse(document: str) -> None:
    calls = re.compile(r"(?:-m clients|(?:^|\| )entrgi) ([^|]+)").findall
    found = [call for line in commands(ROOT / document) for call in calls(line)]
    assert len(found) > 3
    for call in found:
        parser().parse_args(shlex.split(call, comments=True))  # which exits where it cannot


@pytest.mark.slow
def test_the_cookbooks_requests_run_as_they_stand_and_give_one_text(launch: Launch) -> None:
    """Those that need nothing but what is here; `make conformance` tries the other clients."""
    server = launch(model=None)
    server.wait_ready()
    text = (ROOT / "docs" / "cookbook.md").read_text("utf-8").replace("http://127.0.0.1:8000", server.url)
    recipes = dict(re.findall(r"^### (\S+)\n.*?^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    ask = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    curl = json.loads(subprocess.run(recipes["curl"], shell=True, **ask).stdout)["choices"][0]
    python = subprocess.run([sys.executable, "-c", recipes["openai-python"]], **ask).stdout
    assert python.startswith(f"{curl['message']['content']}\n{curl['reward']} [[")


def test_the_readmes_picture_is_small_and_loads_nothing() -> None:
    picture = (ROOT / "docs" / "plots" / "steering.svg").read_text("utf-8")
    assert len(picture.encode()) < 300_000
    assert re.findall(r"https?://[^\"]+|href|url\(|@import|<script", picture) == ["http://www.w3.org/2000/svg"]
