/**
 * Markdown as it arrives: `const view = markdown(element)`, `view.append(text)`, `await view.finish()`.
 *
 * What is shown is a function of the text alone, however it was cut into pieces. All blocks but the last are final and
 * never touched again; the last is parsed anew at most once a frame. No step looks at more than one window of text, and
 * a block that outgrows its window is cut there, so that neither two megabytes in one line nor markup made to be slow
 * holds the page up. Nodes come from the parser's tokens by createElement and text, never from HTML.
 *
 * Below `element` are `div.blocks`, groups that the browser lays out only where they are seen, and in these the blocks,
 * each with dir="auto":
 * - `p`, `h1` to `h6`, `ul`, `ol`, `blockquote`, `hr`;
 * - `div.code`, with data-language where that is known, around the scrolling `pre` around one or more `code`;
 * - `div.table`, which scrolls, around `table`; its cells may have a class `left`, `center` or `right`.
 * Of a block that was cut, what follows has the class `continued`, inside of a list's item or a quote also `nested`.
 * Of an answer with more elements than a page can hold the rest is not marked up: each block is a `p.plain`.
 * An image is a link with the class `image`. The sheet below has what the promises need; space between the blocks is
 * its `--block-gap`, everything else is up to the page.
 */
import MarkdownIt from "./vendor/markdown-it.min.mjs";

// Margins only above: they do not collapse across groups, which are formatting contexts of their own.
const SHEET = `
  .blocks { content-visibility: auto; contain-intrinsic-size: auto 40rem; overflow-wrap: anywhere; }
  .blocks > * { margin-block: var(--block-gap, 0.8em) 0; }
  .blocks > .continued, .blocks:first-child > :first-child { margin-block-start: 0; }
  .blocks > .nested { margin-inline-start: 2em; }
  .blocks :is(a, code, em, strong, s, li, th, td) { unicode-bidi: isolate; }
  .blocks .code > pre, .blocks > .table { overflow-x: auto; }
  .blocks .code > pre { margin: 0; overflow-wrap: normal; unicode-bidi: plaintext; }
  .blocks .code > pre > code {
    display: block; width: max-content; min-width: 100%; unicode-bidi: plaintext;
    content-visibility: auto; contain-intrinsic-size: auto 1px auto 40rem;
  }
  .blocks > .plain { white-space: pre-wrap; }
  .blocks .left { text-align: left; }
  .blocks .center { text-align: center; }
  .blocks .right { text-align: right; }
`;

// A window is as long as the slowest markup lets the parser take some ten milliseconds for.
const WINDOW_CHARS = 4096;
const WINDOW_LINES = 64;
// What layout costs, in characters: for each element and each line that many more.
const ELEMENT_COST = 50;
const LINE_COST = 25;
const GROUP_COST = 6144;
const FRAME_COST = 8192;
/** Frames further apart than this mean that layout cost more than was thought: less is done in the next one. */
const LATE_MS = 35;
/** What a page can hold and still lay out within a frame; what follows is shown as it was written. */
const MOST_ELEMENTS = 30_000;
const SCROLLER_ELEMENTS = 50;
/** Of one `pre`: beyond it, another one begins. */
const CODE_PIECES = 64;
// A frame has 16 milliseconds, and layout and paint need some of them; nobody sees the frames of a hidden tab.
const FRAME_MS = 8;
const HIDDEN_MS = 30;
const HIDDEN_EVERY_MS = 100;
/** Beyond these, `>`, list markers and `|` are text: the parser would drop what is too deep, or fill up rows. */
const MAX_DEPTH = 12;
const MAX_COLUMNS = 24;
/** Before what follows a cut inside of a line, so that it is no markup of a block; it is never shown. */
const GUARD = "\u2060";

const TAGS = new Set(["p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "table", "thead",
  "tbody", "tr", "th", "td", "em", "strong", "s", "code", "br"]);
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

const parser = createMarkdownIt();

