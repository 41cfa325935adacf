"""A guidance method that is registered in a module of the operator's: one row, and every part of a server knows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli import main
from server.errors import ConfigurationError
from server.methods import METHODS, Method, load_plugins, register
from tests.support.serving import Launch, golden_flags


def test_a_method_of_ones_own_is_served(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    server = launch("--plugins", "fading_method", *golden_flags(), model=None)
    server.wait_ready()
    assert "fading" not in METHODS  # only the server imported it
    listed = server.client.get("/v1/models").json()["data"][0]
    assert listed["guidance_methods"] == [*METHODS, "fading"]
    assert listed["defaults"]["best_of"]["fading"] == 4
    document = server.client.get("/openapi.json").json()
    assert document["components"]["schemas"]["Guidance"]["properties"]["method"]["anyOf"][0]["enum"][-1] == "fading"
    asked = {"prompt": "Once", "max_tokens": 6, "best_of": 1, "seed": 3, "temperature": 1.0, "trace": True}
    guided = {"method": "fading", "gradient_steps": 1, "eta": 0.1}
    answer = server.post("/v1/completions", {**asked, "guidance": guided})
    assert answer.status_code == 200, answer.text
    assert answer.json()["guidance"]["method"] == "fading"
    steps = [step for step in answer.json()["trace"][0][0] if step["revealed"]]  # others are passed over
    assert len(steps) > 1
    assert [step["mean_w"] for step in steps] == pytest.approx([step["time"] for step in steps])
    refused = server.post("/v1/completions", {**asked, "guidance": "waning"})
    assert f"'{[*METHODS][-1]}' or 'fading' (got 'waning')" in refused.json()["error"]["message"]


@pytest.mark.parametrize("module", ["no_such_module", "fading_twice"])
def test_a_module_that_cannot_be_used_is_refused_by_name(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fading_twice.py").write_text("import server.methods as m\nm.register(m.METHODS['entrgi'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=f"plugins: {module}"):
        load_plugins([module])
    assert main(["--plugins", module]) == 2
    assert f"plugins: {module}" in capsys.readouterr().err


def test_a_row_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="small letters"):
        register(Method("Two words", "", ""))
    with pytest.raises(ConfigurationError, match="'smc'"):  # another word of `guidance`
        register(Method("smc", "", ""))
    with pytest.raises(ValueError, match="no weight"):
        METHODS["bon"].weigh(None)  # type: ignore[arg-type]
