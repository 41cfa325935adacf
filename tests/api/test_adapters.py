"""LoRA adapters over HTTP: recorded runs, alone, among others and while their adapter is replaced; what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.scripted_engine import check_envelope, make, open_client
from tests.golden.run_golden import request_body
from tests.support.lora import write_adapter
from tests.support.serving import GOLDEN, Launch, Served, golden_flags, wait_for

FOLDER = GOLDEN / "a2d-qwen3-tiny"
AT_ONCE = 16


def recorded(file: str, model: str) -> list[tuple[dict[str, Any], list[int]]]:
    """Requests to a model of this name, and the tokens that answer them."""
    return [
        (request_body(case, prompt, model, "rm"), case["expected"]["token_ids"][index])
        for case in json.loads((FOLDER / file).read_text())
        for index, prompt in enumerate(case["prompts"])
    ]


def tokens(server: Served, body: dict[str, Any]) -> list[int]:
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == body["model"]
    return list(response.json()["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below `lora_dir`: the recorded adapter, another one, and one of too high a rank. Beside it, one more."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(FOLDER / "lora", folder / "loras" / "golden")
    write_adapter(folder / "loras" / "another", FOLDER / "dlm", rank=2, seed=9)
    write_adapter(folder / "loras" / "wide", FOLDER / "dlm", rank=16)
    write_adapter(folder / "loras" / "dora", FOLDER / "dlm", use_dora=True)
    write_adapter(folder / "outside", FOLDER / "dlm")
    (folder / "loras" / "linked").symlink_to(folder / "outside")
    return folder


@pytest.fixture(scope="module")
def adapted(launch: Launch, folders: Path) -> Iterator[Served]:
    server = launch(
        *golden_flags("a2d-qwen3-tiny"), "--lora", f"policy={folders / 'loras' / 'golden'}", "--allow-runtime-lora",
        "--lora-dir", str(folders / "loras"), "--max-loras", "2", "--max-lora-rank", "8", model=None,
    )  # fmt: skip
    server.wait_ready()
    yield server
    server.stop()


def load(server: Served, name: str, path: str, **more: Any) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def test_recorded_runs_alone_and_mixed_with_the_base_and_another_adapter(adapted: Served, folders: Path) -> None:
    runs = recorded("lora-trajectories.json", "policy")
    for body, expected in runs:
        assert tokens(adapted, body) == expected
    assert load(adapted, "other", str(folders / "loras" / "another")).status_code == 200
    others = [({**body, "model": "other"}, tokens(adapted, {**body, "model": "other"})) for body, _ in runs]
    mixed = [*runs, *recorded("trajectories.json", "dlm"), *others]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda run: tokens(adapted, run[0]), mixed))
    assert answers == [expected for _, expected in mixed]
    assert all(other != expected for (_, other), (_, expected) in zip(others, runs, strict=True))
    counted = [adapted.metric("generation_tokens_total", model_name=name) > 0 for name in ("dlm", "policy", "other")]
    assert counted == [True, True, True]
    assert adapted.post("/v1/unload_lora_adapter", {"lora_name": "other"}).json() == {
        "id": "other", "object": "model", "deleted": True,
    }  # fmt: skip
    check_envelope(adapted.post("/v1/unload_lora_adapter", {"lora_name": "other"}), 404)
    check_envelope(adapted.post("/v1/chat/completions", others[0][0]), 404)


def test_an_answer_is_of_one_version_while_its_adapter_is_replaced(adapted: Served) -> None:
    runs = recorded("lora-trajectories.json", "policy")
    versions: dict[str, list[list[int]]] = {}
    for path in ("another", "golden"):
        assert load(adapted, "policy", path, load_inplace=True).status_code == 200
        versions[path] = [tokens(adapted, body) for body, _ in runs]
    assert versions["golden"] == [expected for _, expected in runs]
    enough = threading.Event()

    def ask(first: int) -> list[tuple[int, list[int]]]:
        given = []
        for index in itertools.cycle([*range(first, len(runs)), *range(first)]):
            given.append((index, tokens(adapted, runs[index][0])))
            if enough.is_set():
                return given
        raise AssertionError

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asking = [pool.submit(ask, first % len(runs)) for first in range(AT_ONCE)]
        for path in ("another", "golden") * 5:
            assert load(adapted, "policy", path, load_inplace=True).status_code == 200
            assert tokens(adapted, runs[0][0]) == versions[path][0]  # what comes after the loading gets what was loaded
        enough.set()
        answers = [answer for each in asking for answer in each.result()]
    assert len(answers) >= AT_ONCE
    assert all(given in (versions["golden"][index], versions["another"][index]) for index, given in answers)


def test_a_worker_that_takes_the_place_of_a_killed_one_has_the_same_version(adapted: Served, folders: Path) -> None:
    written = write_adapter(folders / "loras" / "written", FOLDER / "dlm", rank=2, seed=3)
    assert load(adapted, "written", "written").status_code == 200
    (body, _), *_ = recorded("lora-trajectories.json", "written")
    before = tokens(adapted, body)
    write_adapter(written, FOLDER / "dlm", rank=2, seed=4)  # a trainer's next step, which nobody has loaded
    (worker,) = re.findall(r"\(process (\d+)\) is ready", adapted.log.read_text())
    os.kill(int(worker), signal.SIGKILL)
    wait_for(lambda: adapted.metric("worker_restarts_total") == 1)
    assert tokens(adapted, body) == before  # it waits for the new worker
    assert load(adapted, "written", "written", load_inplace=True).status_code == 200
    assert tokens(adapted, body) != before
    assert adapted.post("/v1/unload_lora_adapter", {"lora_name": "written"}).status_code == 200


def test_models_name_an_adapters_parent_and_the_document_its_name(adapted: Served) -> None:
    listed = {model["id"]: model for model in adapted.client.get("/v1/models").json()["data"]}
    assert {name: (model["type"], model["root"], model["parent"]) for name, model in listed.items()} == {
        "dlm": ("diffusion", "dlm", None), "policy": ("diffusion", "policy", "dlm"), "rm": ("reward", "rm", None),
    }  # fmt: skip
    assert adapted.client.get("/v1/models/policy").json() == listed["policy"]
    own = ("id", "root", "parent")
    assert {**listed["policy"], **dict.fromkeys(own)} == {**listed["dlm"], **dict.fromkeys(own)}
    assert load(adapted, "new", "another").json()["parent"] == "dlm"
    assert '"new"' in adapted.client.get("/openapi.json").text
    assert adapted.metric("request_success_total", model_name="new", finished_reason="stop") == 0
    assert 'model_name="new"' in adapted.client.get("/metrics").text
    adapted.post("/v1/unload_lora_adapter", {"lora_name": "new"})
    assert '"new"' not in adapted.client.get("/openapi.json").text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"lora_path": "another"}, "lora_name", "required"),
        ({"lora_name": "x"}, "lora_path", "required"),
        ({"lora_name": "a b", "lora_path": "another"}, "lora_name", "pattern"),
        ({"lora_name": "dlm", "lora_path": "another"}, "lora_name", "another model"),
        ({"lora_name": "rm", "lora_path": "another"}, "lora_name", "another model"),
        ({"lora_name": "policy", "lora_path": "another"}, "load_inplace", "is loaded"),
        ({"lora_name": "x", "lora_path": "another", "base_model_name": "y"}, "base_model_name", "not a field"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path", "at least 1"),
        ({"lora_name": "x", "lora_path": "absent"}, "lora_path", "there is no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "../outside"}, "lora_path", "there is no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "linked"}, "lora_path", "there is no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "/etc"}, "lora_path", "there is no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "\0"}, "lora_path", "adapter"),
        ({"lora_name": "x", "lora_path": "y" * 4000}, "lora_path", "adapter"),
        ({"lora_name": "x", "lora_path": "wide"}, "lora_path", "r = 16 is more than max_lora_rank = 8"),
        ({"lora_name": "x", "lora_path": "dora"}, "lora_path", "use_dora"),
    ],
)
def test_what_is_refused_names_the_field(
    adapted: Served, folders: Path, body: dict[str, Any], param: str, words: str
) -> None:
    error = check_envelope(adapted.post("/v1/load_lora_adapter", body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert str(folders) not in error["message"]


async def test_without_the_setting_there_are_no_such_routes() -> None:
    async with open_client(make()) as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            check_envelope(await client.post(path, json={"lora_name": "x", "lora_path": "y"}), 404)
            assert path not in (await client.get("/openapi.json")).json()["paths"]