function createMarkdownIt() {
  const md = new MarkdownIt({ html: false, linkify: true, typographer: false });
  // A definition could change blocks that are final, and would vanish itself: it stays text, with its address a link.
  md.disable(["reference"]);
  // Only what begins with its scheme: `README.md` and `main.py` are no hosts. What is no link stays as it was written.
  md.linkify.set({ fuzzyLink: false, fuzzyEmail: false }).add("//").add("ftp:");
  md.validateLink = (url) => safe(url) !== null;
  // Decoded, an address could look like another one.
  md.normalizeLinkText = (url) => url;
  for (const name of ["blockquote", "list"]) {
    const rule = ruleOf(name);
    const shallow = (state, ...rest) => state.level < 2 * MAX_DEPTH && rule(state, ...rest);
    md.block.ruler.at(name, shallow, { alt: ["paragraph", "blockquote", ...(name === "list" ? [] : ["list"])] });
  }
  const table = ruleOf("table");
  md.block.ruler.at("table", (state, line, ...rest) => {
    const delimiters = state.src.slice(state.bMarks[line + 1], state.eMarks[line + 1]);
    return delimiters.split("|").length <= MAX_COLUMNS + 2 && table(state, line, ...rest);
  }, { alt: ["paragraph"] });
  return md;
}

function ruleOf(name) {
  const { ruler } = new MarkdownIt("zero").block;
  ruler.enableOnly([name]);
  return ruler.getRules("")[0];
}

/** `url` as the browser understands it, if it is one that may be followed. */
function safe(url) {
  try {
    const { href, protocol } = new URL(url);
    return PROTOCOLS.has(protocol) ? href : null;
  } catch {
    return null;
  }
}

// --- from tokens to nodes -------------------------------------------------------------------------------------------

/** One node for each block on top. */
function build(tokens) {
  const blocks = [];
  const open = [];
  const put = (node) => {
    if (open.length) {
      open.at(-1).append(node);
    } else {
      node.dir = "auto";
      blocks.push(node);
    }
  };
  for (const token of tokens) {
    if (token.hidden) continue; // the paragraphs of a tight list
    if (token.type === "inline") {
      buildInline(token.children, open.at(-1));
    } else if (token.type === "fence" || token.type === "code_block") {
      put(codeBlock(token));
    } else if (token.nesting === 1) {
      open.push(element(token));
    } else if (token.nesting === -1) {
      const node = open.pop();
      put(node.localName === "table" ? scrolling(node) : node);
    } else {
      put(element(token));
    }
  }
  return blocks;
}

function buildInline(tokens, parent) {
  const open = [parent];
  for (const token of tokens) {
    const top = open.at(-1);
    if (token.type === "text" || token.type === "text_special") {
      top.append(token.content);
    } else if (token.type === "softbreak") {
      top.append("\n");
    } else if (token.type === "hardbreak") {
      top.append(document.createElement("br"), "\n");
    } else if (token.type === "image") {
      top.append(image(token, open.some((node) => node.localName === "a")));
    } else if (token.nesting === -1) {
      open.pop();
    } else {
      const node = token.tag === "a" ? link(token.attrGet("href"), token.attrGet("title")) : element(token);
      top.append(node);
      if (token.nesting === 1) open.push(node);
      else node.append(token.content);
    }
  }
}

function element(token) {
  const node = document.createElement(TAGS.has(token.tag) ? token.tag : "span");
  if (token.tag === "ol" && token.attrGet("start") !== null) node.setAttribute("start", token.attrGet("start"));
  if (token.tag === "th") node.scope = "col";
  // Its `style` would be refused by the page's policy.
  const align = /^text-align:(left|center|right)$/.exec(token.attrGet("style") ?? "");
  if (align) node.className = align[1];
  return node;
}

function link(url, title) {
  const href = safe(url);
  if (href === null) return document.createElement("span");
  const node = document.createElement("a");
  node.setAttribute("href", href);
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
  if (title) node.setAttribute("title", title);
  return node;
}

/** Nothing is loaded from elsewhere before somebody asks for it. */
function image(token, inLink) {
  const node = inLink ? document.createElement("span") : link(token.attrGet("src"), token.attrGet("title"));
  node.className = "image";
  node.append(token.content || token.attrGet("src"));
  return node;
}

function codeBlock(token) {
  const language = token.info.trim();
  const [block, pre, code] = ["div", "pre", "code"].map((tag) => document.createElement(tag));
  block.className = "code";
  if (language) block.dataset.language = language;
  focusable(pre, language ? `Code, ${language}` : "Code");
  code.append(token.content);
  pre.append(code);
  block.append(pre);
  return block;
}

function scrolling(table) {
  const block = document.createElement("div");
  block.className = "table";
  focusable(block, "Table");
  block.append(table);
  return block;
}

