"""`/v1/files`: what batches read and write. A file holds lines of JSON, is its sender's alone, and expires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response

from server.api.answers import Answer
from server.api.errors import validate
from server.api.file_store import FileObject
from server.api.middleware import FILES
from server.api.openapi import errors, success
from server.api.ops import frontend_of, readable
from server.api.rules import Strict
from server.api.store import Listed, Page
from server.errors import BodyTooLarge, ClientGone, InvalidRequest, UnsupportedMediaType, quote

if TYPE_CHECKING:
    from server.api.batch_runner import Batches

router = APIRouter()
MAX_FIELDS = 8
MAX_NAME = 255


class FileList(Listed):
    """Answer to `GET /v1/files`."""

    data: list[FileObject]
    """Files"""


class Deleted(Answer):
    """Answer to `DELETE /v1/files/{file_id}`."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]
    """That it is gone"""


class FilePage(Page):
    """Which files are listed."""

    purpose: str | None = None


class Upload(Strict):
    """The form of `POST /v1/files`, beside the file itself."""

    purpose: Literal["batch"]
    """Files are for batches only"""


def batches_of(request: Request) -> Batches:
    """The application's files and batches, which it has where these routes are."""
    batches: Batches = request.app.state.batches
    return batches


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "contentMediaType": "application/jsonl"},
                        "purpose": {"const": "batch"},
                    },
                }
            }
        },
    }
}


@router.post(FILES, responses=success(FileObject, "The file") | errors(400, 408, 413, 415), openapi_extra=_FORM)
async def create_file(request: Request) -> Response:
    """Send a file of requests for a batch, as a form. Its lines are looked at when the batch runs."""
    files, most = batches_of(request).files, frontend_of(request).settings.batch_file_bytes
    form = await _form(request)
    try:
        fields = dict(form.multi_items())
        if len(fields) < len(form.multi_items()):
            raise InvalidRequest("a field of the form occurs twice")
        upload = fields.pop("file", None)
        if not isinstance(upload, UploadFile) or upload.size is None:
            raise InvalidRequest("`file` is required, as a file of the form", "file")
        if upload.size > most:
            raise BodyTooLarge(f"`file` takes more than {most} bytes (batch_file_bytes)", "file")
        validate(Upload, fields)
        name = (upload.filename or "").encode("utf-8", "replace").decode()  # what is no text becomes question marks
        kept = await files.receive(upload.file, name[:MAX_NAME])
    finally:
        await form.close()
    return JSONResponse(kept.model_dump())


async def _form(request: Request) -> FormData:
    """The form that the body is; a file in it is held in the system's folder for temporary files."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedMediaType(f"the body must be multipart/form-data, not {quote(content_type)}")
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=MAX_FIELDS)
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the body is not a form: {error.message}") from None
    except ClientDisconnect:
        raise ClientGone("the client closed the connection") from None


@readable(FILES, on=router, responses=success(FileList, "Files, the newest first") | errors(400))
async def list_files(request: Request) -> Response:
    """The files of the request's key."""
    asked = validate(FilePage, dict(request.query_params))
    wanted = {} if asked.purpose is None else {"purpose": asked.purpose}
    return JSONResponse(batches_of(request).files.page(asked, **wanted))


@readable(FILES + "/{file_id}", on=router, responses=success(FileObject, "The file") | errors(404))
async def get_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    return JSONResponse(batches_of(request).files.owned(file_id).model_dump())


@readable(
    FILES + "/{file_id}/content",
    on=router,
    response_class=Response,
    responses={200: {"description": "Lines of JSON", "content": {"application/jsonl": {}}}, **errors(404)},
)
async def get_content(request: Request, file_id: str) -> Response:
    """What a file holds."""
    files = batches_of(request).files
    return FileResponse(files.content(files.owned(file_id).id), media_type="application/jsonl")


@router.delete(FILES + "/{file_id}", responses=success(Deleted, "The file is gone") | errors(400, 404))
async def delete_file(request: Request, file_id: str) -> Response:
    """Remove a file that no unfinished batch reads."""
    batches = batches_of(request)
    kept = batches.files.owned(file_id)
    if kept.id in batches.inputs:
        raise InvalidRequest(f"`file_id`: an unfinished batch reads {quote(file_id)}", "file_id")
    await batches.files.remove(kept)
    return JSONResponse({"id": kept.id, "object": "file", "deleted": True})
