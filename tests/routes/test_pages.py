from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from aisse.routes import pages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientResponse

    Client = TestClient[web.Request, web.Application]

FILES = {"/": "text/html", "/chat.js": "text/javascript", "/style.css": "text/css"}


@pytest.fixture
async def site() -> AsyncIterator[Client]:
    app = web.Application()
    app.add_routes(pages.routes())
    async with TestClient(TestServer(app)) as client:
        yield client


def assert_guarded(response: ClientResponse) -> None:
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize(("path", "kind"), FILES.items())
async def test_file_is_served_with_its_type_and_guards(site: Client, path: str, kind: str) -> None:
    response = await site.get(path)
    assert response.status == 200
    assert response.headers["Content-Type"] == f"{kind}; charset=utf-8"
    assert await response.text()
    assert_guarded(response)


@pytest.mark.parametrize("path", FILES)
async def test_head_has_the_headers_of_get_without_a_body(site: Client, path: str) -> None:
    get, head = await site.get(path), await site.head(path)
    assert head.status == 200
    assert head.headers["ETag"] == get.headers["ETag"]
    assert head.headers["Content-Length"] == get.headers["Content-Length"]
    assert await head.read() == b""
    assert_guarded(head)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("known", ["{}", "W/{}", '"other", {}', "*"])
async def test_known_version_is_not_sent_again(site: Client, path: str, known: str) -> None:
    tag = (await site.get(path)).headers["ETag"]
    response = await site.get(path, headers={"If-None-Match": known.format(tag)})
    assert response.status == 304
    assert response.headers["ETag"] == tag
    assert await response.read() == b""
    assert_guarded(response)


@pytest.mark.parametrize("known", ['"other"', "", "no tag"])
async def test_other_version_is_sent_whole(site: Client, known: str) -> None:
    response = await site.get("/", headers={"If-None-Match": known})
    assert response.status == 200
    assert await response.text()


@pytest.mark.parametrize("path", ["/index.html", "/web/chat.js", "/../pages.py", "/%2e%2e/app.py", "/chat.js/"])
async def test_path_beside_the_files_is_not_found(site: Client, path: str) -> None:
    assert (await site.get(path)).status == 404


async def test_method_that_writes_is_refused(site: Client) -> None:
    response = await site.post("/", data=b"x")
    assert response.status == 405
    assert set(response.headers["Allow"].split(",")) == {"GET", "HEAD"}


async def test_page_loads_only_what_is_served_and_has_nothing_inline(site: Client) -> None:
    """What the policy would block must not be there: the page would break in silence."""
    page = await (await site.get("/")).text()
    loaded = set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page))
    assert loaded == set(FILES) - {"/"}
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", page)


async def test_script_never_makes_markup_of_text(site: Client) -> None:
    script = await (await site.get("/chat.js")).text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\.style\b|setHTML", script)