/** For the keyboard to scroll it. */
function focusable(node, label) {
  node.setAttribute("tabindex", "0");
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", label);
}

/** Makes `old` what `fresh` is, and keeps what it can: a selection, the focus, how far code was scrolled. */
function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return fresh;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (fresh.data !== old.data) {
      if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
      else old.data = fresh.data;
    }
    return old;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  let child = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    if (child) child = morph(child, wanted).nextSibling;
    else old.append(wanted);
  }
  while (child) {
    const next = child.nextSibling;
    child.remove();
    child = next;
  }
  return old;
}

/** Text as it was written. */
function plain(text) {
  const node = document.createElement("p");
  node.className = "plain continued";
  node.dir = "auto";
  node.append(text);
  return node;
}

/** What scrolls counts for many: the browser keeps a layer for each. */
const elementsOf = (node) =>
  1 + node.getElementsByTagName("*").length + SCROLLER_ELEMENTS * node.querySelectorAll("pre, table").length;

function costOf(node) {
  const text = node.textContent;
  return text.length + LINE_COST * text.split("\n").length + ELEMENT_COST * node.getElementsByTagName("*").length;
}

// --- cutting --------------------------------------------------------------------------------------------------------

/**
 * What a cut leaves open, for the lines after it: the containers around, functions that give a line's content, or null
 * if it is outside; lines to parse before them, which are a fence's first or a table's head; an ordered list's next
 * number; whether the cut was inside of a line, or of a block at all ("list": of a list, if another one follows).
 */
const nothing = { containers: [], prefix: [], kind: "", number: 0, inLine: false, cut: false };
/** The same at the beginning of a block in the same containers. */
const between = { prefix: [], kind: "", inLine: false, cut: false };

const quote = (line) => {
  const marker = /^ {0,3}> ?/.exec(line);
  return marker && line.slice(marker[0].length);
};
const item = (indent) => (line) => {
  if (/^[ \t]*$/.test(line)) return line.slice(indent);
  return line.startsWith(" ".repeat(indent)) ? line.slice(indent) : null;
};

function strip(line, containers) {
  for (const container of containers) {
    line = container(line);
    if (line === null) return null;
  }
  return line;
}

/** The lines' contents, up to the first one that is outside of the containers. */
function contents(lines, { containers, inLine }) {
  const inside = [];
  for (const line of lines) {
    const content = inLine && !inside.length ? line : strip(line, containers);
    if (content === null) break;
    inside.push(content);
  }
  return inside;
}

function parse(lines, { prefix, inLine }, ended) {
  const text = (inLine ? GUARD : "") + lines.join("\n") + (ended ? "\n" : "");
  const tokens = parser.parse([...prefix, text].join("\n"), {});
  if (inLine) {
    const first = tokens.find(({ type }) => type === "inline" || type === "fence");
    const holder = first?.type === "inline" ? first.children[0] : first;
    if (holder?.content.startsWith(GUARD)) holder.content = holder.content.slice(GUARD.length);
  }
  return tokens;
}

/** How to go on after `lines`, which `tokens` are of and `before` was for. */
function carryOver(tokens, lines, inLine, before) {
  const inner = [];
  const [top] = tokens;
  const carry = { ...nothing, cut: top.map[1] >= lines.length, inLine };
  if (before.containers.length) carry.number = before.number;
  let openedAt = -1;
  let rest = "";
  for (const [index, token] of tokens.entries()) {
    if (!token.map || token.nesting < 0 || token.map[1] < lines.length) continue;
    const [first] = token.map;
    // A line may open several containers: `- > 1. text`.
    const content = first === openedAt ? rest : strip(lines[first], inner) ?? "";
    if (token.type === "blockquote_open" || token.type === "list_item_open") {
      const isQuote = token.type === "blockquote_open";
      const marker = (isQuote ? /^ *> ?/ : /^ *(?:[-+*]|\d{1,9}[.)])(?: {1,4}(?! ))?/).exec(content)?.[0] ?? "";
      // Where nothing follows the marker, one space counts that is not there.
      inner.push(isQuote ? quote : item(marker.endsWith(" ") ? marker.length : marker.length + 1));
      openedAt = first;
      rest = content.slice(marker.length);
    } else if (token.type === "ordered_list_open" && token.level === 0 && !before.containers.length) {
      const items = tokens.slice(index).filter(({ type, level }) => type === "list_item_open" && level === 1);
      carry.number = ((before.cut && before.number) || Number(token.attrGet("start") ?? 1)) + items.length;
    } else if (token.type === "fence") {
      const end = first < lines.length - 1 ? strip(lines.at(-1), inner) ?? "" : "";
      const closing = new RegExp(`^ {0,3}${token.markup[0]}{${token.markup.length},}[ \\t]*$`);
      if (closing.test(end)) carry.cut &&= token !== top;
      else Object.assign(carry, { kind: "fence", prefix: [/^ {0,3}/.exec(content)[0] + token.markup] });
    } else if (token.type === "table_open" && !inLine) {
      const head = [content, strip(lines[first + 1], inner) ?? ""];
      if (head.join("").length < WINDOW_CHARS / 4) Object.assign(carry, { kind: "table", prefix: head });
    }
  }
  carry.containers = [...before.containers, ...inner];
  return carry;
}

