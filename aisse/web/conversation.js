/** Questions and answers in a row, of which the last may be running. */
import { savedChat } from "./aisse.js";
import { Answer } from "./answer.js";
import { answerOf, store, turnsOf } from "./history.js";

const TITLE_CHARS = 60;
/** Of what is said again with a question: within a server's `max_body_bytes` and a model's context. */
const MOST_CHARS = 200_000;

export class Conversation {
  #page;
  #answers = [];
  #numbers = new Map(); // of the answers, among all turns
  #count = 0; // of turns, those included that there was no room for

  /** A new one, or with `id` one that the history knows. `page` is for its answers: see answer.js. */
  constructor(page, id = "") {
    this.#page = page;
    this.id = id || crypto.getRandomValues(new Uint32Array(4)).join("-");
    this.element = document.createElement("div");
    if (!id) return;
    for (const { number, turn } of turnsOf(id)) this.#add(turn, number);
    if (this.last && savedChat(answerOf(id))) this.last.resume();
  }

  get last() {
    return this.#answers.at(-1);
  }

  get busy() {
    return this.last?.busy ?? false;
  }

  get title() {
    const [first = ""] = this.#answers[0]?.asked.match(/\S[^]*/) ?? [];
    return first.length > TITLE_CHARS ? `${first.slice(0, TITLE_CHARS - 1)}…` : first;
  }

  /** Asks `question`. `script` goes before it for the simulator, and `label` tells of it. */
  ask(question, { script = "", label = "" } = {}) {
    // What was never answered is not said again: roles alternate.
    const whole = this.#answers.filter(({ asked, text }) => asked.trim() && text.trim());
    let room = MOST_CHARS - question.length;
    const tooOld = whole.findLastIndex(({ asked, text }) => (room -= asked.length + text.length) < 0);
    const before = whole.slice(tooOld + 1);
    if (tooOld >= 0) label = [label, "Asked without what is too long ago"].filter(Boolean).join(" · ");
    const answer = this.#add({ question, label });
    answer.ask([
      ...before.flatMap(({ asked, text }) => [{ role: "user", content: asked }, { role: "assistant", content: text }]),
      { role: "user", content: (script && `[[${script}]]\n`) + question },
    ]);
    this.store();
    return answer;
  }

  /** Takes the last question back. */
  drop() {
    const { question, element } = this.#answers.pop();
    question.remove();
    element.remove();
    this.#count -= 1;
    this.store();
  }

  has(answer) {
    return this.#answers.includes(answer);
  }

  store(answer = this.last) {
    store({ id: this.id, title: this.title, count: this.#count }, answer?.record(), this.#numbers.get(answer));
  }

  #add(turn, number = this.#count) {
    const answer = new Answer(turn, answerOf(this.id), this.#page);
    this.#count = number + 1;
    this.#answers.at(-1)?.leave();
    this.#answers.push(answer);
    this.#numbers.set(answer, number);
    this.element.append(answer.question, answer.element);
    return answer;
  }
}
