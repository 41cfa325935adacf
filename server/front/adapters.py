"""The book of LoRA adapters: which name stands for which version, and that every worker has all of them.

A version is one loading of one name; a job carries the version that its name stood for when it was accepted. What a
version holds is copied first, so that whatever happens to the folder that was named, every worker has the same, those
that start later too. Workers are told the whole book (`SetAdapters`) whenever it changes and before they take work.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigurationError, InvalidRequest, NotReady, Unavailable, UnknownModel, quote
from server.wire.messages import AdaptersSet, SetAdapters, frame

if TYPE_CHECKING:
    from server.front.replica import Replica

logger = logging.getLogger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Adapters:
    """At most `most` adapters by name, for `replicas`. All methods belong to the event loop's thread."""

    def __init__(self, most: int, replicas: Sequence[Replica]) -> None:
        self._most, self._replicas = most, replicas
        self._versions: dict[str, str] = {}
        self._copies: dict[str, Path] = {}
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._loading = ""  # the version that workers are loading, and what they say about it, by rank
        self._answers: dict[int, asyncio.Future[AdaptersSet | None]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are loaded, in the order of their loading."""
        return tuple(self._versions)

    def version(self, name: str) -> str:
        """What a request for this adapter that is accepted now runs with. Raises UnknownModel."""
        if name not in self._versions:
            raise UnknownModel(f"the adapter {quote(name)} has been unloaded")
        return self._versions[name]

    @property
    def folders(self) -> dict[str, str]:
        """What every worker must have: the folder of each version."""
        return {version: str(self._copies[version]) for version in self._versions.values()}

    async def begin(self, folders: Mapping[str, str]) -> None:
        """Take in adapters by name before there is a worker. Raises ConfigurationError."""
        for name, folder in folders.items():
            try:
                self._versions[name] = await self._copy(name, Path(folder), Path("/"))
            except InvalidRequest as error:
                raise ConfigurationError(f"lora: {name}: {error.message}") from error

    async def load(self, name: str, folder: Path, within: Path, *, in_place: bool = False) -> None:
        """Load what `folder`, which must be below `within`, holds now; with `in_place` it takes the place of the
        adapter of that name, for requests that are accepted from then on. Returns when all workers have it.

        Raises InvalidRequest, NotReady without a worker and Unavailable when all are lost meanwhile; then everything is
        as it was.
        """
        async with self._changing:
            if name in self._versions and not in_place:
                raise InvalidRequest(
                    f"adapter {quote(name)} is loaded; with `load_inplace` it is replaced", "load_inplace"
                )
            if name not in self._versions and len(self._versions) >= self._most:
                raise InvalidRequest(f"{self._most} adapters are loaded, the most that this server holds", "lora_name")
            gone = version = await self._copy(name, folder, within)
            try:
                await self._reach_all(version)
                gone = self._versions.get(name, "")
                self._versions[name] = version
            finally:
                self._settle(gone)

    async def unload(self, name: str) -> None:
        """Take no more requests for an adapter; those that run keep it to their end. Raises UnknownModel."""
        async with self._changing:
            if name not in self._versions:
                raise UnknownModel(f"there is no adapter {quote(name)}", "lora_name")
            self._settle(self._versions.pop(name))

    def answered(self, rank: int, answer: AdaptersSet | None) -> None:
        """A worker has said what it holds, or (None) is lost; its successor is told anew."""
        if answer is not None and answer.refused:
            logger.warning("worker %d could not load adapters: %s", rank, answer.refused)
        waiting = self._answers.get(rank)
        if waiting is None or waiting.done():
            return
        if answer is None or self._loading in (*answer.held, *answer.refused):
            waiting.set_result(answer)

    def close(self) -> None:
        """Remove the copies."""
        for copy in self._copies.values():
            _remove(copy)

    async def _reach_all(self, version: str) -> None:
        """Have the ready workers load a version beside what is in the book, and wait until each has said so."""
        loop = asyncio.get_running_loop()
        self._loading = version
        self._answers = {replica.rank: loop.create_future() for replica in self._replicas if replica.ready}
        if not self._answers:
            raise NotReady("no worker is ready to load an adapter")
        self._tell({**self.folders, version: str(self._copies[version])})
        answers = [answer for answer in await asyncio.gather(*self._answers.values()) if answer is not None]
        if not answers:
            raise Unavailable("the workers were lost while they loaded the adapter")
        for answer in answers:
            if version in answer.refused:
                raise InvalidRequest(answer.refused[version], "lora_path")

    async def _copy(self, name: str, folder: Path, within: Path) -> str:
        """A new version of a name, with a copy of what the folder holds now. Raises InvalidRequest."""
        version = f"{name}@{next(self._numbers)}"
        self._copies[version] = await asyncio.to_thread(_copied, folder, within)
        return version

    def _settle(self, gone: str) -> None:
        """Tell the workers the book, from which this version is gone, if it is one."""
        self._tell(self.folders)
        if gone:
            _remove(self._copies.pop(gone))

    def _tell(self, folders: dict[str, str]) -> None:
        for replica in self._replicas:
            replica.send(frame(SetAdapters(folders)))


def _copied(folder: Path, within: Path) -> Path:
    """A new folder `adapter`, in one of its own, with an adapter's two files. Links are followed, but not out of
    `within`: what lies elsewhere is as good as absent. Raises InvalidRequest."""
    copy = Path(tempfile.mkdtemp(prefix="entrgi-lora-")) / "adapter"
    copy.mkdir()
    try:
        for name in FILES:
            source = (folder / name).resolve()
            if not source.is_relative_to(within.resolve()) or not source.is_file():
                raise InvalidRequest(f"there is no {name} in a folder of this name", "lora_path")
            shutil.copyfile(source, copy / name)
    except BaseException as error:
        _remove(copy)
        if isinstance(error, OSError | ValueError):
            raise InvalidRequest("the adapter's files cannot be copied", "lora_path") from error
        raise
    return copy


def _remove(copy: Path) -> None:
    shutil.rmtree(copy.parent, ignore_errors=True)
