/**
 * The conversations of this tab, in `sessionStorage`, as far as there is room: the oldest go first. Where nothing can
 * be stored they last as long as the page. What is read back is as little trusted as what a model wrote.
 */

/** With the page's folder: other servers below paths of the same origin know nothing of what was asked here. */
const PREFIX = `aisse.${new URL(".", location).pathname.slice(1)}`;
const MOST = 50;
/** Of one answer: browsers store 5 Mi characters, some half of that. */
const MOST_CHARS = 2_400_000;

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
    return !/quota/i.test(error.name); // Firefox has a name of its own for it
  }
  return true;
}

const remove = (name) => {
  try {
    sessionStorage.removeItem(PREFIX + name);
  } catch {
    // not allowed: then there is nothing
  }
};

let index = listOf(read("index")).map(({ id, title, count }) => ({
  id: text(id), title: text(title), count: Math.min(Number(count) || 0, 10_000),
}));

/** The name under which an unfinished answer of conversation `id` is kept: see `keep` in aisse.d.ts. */
export const answerOf = (id) => `${PREFIX}answer.${id}`;

/** `{ id, title }` of each, the latest first. */
export const conversations = () => index;

/** Where the person was. */
export const current = () => text(read("current"));
export const setCurrent = (id) => write("current", id);

/** What is there of the turns of conversation `id`, as `{ number, turn }`: texts in the fields of `Answer.record`. */
export function turnsOf(id) {
  const { count = 0 } = index.find((one) => one.id === id) ?? {};
  const turns = Array.from({ length: count }, (_, number) => ({ number, turn: read(`${id}.${number}`) }));
  return turns.filter(({ turn }) => turn && typeof turn === "object").map(({ number, turn }) => ({
    number,
    turn: Object.fromEntries(Object.entries({ question: "", ...turn }).map(([name, value]) => [name, text(value)])),
  }));
}

/**
 * Stores `turn` as the last of a conversation that has `count`, one alone, since there may be megabytes before it;
 * without it, the last one was taken back. A conversation without turns is forgotten.
 */
export function store({ id, title, count }, turn, number = count - 1) {
  // What has no room alone must not drive out all others: what came of it is cut.
  if (turn?.text.length > MOST_CHARS) {
    turn = { ...turn, text: "", cursor: "", problem: turn.problem || "This answer was too long to be kept." };
  }
  index = [...(count ? [{ id, title, count }] : []), ...index.filter((one) => one.id !== id)];
  remove(`${id}.${count}`);
  if (index.length > MOST) forgetOldest();
  let gone = 0;
  while (!((!turn || write(`${id}.${number}`, turn)) && write("index", index))) {
    if (index.length > 1) forgetOldest();
    else if (gone < count - 1) remove(`${id}.${gone++}`);
    else return;
  }
}

function forgetOldest() {
  const { id, count } = index.pop();
  for (let number = 0; number < count; number += 1) remove(`${id}.${number}`);
  remove(`answer.${id}`);
}
