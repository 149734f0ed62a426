from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import ValidationError
from yarl import URL

from aisse.app import create_app
from aisse.formats.anthropic import Anthropic
from aisse.routes import pages
from aisse.settings import Settings
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientResponse

    Client = TestClient[web.Request, web.Application]

WEB = Path(pages.__file__).parents[1] / "web"
CLIENT = {"/aisse.js": "text/javascript", "/aisse.d.ts": "text/plain"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
PAGE = {
    f"/{file.relative_to(WEB)}".removesuffix("index.html"): KINDS[file.suffix]
    for file in sorted(WEB.rglob("*"))
    if file.suffix in KINDS and file.name != "aisse.js"
}
FILES = PAGE | CLIENT


@contextlib.asynccontextmanager
async def serving_files(*, page: bool) -> AsyncIterator[Client]:
    app = web.Application()
    app.add_routes(pages.routes(page=page))
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.fixture
async def site() -> AsyncIterator[Client]:
    async with serving_files(page=True) as client:
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
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
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


async def test_client_alone_is_served_without_the_page() -> None:
    async with serving_files(page=False) as site:
        assert {path for path in FILES if (await site.get(path)).status == 200} == set(CLIENT)
        assert (await site.get("/")).status == 404


async def test_client_may_be_loaded_by_any_origin_and_the_page_by_none(site: Client) -> None:
    allowed = {path: (await site.get(path)).headers.get("Access-Control-Allow-Origin") for path in FILES}
    assert {path for path, origin in allowed.items() if origin == "*"} == set(CLIENT)
    assert {allowed[path] for path in PAGE} == {None}


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/package.json",
        "/vendor/",
        "/vendor/markdown-it.LICENSE",
        "/web/chat.js",
        "/../pages.py",
        "/%2e%2e/app.py",
        "/chat.js/",
    ],
)
async def test_path_beside_the_files_is_not_found(site: Client, path: str) -> None:
    assert (await site.get(path)).status == 404


async def test_method_that_writes_is_refused(site: Client) -> None:
    response = await site.post("/", data=b"x")
    assert response.status == 405
    assert set(response.headers["Allow"].split(",")) == {"GET", "HEAD"}


async def test_page_loads_all_that_is_served_and_has_nothing_inline(site: Client) -> None:
    """What the policy would block must not be there: the page would break in silence."""
    page = await (await site.get("/")).text()
    loaded = {urljoin("/", link) for link in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)}
    for script in [path for path, kind in FILES.items() if kind == "text/javascript"]:
        source = await (await site.get(script)).text()
        loaded |= {
            urljoin(script, module) for module in re.findall(r'^import .* from "([^"]+)";', source, re.MULTILINE)
        }
    assert loaded == set(FILES) - {"/", "/aisse.d.ts"}
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", page)


OWN_SCRIPTS = [path for path, kind in FILES.items() if kind == "text/javascript" and "/vendor/" not in path]


@pytest.mark.parametrize("path", OWN_SCRIPTS)
async def test_script_never_makes_markup_of_text(site: Client, path: str) -> None:
    script = await (await site.get(path)).text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setHTML", script)


async def test_page_names_nothing_by_an_absolute_path(site: Client) -> None:
    """It works below every path, also where the server does not know of the one in front of it."""
    page = await (await site.get("/")).text()
    assert not re.search(r'(?:src|href|action)="[/.]', page)
    for path in [path for path in OWN_SCRIPTS if path != "/aisse.js"]:  # of its own `url` others decide
        assert not re.search(r"""["'`(]/[a-z]""", await (await site.get(path)).text()), path


@contextlib.asynccontextmanager
async def serving_below(base_path: str, **settings: Any) -> AsyncIterator[Client]:
    effective = Settings.model_validate({"upstream": "http://127.0.0.1:9", "base_path": base_path, **settings})
    app = create_app(effective, Upstream("http://127.0.0.1:9", effective, Anthropic(effective)))
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.mark.parametrize("base_path", ["/llm", "/a/b"])
async def test_file_is_the_same_below_base_path_and_without_it(base_path: str) -> None:
    async with serving_below(base_path) as site:
        for path in [*FILES, "/health/ready"]:
            answers = [await site.get(prefix + path) for prefix in ("", base_path)]
            assert [answer.status for answer in answers] == [200, 200]
            assert len({await answer.read() for answer in answers}) == 1
            assert answers[0].headers.get("ETag") == answers[1].headers.get("ETag")
            assert (await site.head(base_path + path)).status == 200
        # Each behind the page that names it.
        page = await (await site.get(f"{base_path}/")).text()
        for link in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page):
            assert (await site.get(urljoin(f"{base_path}/", link))).status == 200
        assert (await site.get(f"{base_path}/health")).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("query", ["", "?a=1&b=%2F%0d%0a"])
async def test_base_path_itself_leads_to_the_page(method: str, query: str) -> None:
    async with serving_below("/a/b") as site:
        answer = await site.request(method, URL(f"/a/b{query}", encoded=True), allow_redirects=False)
        assert answer.status == 308
        # Kept by browsers it would outlive the setting.
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["Location"].lower() == f"/a/b/{query}".lower()
        assert (await site.post("/a/b", allow_redirects=False)).status == 405


async def test_client_alone_is_served_below_base_path_without_the_page() -> None:
    async with serving_below("/llm", page=False) as site:
        assert {path for path in FILES if (await site.get(f"/llm{path}")).status == 200} == set(CLIENT)


def first_part(path: str) -> str:
    return path.split("/")[1]


async def test_base_path_cannot_begin_as_any_path_of_ours() -> None:
    async with serving_below("") as site:
        assert site.app is not None
        own = {first_part(resource.canonical) for resource in site.app.router.resources()} - {""}
    assert own > {"api", "health", "aisse.js", "vendor"}
    for name in own:
        for base_path in (f"/{name}", f"/{name}/below"):
            with pytest.raises(ValidationError, match="base_path"):
                Settings(base_path=base_path)
