"""Pages for browsers: the playground, which is a page and the files in its folder, and the OpenAPI document as a page.

They load nothing from elsewhere and send nothing there: their Content-Security-Policy tells the browser so. Every file
may be kept and is asked for again with its ETag, so that a page never runs with the scripts of an older release.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from server.api.openapi import errors
from server.api.ops import readable

PAGES = Path(__file__).parent / "pages"
PLAYGROUND = PAGES / "playground"
TYPES = {".css": "text/css", ".js": "text/javascript"}

router = APIRouter()
reference = APIRouter()
"""What the setting `api_docs` adds."""


def playground_files() -> frozenset[str]:
    """The paths of what the playground's page loads."""
    return frozenset(f"/playground/{path.name}" for path in PLAYGROUND.iterdir() if path.suffix in TYPES)


@readable("/", router, response_class=HTMLResponse, responses=errors(503))
async def playground(request: Request) -> Response:
    """A page to compare methods and settings on."""
    return _file(request, PLAYGROUND / "index.html", "text/html", _policy("'self'"))


@readable("/playground/{name}", router, include_in_schema=False)
async def playground_file(request: Request, name: str) -> Response:
    """A script or the style of that page."""
    if f"/playground/{name}" not in playground_files():
        raise HTTPException(404)
    return _file(request, PLAYGROUND / name, TYPES[Path(name).suffix], {})


@readable("/docs", reference, include_in_schema=False)
async def docs(request: Request) -> Response:
    """The OpenAPI document as a page."""
    return _file(request, PAGES / "docs.html", "text/html", _policy("'unsafe-inline'"))


def _policy(source: str) -> dict[str, str]:
    """The header that lets a page have scripts and styles from `source` alone, and speak to this server alone."""
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src {source}; script-src {source}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    }


def _file(request: Request, path: Path, media_type: str, headers: dict[str, str]) -> Response:
    content, tag = _read(path)
    headers = {**headers, "Cache-Control": "no-cache", "ETag": tag, "X-Content-Type-Options": "nosniff"}
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def _read(path: Path) -> tuple[bytes, str]:
    """A file's bytes and its ETag; files change with a release alone."""
    content = path.read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'
