"""The page's Markdown in Chromium, under the page's policy: what it shows, what it refuses, and that it never waits."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from playwright.sync_api import sync_playwright

import aisse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

WEB = Path(aisse.__file__).parent / "web"
VENDORED = WEB / "vendor" / "markdown-it.min.mjs"
VERSION = "15.0.3"
REQUIRED = os.environ.get("TESTS_REQUIRE", "").split(",")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
WINDOW = 4096
LINKED = 'target="_blank" rel="noopener noreferrer nofollow"'

# `step` runs a view to its end without waiting for frames; the views of one page share its `div`s.
PREPARE = """
async () => {
  const { markdown } = await import("/markdown.js");
  window.violations = [];
  document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
  window.view = (options) => {
    const element = document.createElement("div");
    document.body.append(element);
    return Object.assign(markdown(element, options), { element });
  };
  window.step = (view) => { while (view.step()); return view; };
  window.shown = (text) => { const it = view(); it.append(text); return step(it).element; };
}
"""


def missing(reason: str, what: str) -> NoReturn:
    if what in REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {".mjs": "text/javascript", ".js": "text/javascript", ".html": "text/html"}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        body = b"<!doctype html><meta charset=utf-8><title>Markdown</title><link rel=icon href=data:,>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(WEB))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not installed", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, origin: str) -> Iterator[Page]:
    """A page with `view`, `step` and `shown`, which must not break its policy, ask elsewhere, or throw."""
    page = browser.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: trouble.append(dialog.message))
    page.on("request", lambda request: trouble.append(request.url))
    page.goto(origin)
    page.evaluate(PREPARE)
    yield page
    assert page.evaluate("violations") == []
    page.close()
    assert [what for what in trouble if not what.startswith((origin, "data:,"))] == []


def shown(page: Page, text: str) -> str:
    """The blocks as HTML, without the groups."""
    html = page.evaluate("(text) => [...shown(text).children].map((group) => group.innerHTML).join('')", text)
    assert isinstance(html, str)
    return html.replace(' dir="auto"', "")


def code(text: str, language: str = "") -> str:
    named = f' data-language="{language}"' if language else ""
    label = f"Code, {language}" if language else "Code"
    return (
        f'<div class="code"{named}><pre tabindex="0" role="group" aria-label="{label}"><code>{text}</code></pre></div>'
    )


CONSTRUCTS = [
    ("# a\n\nb *c* **d** ~~e~~ `f`", "<h1>a</h1><p>b <em>c</em> <strong>d</strong> <s>e</s> <code>f</code></p>"),
    ("a\nb  \nc", "<p>a\nb<br>\nc</p>"),
    ("- a\n- b\n  1. c", "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("7. a", '<ol start="7"><li>a</li></ol>'),
    ("> a\n\n---", "<blockquote><p>a</p></blockquote><hr>"),
    ("```python\na < b\n```", code("a &lt; b\n", "python")),
    ("```\nopen", code("open")),
    ("    a\n    b", code("a\nb\n")),
    (
        "|a|b|\n|-|-:|\n|c|d|",
        (
            '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr><th scope="col">a</th>'
            '<th scope="col" class="right">b</th></tr></thead><tbody><tr><td>c</td>'
            '<td class="right">d</td></tr></tbody>'
            "</table></div>"
        ),
    ),
    ('[a](HTTPS://b.c "t")', f'<p><a href="https://b.c/" {LINKED} title="t">a</a></p>'),
    ("http://b.c/d, README.md", f'<p><a href="http://b.c/d" {LINKED}>http://b.c/d</a>, README.md</p>'),
    ("<mailto:a@b.c>", f'<p><a href="mailto:a@b.c" {LINKED}>mailto:a@b.c</a></p>'),
    ("![a](http://b.c/d.png)", f'<p><a href="http://b.c/d.png" {LINKED} class="image">a</a></p>'),
    ("[![a](http://b.c/d.png)](http://e.f)", f'<p><a href="http://e.f/" {LINKED}><span class="image">a</span></a></p>'),
    ("[a]: http://b.c", f'<p>[a]: <a href="http://b.c/" {LINKED}>http://b.c</a></p>'),
    ("a\r\nb\rc", "<p>a\nb\nc</p>"),
]


def test_constructs_are_shown_as_their_elements(page: Page) -> None:
    for text, html in CONSTRUCTS:
        assert shown(page, text) == html


HOSTILE = [
    "<script>canary = 1</script>",
    "<img src=x onerror='canary = 1'>",
    "<a href='javascript:canary=1' onclick='canary = 1'>x</a>",
    "[x](javascript:canary=1)",
    "[x](JaVaScRiPt:canary=1)",
    "[x](&#106;avascript:canary=1)",
    "[x](java&Tab;script:canary=1)",
    "[x](java&NewLine;script&colon;canary=1)",
    "[x](\\javascript:canary=1)",
    "[x](\u0001javascript:canary=1)",
    "[x](vbscript:x)",
    "[x](data:text/html,<script>canary=1</script>)",
    "[x](file:///etc/passwd)",
    "[x](//elsewhere.example)",
    "[x](/api/chat)",
    "[x](blob:http://a.b/c)",
    "<javascript:canary=1>",
    "![x](javascript:canary=1)",
    "![x](http://elsewhere.example/pixel.png)",
    "![x](data:image/svg+xml,<svg onload=canary=1>)",
    "[x](http://elsewhere.example \"' onmouseover='canary=1\")",
    '```x" onmouseover="canary=1\ny\n```',
    "[x]: javascript:canary=1\n\n[x]",
    "|<script>canary=1</script>|\n|-|\n|<b onclick=x>|",
]


def test_hostile_text_stays_text(page: Page) -> None:
    """Only links to where a browser may be led; nothing that runs, loads or carries an inline style."""
    found = page.evaluate(
        """async (texts) => {
          for (const text of texts) shown(text);
          for (const node of document.querySelectorAll("body *")) if (node.localName !== "a") node.click();
          await new Promise((resolve) => setTimeout(resolve));
          const nodes = [...document.querySelectorAll("body *")];
          return {
            canary: typeof canary,
            tags: [...new Set(nodes.map((node) => node.localName))],
            names: [...new Set(nodes.flatMap((node) => node.getAttributeNames()))],
            links: [...document.links].map((link) => link.href),
          };
        }""",
        HOSTILE,
    )
    assert found["canary"] == "undefined"
    assert not {"script", "img", "iframe", "svg", "style", "b"} & set(found["tags"])
    assert set(found["names"]) <= {
        "class", "dir", "href", "target", "rel", "title", "tabindex", "role", "aria-label", "data-language", "scope",
        "start",
    }  # fmt: skip
    assert {link.split("/")[2] for link in found["links"]} == {"elsewhere.example", "a.b"}


def test_direction_of_one_block_does_not_reach_the_next(page: Page) -> None:
    directions = page.evaluate(
        """() => [...shown("\\u202eabc\\n\\nd [e\\u202e](http://f.g)\\n\\n- h").querySelectorAll(".blocks > *, a, li")]
          .map((node) => [node.dir, getComputedStyle(node).unicodeBidi])"""
    )
    assert directions[0] == ["auto", "isolate"]
    assert all(bidi in {"isolate", "plaintext"} for _, bidi in directions)


FUZZ = """
([seed, count]) => {
  const random = () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const below = (n) => Math.floor(random() * n);
  const bits = ["a ", "word", "\\n", "\\n", "\\n\\n", "# ", "- ", "- item\\n", "1. ", "1. one\\n", "2) x\\n",
    "  ", "    ", "> ", "> quote\\n", "```", "```\\n", "```js\\n", "~~~\\n", "---\\n", "===\\n",
    "|a|b|\\n|-|-|\\n", "|1|2|\\n", "| ", "`code`", "**b**", "*", "_", "~~", "[a](http://b)", "![i](http://x)",
    "http://a.b/c ", "\\\\", "&amp;", "\\t", "\\r\\n", "\\r", "\\u{1F600}", "e\\u0301", "\\u202e", "\\u05d0",
    "<b>", "[x]: http://y\\n", "\\0", "   - sub\\n", "      deep\\n", "- ```\\n  in\\n", "- > 1. deep\\n",
    "> ```\\n> q\\n", "\\u2060"];
  const bit = () => bits[below(bits.length)];
  for (let n = 0; n < count; n += 1) {
    let text = "";
    let words = 0;
    for (let length = 5 + below(50); length; length -= 1) {
      text += random() < 0.06 ? (bit() + bit()).repeat(below(600)) : bit();
      if (random() < 0.3) text += `w${words++}w` + ["", "\\n", " "][below(3)];
    }
    const whole = shown(text);
    const pieces = view();
    const largest = [1, 40, 700, 9000][text.length > 3000 ? 1 + below(3) : below(4)];
    for (let at = 0; at < text.length;) {
      const size = 1 + below(largest);
      pieces.append(text.slice(at, at += size));
      if (random() < 0.8) step(pieces);
      if (random() < 0.02) pieces.finish();
    }
    step(pieces);
    if (!whole.isEqualNode(pieces.element)) return { text, whole: whole.innerHTML, pieces: pieces.element.innerHTML };
    if (pieces.text !== text) return { text, kept: pieces.text };
    for (let word = 0; word < words; word += 1) {
      if (!whole.innerHTML.includes(`w${word}w`)) return { text, lost: word };
    }
    document.body.replaceChildren();
  }
  return null;
}
"""


def test_text_in_any_pieces_is_shown_as_in_one_without_losing_a_word(page: Page) -> None:
    assert page.evaluate(FUZZ, [1, 500 if os.environ.get("TESTS_SOAK") == "1" else 12]) is None


WORDS = [
    "".join(f"word{n} " for n in range(4000)),
    "".join(f"word{n} \n" for n in range(3000)),
    "".join(f"word{n}" for n in range(4000)),
    "\U0001f600" * 5000,
    "e\u0301" * 5000,
    ">" * 9000 + "end",
    "[" * 9000,
    "|" * 9000,
    "\\|" * 5000,
]


def test_plain_text_beyond_a_window_is_whole_and_in_small_nodes(page: Page) -> None:
    found = page.evaluate(
        """(texts) => texts.map((text) => {
          const element = shown(text);
          const nodes = document.createNodeIterator(element, NodeFilter.SHOW_TEXT);
          const data = [];
          for (let node; (node = nodes.nextNode());) data.push(node.data);
          const longest = Math.max(...data.map(({ length }) => length));
          return [element.textContent, longest, data.every((it) => it.isWellFormed())];
        })""",
        WORDS,
    )
    for text, (content, longest, well_formed) in zip(WORDS, found, strict=True):
        strip = r"[\s>\\]" if text[0] in ">\\" else r"\s"
        assert re.sub(strip, "", content) == re.sub(strip, "", text)
        assert longest <= WINDOW
        assert well_formed


def test_code_beyond_a_window_stays_one_block_and_ends_where_it_ends(page: Page) -> None:
    lines = "".join(f"line {n}\n" for n in range(1000))
    for opener, indent in (("", ""), ("- a\n\n", "  "), ("1. a\n   - b\n\n", "     "), ("> a\n", "> ")):
        fenced = "".join(f"{indent}{line}\n" for line in f"```js\n{lines}```".splitlines())
        found = page.evaluate(
            """(text) => {
              const element = shown(text);
              const codes = [...element.querySelectorAll("pre > code")].map((node) => node.textContent);
              return [codes.join(""), element.querySelectorAll("pre").length, element.lastChild.lastChild.outerHTML];
            }""",
            f"{opener}{fenced}\nafter **it**",
        )
        assert found[0] == lines
        assert found[1] == (1 if not opener else 2)
        assert found[2].startswith("<p ")
        assert "<strong>it</strong>" in found[2]


def test_list_and_table_beyond_a_window_go_on(page: Page) -> None:
    numbers = page.evaluate(
        "(text) => [...shown(text).querySelectorAll('ol')].map((list) => [list.start, list.children.length])",
        "1. item\n" * 1000,
    )
    assert len(numbers) > 1
    assert [start for start, _ in numbers] == [1 + sum(n for _, n in numbers[:at]) for at in range(len(numbers))]
    heads, cells = page.evaluate(
        "(text) => { const it = shown(text); return ['thead', 'td'].map((name) => it.querySelectorAll(name).length) }",
        "|a|b|\n|-|-|\n" + "|c|d|\n" * 1000,
    )
    assert (heads, cells) == (1, 2000)


def test_answer_of_too_many_elements_goes_on_as_it_was_written(page: Page) -> None:
    text = "a|b\n-|-\n*c*|d\n\n" * 600 + "* e\n" * 2000 + "```js\nf\n```\n\n**fin**"
    html, content, elements, plain = page.evaluate(
        """(text) => {
          const it = shown(text);
          const [first] = it.querySelectorAll(".plain");
          const all = [...it.querySelectorAll(".blocks > *")];
          return [it.innerHTML, it.textContent, it.querySelectorAll("*").length, all.length - all.indexOf(first)];
        }""",
        text,
    )
    assert elements < 10_000
    assert plain > 1
    assert content.endswith("* e\n```js\nf\n```\n\n**fin**")
    assert content.count("c") == content.count("d") == 600
    assert content.count("e\n") == 2000
    in_pieces = page.evaluate(
        """(text) => {
          const it = view();
          for (let at = 0; at < text.length; at += 1000) { it.append(text.slice(at, at + 1000)); step(it); }
          return it.element.innerHTML;
        }""",
        text,
    )
    assert in_pieces == html


def test_final_blocks_are_never_touched_again(page: Page) -> None:
    assert page.evaluate(
        """() => {
          const it = view();
          it.append("# a\\n\\nb\\n\\n```\\nc\\n```\\n\\nlast");
          step(it);
          const final = [...it.element.firstChild.children].slice(0, 3);
          const observer = new MutationObserver(() => {});
          const all = { subtree: true, childList: true, characterData: true, attributes: true };
          for (const node of final) observer.observe(node, all);
          for (let n = 0; n < 50; n += 1) { it.append(" *more*\\n\\n"); step(it); }
          return observer.takeRecords().length === 0 && final.every((node) => node.isConnected);
        }"""
    )


def test_open_block_keeps_its_nodes_while_it_grows(page: Page) -> None:
    """A selection, the focus and the place that code is scrolled to survive the next token."""
    assert page.evaluate(
        """() => {
          const it = view();
          it.append("```js\\na");
          step(it);
          const pre = it.element.querySelector("pre");
          pre.focus();
          it.append("b\\nc");
          step(it);
          return document.activeElement === pre && pre.textContent === "ab\\nc";
        }"""
    )


def test_text_after_finish_goes_on_in_place_and_code_is_handed_out_when_final(page: Page) -> None:
    found = page.evaluate(
        """async () => {
          const codes = [];
          const it = view({ onCode: (block) => { codes.push(block.textContent); block.append("Copy"); } });
          it.append("```\\na\\n```\\n\\nb\\n\\n```\\nc");
          await it.finish();
          it.append("d\\n```\\n\\nHello wor");
          await it.finish();
          it.append("ld");
          await it.finish();
          return [codes, it.element.textContent, it.element.querySelectorAll("p").length];
        }"""
    )
    assert found == [["a\n", "c", "cd\n", "cd\n"], "a\nCopybcd\nCopyHello world", 2]


def test_burst_is_rendered_over_many_frames(page: Page) -> None:
    """However long a line, code or markup made to be slow is: no step of it reaches further than one window."""
    frames = page.evaluate(
        """async () => {
          const long = [];
          new PerformanceObserver((list) => long.push(...list.getEntries().map((it) => Math.round(it.duration))))
            .observe({ type: "longtask" });
          const frames = [];
          for (const unit of ["word ", "a", "*a ", "[", "`a``", "```js\\n", "- a\\n", "a|b\\n-|-\\n", "> "]) {
            const it = view();
            const text = unit.repeat(2_000_000 / unit.length);
            it.append(text);
            let count = 0;
            for (; count < 5; count += 1) await new Promise(requestAnimationFrame);
            frames.push([count, it.element.textContent.length, it.text.length === text.length]);
            it.element.remove();
          }
          console.log("long tasks", long.length, Math.max(0, ...long));
          return frames;
        }"""
    )
    # Four frames may show what they cost, and what one window more brings each.
    assert all(length < 60_000 and whole for _, length, whole in frames), frames


def test_page_without_frames_is_rendered_by_timer(page: Page) -> None:
    """A hidden tab has none; a headless browser's is never hidden, so that it is told."""
    assert page.evaluate(
        """async () => {
          window.requestAnimationFrame = () => 1;
          Object.defineProperty(document, "hidden", { get: () => true });
          const it = view();
          it.append("word ".repeat(20000) + "end.");
          document.dispatchEvent(new Event("visibilitychange"));
          await it.finish();
          return it.element.textContent.length;
        }"""
    ) == len("word ") * 20_000 + len("end.")


def test_vendored_parser_is_the_published_one_with_its_licences(tmp_path: Path) -> None:
    assert VERSION in VENDORED.read_text().splitlines()[0]
    licences = VENDORED.with_name("markdown-it.LICENSE").read_text()
    for name in ("markdown-it", "linkify-it", "mdurl", "entities", "uc.micro", "punycode.js"):
        assert name in licences or name == "markdown-it"
    npm = shutil.which("npm")
    if npm is None:
        missing("npm is not installed", "node")
    packed = subprocess.run(
        [npm, "pack", "--silent", f"markdown-it@{VERSION}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        missing(f"npm has no markdown-it: {packed.stderr[-300:]}", "node")
    with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
        published = {name: archive.extractfile(f"package/{name}") for name in (
            "dist/browser/markdown-it.esm.min.mjs", "LICENSE",
        )}  # fmt: skip
        contents = {name: file.read() for name, file in published.items() if file}
    assert contents["dist/browser/markdown-it.esm.min.mjs"] == VENDORED.read_bytes()
    assert licences.startswith(contents["LICENSE"].decode())