/** Where to cut a line that has no end in sight: after a space, but never inside of a character. */
function cutInLine(text) {
  const space = text.lastIndexOf(" ");
  if (space > 0.75 * text.length) return space + 1;
  let at = text.length;
  // At most this many combining characters belong together; a text may consist of nothing else.
  for (let tries = 32; tries && /^(?:[\uDC00-\uDFFF\u200D\uFE0F]|\p{M})/u.test(text.slice(at - 1)); tries -= 1) at -= 1;
  if (at > 1 && /[\uD800-\uDBFF]/.test(text[at - 1])) at -= 1;
  return at;
}

// --- the view -------------------------------------------------------------------------------------------------------

class View {
  /** What the nodes made final cost so far. */
  cost = 0;
  #element;
  #onCode;
  #text = "";
  /** What `append` brought and no window has reached, so that a step costs the same however much is waiting. */
  #waiting = [];
  /** A CR that a LF may follow. */
  #cr = "";
  /** What follows the last final block, as far as a window needs it. */
  #source = "";
  #carry = nothing;
  /** How much of `#source` was looked at for final blocks: without a new line there are no new ones. */
  #seen = 0;
  #group = null;
  #groupCost = 0;
  #elements = 0;
  /** The nodes of what is not final: the last block, or with an unfinished line after it two. */
  #tail = [];
  /** The `div.code` that a cut left open. */
  #code = null;
  #shown = true;
  #handedOut = false;
  #finishing = [];

  constructor(element, onCode) {
    this.#element = element;
    this.#onCode = onCode;
  }

  get text() {
    return this.#text;
  }

