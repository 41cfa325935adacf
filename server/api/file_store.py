"""The files of `/v1/files` on disk: what is known of each in a JSON file, and its content beside that."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from server.api.middleware import key_holder
from server.api.store import Kept, Store, new_id, sync_folder, synced

Purpose = Literal["batch", "batch_output"]


class FileObject(Kept):
    """A file: lines of JSON, which a batch reads or has written."""

    object: Literal["file"] = "file"
    bytes: int
    """How long it is"""
    expires_at: int
    filename: str
    """Its name as it was sent, of which the server makes no use"""
    purpose: Purpose
    """`batch`: to be read by one; `batch_output`: what came of one"""
    status: Literal["processed"] = "processed"


class Files(Store[FileObject]):
    """All files of a server, each with its content beside it."""

    def __init__(self, folder: Path, expire_seconds: int) -> None:
        super().__init__(folder, FileObject)
        self._expire_seconds = expire_seconds

    def content(self, identity: str) -> Path:
        """Where a file's content is."""
        return self.folder / f"{identity}.jsonl"

    async def receive(self, source: BinaryIO, filename: str) -> FileObject:
        """Keep a new file of what `source` holds. Raises OSError, and then nothing of it is left."""
        identity = new_id("file-")
        try:
            await asyncio.to_thread(_copy, source, self.content(identity))
            return await self.add(identity, filename, "batch", key_holder.get())
        except OSError:
            self.content(identity).unlink(missing_ok=True)
            raise

    async def add(self, identity: str, filename: str, purpose: Purpose, owner: str | None) -> FileObject:
        """Keep a file whose content is there."""
        now, size = int(time.time()), self.content(identity).stat().st_size
        made = FileObject(
            id=identity, owner=owner, created_at=now, expires_at=now + self._expire_seconds, bytes=size,
            filename=filename, purpose=purpose,
        )  # fmt: skip
        await self.put(made)
        return made

    async def remove(self, value: FileObject) -> None:
        """Forget a file and its content."""
        await super().remove(value)
        self.content(value.id).unlink(missing_ok=True)

    def clear(self, needed: Iterable[str]) -> None:
        """Remove contents without a file that a crash has left, but for those of the ids that are `needed`."""
        known = {*needed, *self.unread}
        for path in self.folder.glob("*.jsonl"):
            if path.stem not in self and path.stem not in known:
                path.unlink()


def _copy(source: BinaryIO, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)
        synced(file)
    sync_folder(target.parent)
