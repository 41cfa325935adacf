"""The book of adapters: every worker has what it says, also those that start later, and no job gets another version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.errors import ConfigurationError, InvalidRequest, NotReady, RequestError, Unavailable, UnknownModel
from server.types import Job
from server.wire.messages import Failed, Finished
from tests.front.scripted import Driven, answer, configured, job, running, until


def adapter(folder: Path, says: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(says)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def there(folders: dict[str, str]) -> list[str]:
    return [folder for folder in folders.values() if Path(folder).exists()]


def with_adapter(engine: Driven, name: str, adapter: str = "policy", **values: int) -> Job:
    return job(name, adapter=engine.adapters.version(adapter), **values)


async def test_every_worker_has_it_and_those_that_start_later_though_its_folder_is_gone(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "policy")
    async with running(configured(data_parallel=2, loras={"first": str(adapter(tmp_path / "first"))})) as engine:
        await engine.adapters.load("policy", folder, tmp_path)
        assert engine.adapters.names == ("first", "policy")
        shutil.rmtree(tmp_path / "first")
        shutil.rmtree(folder)
        for rank in range(2):
            await engine.kill(rank)
        await until(lambda: all(replica.ready for replica in engine.replicas))
        for name in ("first", "policy"):
            both = [engine.submit(with_adapter(engine, f"{name}-{number}", name)) for number in range(2)]
            assert [isinstance(await answer(stream), Finished) for stream in both] == [True, True]
        assert engine.in_flight == 0
        copies = engine.adapters.folders
        assert len(there(copies)) == 2
    assert not there(copies)


async def test_a_second_version_takes_the_place_of_the_first_for_later_jobs_alone(
    engine: Driven, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "policy")
    await engine.adapters.load("policy", folder, tmp_path)
    old = engine.adapters.folders
    running_on = await engine.begin(with_adapter(engine, "running", steps=50, step_ms=20))
    replayed = await engine.begin(with_adapter(engine, "replayed", steps=2000, step_ms=20))
    late = with_adapter(engine, "late")
    await engine.adapters.load("policy", folder, tmp_path, in_place=True)
    assert engine.adapters.names == ("policy",)
    assert not engine.adapters.folders.items() & old.items()
    assert not there(old)
    assert isinstance(await answer(running_on), Finished)
    assert isinstance(await engine.last(with_adapter(engine, "new")), Finished)
    await engine.kill()
    for event in (await answer(replayed), await engine.last(late)):
        assert isinstance(event, Failed)
        assert (event.error().status, event.error().code) == (503, "adapter_gone")
    assert isinstance(await engine.last(with_adapter(engine, "new-again")), Finished)


async def test_unloading_lets_running_jobs_end_and_takes_no_more(engine: Driven, tmp_path: Path) -> None:
    await engine.adapters.load("policy", adapter(tmp_path / "policy"), tmp_path)
    stream = await engine.begin(with_adapter(engine, "running", steps=20, step_ms=20))
    await engine.adapters.unload("policy")
    assert engine.adapters.names == ()
    assert isinstance(await answer(stream), Finished)
    with pytest.raises(UnknownModel):
        engine.adapters.version("policy")
    with pytest.raises(UnknownModel) as caught:
        await engine.adapters.unload("policy")
    assert caught.value.param == "lora_name"


async def refusal(engine: Driven, name: str, folder: Path, within: Path, *, in_place: bool = False) -> RequestError:
    before = engine.adapters.folders
    with pytest.raises(RequestError) as caught:
        await engine.adapters.load(name, folder, within, in_place=in_place)
    assert engine.adapters.folders == before
    return caught.value


async def test_what_cannot_be_loaded_leaves_everything_as_it_was(tmp_path: Path) -> None:
    within = tmp_path / "loras"
    good, refused, deadly = (adapter(within / name, name) for name in ("good", "refuse", "die"))
    outside = adapter(tmp_path / "outside")
    (within / "linked").symlink_to(outside)
    (within / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (within / "files" / name).symlink_to(outside / name)
    async with running(configured(max_loras=1)) as engine:
        for folder in (str(outside), "linked", "files", "absent", "../outside", "\0"):
            error = await refusal(engine, "policy", within / folder, within)
            assert isinstance(error, InvalidRequest)
            assert (error.param, str(tmp_path) in error.message) == ("lora_path", False)
        error = await refusal(engine, "policy", refused, within)
        assert (error.param, error.message) == ("lora_path", "adapter_config.json: not this one")
        assert isinstance(await refusal(engine, "policy", deadly, within), Unavailable)
        await until(lambda: engine.ready)
        await engine.adapters.load("policy", good, within)
        assert (await refusal(engine, "policy", good, within)).param == "load_inplace"
        assert (await refusal(engine, "second", good, within)).param == "lora_name"
        assert (await refusal(engine, "policy", refused, within, in_place=True)).param == "lora_path"
        assert isinstance(await engine.last(with_adapter(engine, "still")), Finished)
        await engine.kill()
        assert isinstance(await refusal(engine, "policy", good, within, in_place=True), NotReady)


@pytest.mark.parametrize(
    ("says", "words"), [("refuse", "lora: policy@1: adapter_config.json: not"), (None, "lora: policy: ")]
)
async def test_a_wrong_adapter_ends_the_start(says: str | None, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "absent" if says is None else adapter(tmp_path / "policy", says)
    with pytest.raises(ConfigurationError, match=words):
        async with running(configured(loras={"policy": str(folder)})):
            pass
