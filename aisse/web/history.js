/**
 * The conversations of this tab, in `sessionStorage`, as far as there is room: the oldest go first. Where nothing can
 * be stored they last as long as the page. What is read back is as little trusted as what a model wrote.
 */

const PREFIX = "aisse.";
const MOST = 50;

const text = (value) => (typeof value === "string" ? value : "");
const listOf = (value) => (Array.isArray(value) ? value.filter((one) => one && typeof one === "object") : []);

function read(name) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + name));
  } catch {
    return null; // damaged, or not allowed
  }
}

/** False where there is no room. */
function write(name, value) {
  try {
    sessionStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch (error) {
    return error.name !== "QuotaExceededError";
  }
  return true;
}

let index = listOf(read("index")).map(({ id, title }) => ({ id: text(id), title: text(title) }));

/** The name under which an unfinished answer of conversation `id` is kept: see `keep` in aisse.d.ts. */
export const answerOf = (id) => `${PREFIX}answer.${id}`;

/** `{ id, title }` of each, the latest first. */
export const conversations = () => index;

/** Where the person was. */
export const current = () => text(read("current"));
export const setCurrent = (id) => write("current", id);

/** The turns of conversation `id`, with texts in the fields that `Answer.record` gives them. */
export function turnsOf(id) {
  return listOf(read(id)?.turns).map((turn) =>
    Object.fromEntries(Object.entries(turn).map(([name, value]) => [name, text(value)])),
  );
}

/** A conversation without turns is forgotten. */
export function store({ id, title, turns }) {
  index = [{ id, title }, ...index.filter((one) => one.id !== id)];
  if (!turns.length) index.push(index.shift());
  if (!turns.length || index.length > MOST) forgetOldest();
  if (!turns.length) return void write("index", index);
  let rest = turns;
  while (!(write(id, { turns: rest }) && write("index", index))) {
    if (index.length > 1) forgetOldest();
    else if (rest.length > 1) rest = rest.slice(1);
    else return;
  }
}

function forgetOldest() {
  const { id } = index.pop();
  try {
    for (const name of [PREFIX + id, answerOf(id)]) sessionStorage.removeItem(name);
  } catch {
    // not allowed: then there is nothing
  }
}