  append(text) {
    if (!text) return;
    this.#text += text;
    const whole = this.#cr + text;
    this.#cr = whole.endsWith("\r") ? "\r" : "";
    const lines = (this.#cr ? whole.slice(0, -1) : whole).replace(/\r\n?/g, "\n");
    if (lines) this.#waiting.push({ text: lines, at: 0 });
    if (this.#handedOut) {
      // What the page did to its code would be in the way of what it becomes.
      for (const node of this.#tail.splice(0)) node.remove();
      this.#handedOut = false;
    }
    this.#shown = false;
    schedule(this);
  }

  finish() {
    return new Promise((resolve) => {
      this.#finishing.push(resolve);
      schedule(this);
    });
  }

  /** One step; whether there is another one. Text that the parser fails at is shown as it was written. */
  step() {
    try {
      return this.#step();
    } catch (error) {
      if (this.#elements === Infinity) throw error;
      this.#elements = Infinity;
      reportError(error);
      return true;
    }
  }

  #step() {
    if (this.#advance()) return true;
    if (!this.#shown) {
      this.#showTail();
      this.#shown = true;
      return this.#finishing.length > 0;
    }
    if (this.#finishing.length) {
      if (!this.#handedOut) this.#tail.forEach((node) => this.#handOut(node));
      this.#handedOut = true;
      for (const resolve of this.#finishing.splice(0)) resolve();
    }
    return false;
  }

  /** Makes final what is, within the next window; whether the text goes on behind it. */
  #advance() {
    this.#fill();
    if (this.#elements > MOST_ELEMENTS) return this.#advancePlain();
    const carry = this.#carry;
    let window = this.#source.slice(0, WINDOW_CHARS);
    let lines = window.split("\n");
    const full = window.length === WINDOW_CHARS || lines.length > WINDOW_LINES;
    const inLine = full && lines.length === 1;
    if (inLine) {
      window = window.slice(0, cutInLine(window));
      lines = [window];
    } else {
      // A line without its end proves nothing: it may become anything yet.
      lines = lines.slice(0, Math.min(lines.length - 1, WINDOW_LINES));
      window = lines.map((line) => `${line}\n`).join("");
      if (!full && window.length === this.#seen) return false;
    }
    this.#seen = window.length;

    const inside = contents(lines, carry);
    if (inside.length < lines.length) {
      // Here the containers end, and with them what is open in them.
      if (inside.length) this.#commit(this.#render(parse(inside, carry, true), carry));
      this.#close();
      this.#consume(lines.slice(0, inside.length), { ...nothing, cut: "list", number: carry.number });
      return true;
    }
    const tokens = parse(inside, carry, !inLine);
    const starts = tokens.filter(({ level, nesting }) => level === 0 && nesting >= 0).map(({ map }) => map[0]);
    if (starts.length > 1) {
      const blocks = this.#render(tokens, carry).slice(0, -1);
      const hidden = starts.length - 1 - blocks.length; // of a fence only its end
      const taken = this.#fitting(blocks);
      this.#commit(blocks.slice(0, taken));
      this.#consume(lines.slice(0, starts[hidden + taken] - carry.prefix.length), { ...carry, ...between });
      return true;
    }
    if (!full) return false;
    const blocks = this.#render(tokens, carry);
    const parsed = [...carry.prefix, ...inside];
    const next = blocks.length ? carryOver(tokens, parsed, inLine, carry) : { ...carry, ...between };
    // The space at its end is no part of a paragraph, but that in its middle is.
    if (next.cut && /^(?:p|h\d)$/.test(blocks[0].localName)) blocks[0].append(/\s*$/.exec(window)[0]);
    this.#commit(blocks, next.kind === "fence");
    if (inLine) this.#consume([window], next, 0);
    else this.#consume(lines, next);
    return true;
  }

  #advancePlain() {
    const window = this.#source.slice(0, WINDOW_CHARS);
    if (window.length < WINDOW_CHARS) return false;
    this.#close();
    const end = window.lastIndexOf("\n") + 1 || cutInLine(window);
    this.#commit([plain(window.slice(0, end))]);
    this.#source = this.#source.slice(end);
    return true;
  }

  /** How many of `blocks` are marked up: one is the first beyond the limit, however many came at once. */
  #fitting(blocks) {
    let elements = this.#elements;
    const last = blocks.findIndex((block) => (elements += elementsOf(block)) > MOST_ELEMENTS);
    return last < 0 ? blocks.length : last + 1;
  }

  /** Takes as much of what is waiting as a window needs. */
  #fill() {
    while (this.#waiting.length && this.#source.length < WINDOW_CHARS) {
      const [piece] = this.#waiting;
      this.#source += piece.text.slice(piece.at, piece.at + WINDOW_CHARS);
      piece.at += WINDOW_CHARS;
      if (piece.at >= piece.text.length) this.#waiting.shift();
    }
  }

  #consume(lines, carry, newline = 1) {
    this.#source = this.#source.slice(lines.reduce((length, line) => length + line.length + newline, 0));
    this.#carry = carry;
    this.#seen = 0;
  }

  /** The nodes of `tokens`, as what follows a cut if it does; the first may be one for the `pre` that is open. */
  #render(tokens, carry) {
    const blocks = build(tokens);
    const [first] = blocks;
    if (carry.containers.length) for (const block of blocks) block.classList.add("nested");
    if (!first || !carry.cut) return blocks;
    const isList = first.localName === "ul" || first.localName === "ol";
    if (carry.cut !== "list" || isList) first.classList.add("continued");
    if (first.localName === "ol" && carry.number && !carry.containers.length) first.setAttribute("start", carry.number);
    if (carry.kind === "table") first.querySelector("thead")?.remove();
    if (carry.kind === "fence") {
      const code = first.querySelector("code");
      if (!code.textContent) blocks.shift();
      else if (this.#code) blocks[0] = code;
    }
    return blocks;
  }

  /** Shows what is not final. */
  #showTail() {
    const old = this.#tail.splice(0);
    const blocks = this.#elements > MOST_ELEMENTS ? this.#plainTail() : this.#markedUpTail();
    this.#tail = blocks.map((block) => this.#place(block, old));
    for (const node of old) node.remove();
  }

  #plainTail() {
    return this.#source ? [plain(this.#source)] : [];
  }

