"""The pages for browsers: they bring all that they show, are cached by content, and are open by flag as a whole."""

from __future__ import annotations

import re

import httpx

from server.api.web import PLAYGROUND
from tests.api.scripted_engine import KEYS, bearer, check_envelope, make, open_client

NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody fetches
LOADED = re.compile(r"""(?:src|href)="([^"]+)"|from "\./([^"]+)";""")


async def loaded(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
    """The playground's page and all that it loads, by path."""
    found: dict[str, httpx.Response] = {}
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        found[path] = await client.get(path)
        named = [page or f"playground/{script}" for page, script in LOADED.findall(found[path].text)]
        waiting += {f"/{name}" for name in named} - found.keys()
    return found


async def test_pages_hold_all_that_they_show() -> None:
    async with open_client(make(api_docs=True)) as client:
        files, docs = await loaded(client), await client.get("/docs")
    assert files.keys() == {"/"} | {f"/playground/{each.name}" for each in PLAYGROUND.iterdir()} - {
        "/playground/index.html"
    }
    for page in (files["/"], docs):
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in files["/"].headers["content-security-policy"]
    for path, file in {**files, "/docs": docs}.items():
        assert file.status_code == 200, path
        assert not re.findall(r"https?://|@import|\burl\(", file.text.replace(NAMESPACE, "")), path
    assert {file.headers["content-type"].split(";")[0] for file in files.values()} == {
        "text/html",
        "text/css",
        "text/javascript",
    }


async def test_a_file_is_sent_again_only_if_it_has_changed() -> None:
    async with open_client(make()) as client:
        for path, file in (await loaded(client)).items():
            assert file.headers["cache-control"] == "no-cache"
            again = await client.get(path, headers={"If-None-Match": file.headers["etag"]})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", file.headers["etag"])
            assert (await client.get(path, headers={"If-None-Match": '"another"'})).content == file.content


async def test_there_is_nothing_else() -> None:
    async with open_client(make()) as client:
        for name in ("index.html", "nothing.js", "..%2fdocs.html", "%2e%2e/docs.html", "", "style.css/"):
            check_envelope(await client.get(f"/playground/{name}"), 404)


async def test_what_the_page_loads_is_as_open_as_the_page() -> None:
    async with open_client(make(api_key=KEYS, public_paths=["/"])) as client:
        for path, file in (await loaded(client)).items():
            assert file.status_code == 200, path
        check_envelope(await client.get("/playground/nothing.js"), 401)
    async with open_client(make(api_key=KEYS, root_path="/llm")) as client:
        for path in ("/", "/playground/main.js", "/llm/", "/llm/playground/main.js"):
            check_envelope(await client.get(path), 401)
            assert (await client.get(path, headers=bearer(KEYS[0]))).status_code == 200
