"""What takes batches to their ends, also over the end of the server.

How far a batch is its results tell, and all else of it is in its JSON file. So a server that dies leaves batches that
the next one goes on with: a line whose result is on disk is done, any other is answered (again). When the server
drains, lines that are not done are left to its successor at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from contextvars import Context
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, get_args

from server.api.batches import UNFINISHED, WINDOW_SECONDS, Batch, Counts, Problem, Problems, Status
from server.api.errors import unexpected
from server.api.file_store import Files
from server.api.frontend import Frontend
from server.api.line_answers import answer_line
from server.api.lines import Results, lines_of
from server.api.store import Store, lock
from server.errors import Draining, QueueFull

logger = logging.getLogger(__name__)

PRIORITY = 1  # interactive requests have 0, and lower numbers go first
SWEEP_SECONDS = 60.0
MAX_UNFINISHED = 32  # batches of one key
MAX_LINES = 50_000  # of one batch, as OpenAI's
FILE_FIELDS = ("output_file_id", "error_file_id")
GIVEN_UP: dict[Status, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered"),
    "expired": ("batch_expired", "the batch's time was over before this line was answered"),
}


class Batches:
    """All files and batches of a server, in the folder `batch_dir`. `open` comes before all else, and `start` when the
    models are loaded. All methods belong to the event loop's thread."""

    files: Files
    kept: Store[Batch]

    def __init__(self, frontend: Frontend, folder: Path) -> None:
        self._frontend, self._folder = frontend, folder
        self._lock: BinaryIO | None = None
        self._started = False
        # A share of the queue keeps the workers full, and leaves a crash little to do again.
        self._places = asyncio.Semaphore(max(1, frontend.settings.max_queue // 4))
        self._limits: dict[str, asyncio.Timeout] = {}  # of the batches whose lines are being answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[str] = set()  # batches that have a task

    @property
    def unfinished(self) -> list[Batch]:
        """Batches that have not come to an end."""
        return [batch for batch in self.kept if batch.status in UNFINISHED]

    @property
    def inputs(self) -> set[str]:
        """The files that these read."""
        return {batch.input_file_id for batch in self.unfinished}

    def open(self) -> None:
        """Read what is there. Raises ConfigurationError when the folder is another server's or cannot be written."""
        self._lock = lock(self._folder)
        self.files = Files(self._folder / "files", self._frontend.settings.batch_expire_seconds)
        self.kept = Store(self._folder / "batches", Batch)
        if not self.kept.unread:  # whose results they may be
            self.files.clear(name for batch in self.unfinished for name in batch.own_files)

    def start(self) -> None:
        """Go on with all that is unfinished."""
        # Made here, so that it has the tokenizer that is loaded by now. Nobody waits for a line: it has no deadline.
        settings = replace(self._frontend.settings, request_timeout=None)
        self._frontend, self._started = replace(self._frontend, priority=PRIORITY, settings=settings), True
        for batch in self.unfinished:
            self._go_on(batch)
        self._task(self._sweep())
        self._show()

    async def close(self) -> None:
        """Stop where we are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._lock is not None:
            self._lock.close()

    async def begin(self, batch: Batch) -> None:
        """Keep a new batch and begin with it. Raises QueueFull when its owner has as many as one may have."""
        held = Counter(each.owner for each in self.unfinished)[batch.owner]
        if held >= MAX_UNFINISHED:
            raise QueueFull(f"{held} batches are unfinished; one may have {MAX_UNFINISHED}", retry_after=60.0)
        await self._keep(batch)
        self._go_on(batch)

    async def cancel(self, batch: Batch) -> None:
        """Stop answering a batch."""
        if batch.status != "cancelling":
            batch.move("cancelling")
            await self._keep(batch)
        limit = self._limits.get(batch.id)
        if limit is not None and not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())
        self._go_on(batch)  # which a full disk may have stopped

    async def _keep(self, batch: Batch) -> None:
        await self.kept.put(batch)
        self._show()

    def _show(self) -> None:
        held = Counter(batch.status for batch in self.kept)
        for status in get_args(Status):
            self._frontend.metrics.batches.labels(status).set(held[status])

    def _go_on(self, batch: Batch) -> None:
        if self._started and batch.status in UNFINISHED and batch.id not in self._running:
            self._running.add(batch.id)
            self._task(self._to_its_end(batch))

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this in a context of its own, which is no request's."""
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep(self) -> None:
        """Remove what has expired, ever again."""
        expire = self._frontend.settings.batch_expire_seconds
        while True:
            try:
                now = time.time()
                for kept in self.files:
                    if kept.expires_at <= now and kept.id not in self.inputs:
                        await self.files.remove(kept)
                for batch in self.kept:
                    if batch.status not in UNFINISHED and batch.created_at + WINDOW_SECONDS + expire <= now:
                        await self.kept.remove(batch)
            except OSError as error:  # the next sweep goes on
                unexpected(error)
            self._show()
            await asyncio.sleep(min(SWEEP_SECONDS, expire))

    async def _to_its_end(self, batch: Batch) -> None:
        """Take a batch from any status that it was left in to its end."""
        try:
            ended = await self._answered(batch)
            if ended is not None:
                batch.move(ended)
                await self._keep(batch)
                logger.info("%s is %s", batch.id, ended, extra=dict(batch.request_counts))
        except Exception as error:  # a full disk, as a rule: what is there is right, and the next start goes on with it
            unexpected(error)
            logger.error("%s stands still until it is cancelled or the server is started again", batch.id)
        finally:
            self._running.discard(batch.id)

    async def _answered(self, batch: Batch) -> Status | None:
        """Answer a batch's lines and make its files ready; the status that it ends in, or None when some lines are left
        to the server's successor."""
        path, most = self.files.content(batch.input_file_id), self._frontend.settings.max_body_bytes
        if not path.exists():
            return _failed(batch, "input_file_gone", "the file is not there")
        if not batch.request_counts.total:
            total = await asyncio.to_thread(lambda: sum(1 for _ in islice(lines_of(path, most), MAX_LINES + 1)))
            if not total:
                return _failed(batch, "empty_file", "the file has no lines")
            if total > MAX_LINES:
                return _failed(batch, "too_many_lines", f"a batch has at most {MAX_LINES} lines")
            batch.request_counts = Counts(total=total)
            if batch.status == "validating":  # still
                batch.move("in_progress")
            await self._keep(batch)
        paths = [self.files.content(name) for name in batch.own_files]
        results = await asyncio.to_thread(Results, batch.id.replace("_", "_req_"), *paths)
        batch.count(results.counts)
        stopped = await self._in_time(batch, results)
        if len(results.numbers) < batch.request_counts.total:
            if stopped is None:
                return None
            await asyncio.to_thread(results.give_up, lines_of(path, most), *GIVEN_UP[stopped])
            batch.count(results.counts)
        if stopped is None:
            batch.move("finalizing")
            await self._keep(batch)
        await self._make_ready(batch, results)
        return stopped or "completed"

    async def _in_time(self, batch: Batch, results: Results) -> Status | None:
        """Answer lines until all are done or the server drains; the status to end in, if the batch is cancelled or its
        time is over before that."""
        seconds = 0.0 if batch.status == "cancelling" else max(0.0, batch.expires_at - time.time())
        try:
            async with asyncio.timeout(seconds) as limit:
                self._limits[batch.id] = limit
                await self._all_lines(batch, results)
        except TimeoutError:
            if not limit.expired():
                raise
            return "cancelled" if batch.status == "cancelling" else "expired"
        finally:
            del self._limits[batch.id]
        return "cancelled" if batch.status == "cancelling" else None

    async def _all_lines(self, batch: Batch, results: Results) -> None:
        lines = lines_of(self.files.content(batch.input_file_id), self._frontend.settings.max_body_bytes)
        left = (line for line in lines if line[0] not in results.numbers)
        try:
            async with asyncio.TaskGroup() as group:
                # Blank lines and those that are done may be many, so none is read in the event loop.
                while line := await asyncio.to_thread(lambda: next(left, None)):
                    await self._places.acquire()
                    task = group.create_task(answer_line(self._frontend, batch, *line, results))
                    task.add_done_callback(lambda _: self._places.release())
        except* Draining:
            logger.info("%s goes on after the next start", batch.id)

    async def _make_ready(self, batch: Batch, results: Results) -> None:
        """Make files of a batch's own of what has come of its lines."""
        for identity, count, field in zip(batch.own_files, results.counts, FILE_FIELDS, strict=True):
            if count:
                name = f"{batch.id}_{field.removesuffix('_file_id')}.jsonl"
                await self.files.add(identity, name, "batch_output", batch.owner)
                setattr(batch, field, identity)
            else:
                self.files.content(identity).unlink()


def _failed(batch: Batch, code: str, message: str) -> Status:
    batch.errors = Problems(data=[Problem(code=code, message=message, param="input_file_id")])
    return "failed"
