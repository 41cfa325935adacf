"""The tree as a whole: complete in a clone, bound to no machine, layers kept, and the names that must not be taken."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.support.serving import ROOT

SKIPPED = {".git", ".venv", "build"}
TEXT = frozenset({"", ".cpp", ".cu", ".html", ".js", ".css", ".jinja", ".json", ".lock", ".md", ".py"}) | frozenset(
    {".toml", ".txt", ".yml", ".yaml"}
)

# Paths of a machine and hosts of registries; written so that this file does not match itself.
FOREIGN = re.compile(
    r"(?<![\w.~])/(?:wo[r]k|ro[o]t|op[t]/wheels|op[t]/pypi)(?:/|\b)|\.\./sha[r]ed|/ho[m]e/(?!entrgi\b)\w"
    r"|pyp[i]\.org|pythonhoste[d]\.org|download\.pytorc[h]\.org|registry\.npmj[s]\.org|deb\.debia[n]\.org"
)


def files() -> list[Path]:
    """What a clone holds; everything below the root where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.decode().split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts)]


def test_the_pattern_finds_what_it_looks_for() -> None:
    bad = ("/wor" + "k/main/x", '"/roo' + 't/.cache"', "../share" + "d", "/hom" + "e/alice", "https://pypi" + ".org")
    good = ("/home/entrgi/.cache", "https://example.com/work/1", "framework/x")
    assert [bool(FOREIGN.search(text)) for text in (*bad, *good)] == [True] * 5 + [False] * 3


def test_nothing_names_a_machine_or_a_registry() -> None:
    found = []
    for path in files():
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
                if path.name == "Dockerfile":
                    line = line.replace("target=/roo" + "t/.cache/pip", "")  # pip's cache in the build container
                if hit := FOREIGN.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    assert found == []


def test_test_files_have_names_of_their_own_and_make_no_package() -> None:
    """A package tests/kernels would shadow ours."""
    names = [path.name for path in files() if path.is_relative_to(ROOT / "tests")]
    assert "__init__.py" not in names
    names = [name for name in names if name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_no_big_files() -> None:
    """Bundled weights are at most a few MB each; anything larger was committed by mistake."""
    assert [str(p) for p in files() if p.stat().st_size > 16_000_000] == []


def test_no_pickled_weights() -> None:
    assert [str(p) for p in files() if p.suffix in {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"}] == []


BUILD_A_MODEL = """
import kernels, pathlib, sys
assert pathlib.Path(kernels.__file__).resolve().parent == pathlib.Path(sys.argv[1]) / "kernels", kernels.__file__
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16,
)
print(tuple(LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape))
"""


def test_transformers_builds_a_model_after_our_kernels_were_imported() -> None:
    """transformers looks for a distribution that provides the import name `kernels`; ours is only a folder."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD_A_MODEL, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 32)"


def test_no_installed_distribution_owns_our_names() -> None:
    assert not {"server", "kernels", "clients"} & packages_distributions().keys()
