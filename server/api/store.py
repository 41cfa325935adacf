"""Objects that outlive the server: one JSON file each, written whole, in the folder of their kind.

All of them are read when the folder is opened, and an id that a client names is looked up among them: no path is ever
made of what a client says.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from server.api.answers import Answer
from server.api.middleware import key_holder
from server.errors import ConfigurationError, InvalidRequest, NotFound, quote


class Kept(Answer):
    """What all kinds of object have. `owner` is the fingerprint of the API key that sent it, None where the server has
    no keys; clients do not see it."""

    id: str
    created_at: int = Field(default_factory=lambda: int(time.time()))
    owner: str | None = Field(default_factory=lambda: key_holder.get(), exclude=True)


Kind = TypeVar("Kind", bound=Kept)
logger = logging.getLogger(__name__)


class Listed(Answer):
    """What all lists of objects have."""

    object: Literal["list"]
    has_more: bool
    """Whether others follow on another page"""
    first_id: str | None
    """The first one's id"""
    last_id: str | None
    """The last one's id, to go on `after`"""


class Page(BaseModel):
    """Which objects of a kind are listed: `limit` of them, from the one after `after` on, by default the newest
    first."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 100
    order: Literal["asc", "desc"] = "desc"


class Store(Generic[Kind]):
    """The objects of one kind in `folder`; `unread` are the ids of those that cannot be read, which stay as they are.
    All methods belong to the event loop's thread."""

    def __init__(self, folder: Path, kind: type[Kind]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self._name = folder, kind.model_fields["object"].default
        self.unread: set[str] = set()
        for part in folder.glob("*.part"):  # of a write that did not come to its end
            part.unlink()
        self._kept = {each.id: each for each in sorted(self._read(kind), key=lambda each: (each.created_at, each.id))}
        self._writing = asyncio.Lock()

    def _read(self, kind: type[Kind]) -> Iterator[Kind]:
        for path in self.folder.glob("*.json"):
            try:
                yield kind.model_validate_json(path.read_bytes())
            except ValueError as error:
                self.unread.add(path.stem)
                logger.error("%s is not a whole %s and is left out", path, self._name, exc_info=error)

    def __iter__(self) -> Iterator[Kind]:
        """All objects, whoever's they are, oldest first. They may be removed meanwhile."""
        return iter([*self._kept.values()])

    def __contains__(self, identity: str) -> bool:
        return identity in self._kept

    def owned(self, identity: str, param: str | None = None) -> Kind:
        """The object of this id. Raises NotFound, which names `param`, when the present request's key has none such."""
        found = self._kept.get(identity)
        if found is None or found.owner != key_holder.get():
            raise NotFound(f"there is no {self._name} {quote(identity)}", param)
        return found

    def page(self, asked: Page, **values: object) -> dict[str, Any]:
        """One page of the objects of the present request's key whose fields have these values. Raises InvalidRequest
        when the one to go on after is not there."""
        owned = [each for each in self if each.owner == key_holder.get()]
        wanted = [each for each in owned if all(getattr(each, name) == value for name, value in values.items())]
        if asked.order == "desc":
            wanted.reverse()
        if asked.after is not None:
            places = [index for index, each in enumerate(wanted) if each.id == asked.after]
            if not places:
                raise InvalidRequest(f"`after` names {quote(asked.after)}, which is not in this list", "after")
            wanted = wanted[places[0] + 1 :]
        data = [each.model_dump(mode="json") for each in wanted[: asked.limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": len(wanted) > len(data), **ends}

    async def put(self, value: Kind) -> None:
        """Keep the object as it is by now. It is there at once, and on disk when this returns; a new one that cannot be
        written is forgotten. Raises OSError."""
        new = value.id not in self._kept
        self._kept[value.id] = value
        try:
            async with self._writing:
                data = json.dumps(value.model_dump(mode="json") | {"owner": value.owner}).encode()
                await asyncio.to_thread(write_whole, self.folder / f"{value.id}.json", data)
        except OSError:
            if new:
                self._kept.pop(value.id, None)
            raise

    async def remove(self, value: Kind) -> None:
        """Forget the object, which is not there from this moment on. Raises OSError."""
        if self._kept.pop(value.id, None):
            async with self._writing:
                await asyncio.to_thread((self.folder / f"{value.id}.json").unlink, missing_ok=True)


def new_id(prefix: str) -> str:
    """An id that nobody can guess, of letters and digits."""
    return prefix + secrets.token_hex(12)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file at once: whoever reads it, after a crash too, finds what it held before or all of `data`."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(data)
        synced(file)
    part.replace(path)
    sync_folder(path.parent)


def synced(file: BinaryIO) -> None:
    """Have the disk hold what was written."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk hold the folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> BinaryIO:
    """The folder is this process's until the file is closed. Raises ConfigurationError when it is another's, or cannot
    be written."""
    try:
        file = (folder / "lock").open("wb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigurationError("batch_dir: another server uses this folder") from None
    except OSError as error:
        raise ConfigurationError(f"batch_dir: the folder cannot be used: {error.strerror}") from None
    return file
