"""`/v1/batches`: files of requests that are answered when there is room, in OpenAI's form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from server.api import openapi
from server.api.answers import Answer
from server.api.body import read
from server.api.errors import validate
from server.api.files import batches_of
from server.api.openapi import errors, success
from server.api.ops import frontend_of, readable
from server.api.rules import Strict
from server.api.store import Kept, Listed, Page, new_id
from server.api.values import Text
from server.errors import InvalidRequest

router = APIRouter()
PATH = "/v1/batches"
WINDOW_SECONDS = 86_400

Endpoint = Literal["/v1/completions", "/v1/chat/completions", "/v1/responses"]
Status = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]  # fmt: skip
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class CreateBatchRequest(Strict):
    """`POST /v1/batches`."""

    input_file_id: Text
    """A file that was sent to `/v1/files`: on each line a request with its `custom_id`, `method`, `url` and `body`"""
    endpoint: Endpoint
    """The `url` of all of them"""
    completion_window: Literal["24h"]
    """Lines that are not answered by then are given up"""
    metadata: Annotated[
        dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] | None,
        Field(max_length=16),
    ] = None
    """What the client wants to find in the batch"""


class Counts(Answer):
    """How many lines there are, and how many of them are in each of the batch's files."""

    total: int = 0
    """Lines that are not blank"""
    completed: int = 0
    """Those that have an answer"""
    failed: int = 0
    """Those that have an error"""


class Problem(Answer):
    """Why a batch failed as a whole."""

    code: str
    """A word for programs"""
    message: str
    param: str | None = None
    """The field of the batch"""
    line: int | None = None
    """Always null: what is wrong with one line stands in the batch's file of errors"""


class Problems(Answer):
    """A list in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[Problem]
    """Why the batch failed"""


class Batch(Kept):
    """A batch. It was or will be in a status at the time of that name, which is null until it is known."""

    object: Literal["batch"] = "batch"
    status: Status = "validating"
    endpoint: Endpoint
    """The endpoint that answers its lines"""
    input_file_id: str
    """The file of its lines"""
    completion_window: Literal["24h"] = "24h"
    """How long it may take"""
    errors: Problems | None = None
    """Why it failed as a whole"""
    output_file_id: str | None = None
    """The file of the answers, when it has ended and there are any"""
    error_file_id: str | None = None
    """The file of the errors, likewise"""
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Counts()
    """How far it is"""
    metadata: dict[str, str] | None = None

    @property
    def own_files(self) -> tuple[str, str]:
        """The ids of the files that it writes, of answers and of errors. They follow from its own, and so are known to
        whoever goes on with it."""
        stem = self.id.replace("batch_", "file-")
        return f"{stem}-output", f"{stem}-error"

    def move(self, status: Status) -> None:
        """Pass on to another status, at this moment."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))

    def count(self, done: Sequence[int]) -> None:
        """So many lines have an answer, and so many an error."""
        completed, failed = done
        self.request_counts = Counts(total=self.request_counts.total, completed=completed, failed=failed)


class BatchList(Listed):
    """Answer to `GET /v1/batches`."""

    data: list[Batch]
    """Batches"""


@router.post(
    PATH,
    responses=success(Batch, "The batch") | errors(400, 404, 408, 413, 415, 429),
    openapi_extra=openapi.body(CreateBatchRequest),
)
async def create_batch(request: Request) -> Response:
    """Have the requests in a file answered when there is room, within a day."""
    batches, asked = batches_of(request), await read(request, frontend_of(request), CreateBatchRequest)
    batches.files.owned(asked.input_file_id, "input_file_id")
    now = int(time.time())
    made = Batch(id=new_id("batch_"), created_at=now, expires_at=now + WINDOW_SECONDS, **dict(asked))
    await batches.begin(made)
    return JSONResponse(made.model_dump(mode="json"))


@readable(PATH, on=router, responses=success(BatchList, "Batches, the newest first") | errors(400))
async def list_batches(request: Request) -> Response:
    """The batches of the request's key."""
    return JSONResponse(batches_of(request).kept.page(validate(Page, dict(request.query_params))))


@readable(PATH + "/{batch_id}", on=router, responses=success(Batch, "The batch") | errors(404))
async def get_batch(request: Request, batch_id: str) -> Response:
    """How far a batch is."""
    return JSONResponse(batches_of(request).kept.owned(batch_id).model_dump(mode="json"))


@router.post(PATH + "/{batch_id}/cancel", responses=success(Batch, "The batch") | errors(400, 404))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Stop a batch. What has been answered is in its files when it is `cancelled`."""
    batches = batches_of(request)
    batch = batches.kept.owned(batch_id)
    if batch.status not in ("validating", "in_progress", "cancelling"):
        raise InvalidRequest(f"`batch_id`: the batch is {batch.status}, so there is nothing to cancel", "batch_id")
    await batches.cancel(batch)
    return JSONResponse(batch.model_dump(mode="json"))