  #markedUpTail() {
    const lines = this.#source.split("\n");
    const inside = contents(lines, this.#carry);
    const rest = lines.slice(inside.length);
    const blocks = this.#source ? this.#render(parse(inside, this.#carry, false), this.#carry) : [];
    if (rest.length) blocks.push(...this.#render(parse(rest, nothing, false), nothing));
    return blocks;
  }

  /** Puts `block` where it belongs, in the place of the first of `old` if that is there. */
  #place(block, old) {
    if (!this.#group) {
      this.#group = document.createElement("div");
      this.#group.className = "blocks";
      this.#groupCost = 0;
      this.#element.append(this.#group);
    }
    const parent = block.localName === "code" ? this.#code.firstChild : this.#group;
    if (old[0]?.parentNode === parent) return morph(old.shift(), block);
    for (const node of old.splice(0)) node.remove();
    parent.append(block);
    return block;
  }

  /** Places `blocks` for good. `open`: the last one's code goes on. */
  #commit(blocks, open = false) {
    for (const [index, block] of blocks.entries()) {
      const node = this.#place(block, this.#tail);
      const cost = costOf(node);
      this.#elements += elementsOf(node);
      this.#groupCost += cost;
      this.cost += cost;
      const goesOn = open && index === blocks.length - 1;
      if (node.localName === "code") {
        if (!goesOn || node.parentNode.childElementCount >= CODE_PIECES) this.#close();
      } else {
        this.#close();
        if (goesOn && node.className.startsWith("code")) this.#code = node;
        else this.#handOut(node);
      }
      if (!this.#code && this.#groupCost >= GROUP_COST) {
        for (const rest of this.#tail.splice(0)) rest.remove();
        this.#group = null;
      }
    }
    if (!open) this.#close();
  }

  /** Nothing is added to the open code any more. */
  #close() {
    if (this.#code) this.#handOut(this.#code);
    this.#code = null;
  }

  #handOut(node) {
    if (!this.#onCode) return;
    if (node.matches(".code:not(.continued)")) this.#onCode(node);
    else node.querySelectorAll(".code").forEach((code) => this.#onCode(code));
  }
}

// --- when -----------------------------------------------------------------------------------------------------------

/** The views that have something to show. They share the time of a frame. */
const due = new Set();
let frame = 0;
let timer = 0;
let allowed = FRAME_COST;
let before = Infinity;

function schedule(view) {
  due.add(view);
  if (frame || timer) return;
  // A hidden page has no frames.
  if (document.hidden) timer = setTimeout(run, HIDDEN_EVERY_MS);
  else frame = requestAnimationFrame(run);
}

function run() {
  frame = timer = 0;
  const now = performance.now();
  allowed = now - before > LATE_MS ? Math.max(allowed / 2, 1024) : Math.min(2 * allowed + 1, FRAME_COST);
  before = now;
  const deadline = now + (document.hidden ? HIDDEN_MS : FRAME_MS);
  let cost = 0;
  while (due.size && (cost < allowed || document.hidden) && performance.now() < deadline) {
    const [view] = due;
    due.delete(view);
    cost -= view.cost;
    if (view.step()) due.add(view);
    cost += view.cost;
  }
  if (!due.size) before = Infinity; // the next one comes when there is something to show
  for (const view of due) schedule(view);
}

document.addEventListener("visibilitychange", () => {
  cancelAnimationFrame(frame);
  clearTimeout(timer);
  frame = timer = 0;
  for (const view of due) schedule(view);
});

const sheet = new CSSStyleSheet();
sheet.replaceSync(SHEET);
document.adoptedStyleSheets.push(sheet);

/**
 * Shows Markdown in `element`, which is empty and stays this view's. `append(text)` adds to it and returns at once;
 * `finish()` resolves when all of it is shown, and more may follow; `text` is all of it as it came. `onCode(block)` is
 * called once for each `div.code` that is final, for a page that adds something to it; if more text follows a
 * `finish()`, the code in the last block may be taken back, and comes again.
 */
export function markdown(element, { onCode } = {}) {
  return new View(element, onCode);
}
