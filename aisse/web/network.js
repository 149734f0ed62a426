/** The network as this page has it: one that can be switched off. */

/** Beside this page, whatever path a proxy has put it below. */
export const CHAT_URL = "api/chat";

/** Of a request that has had no answer for a while. The browser does not tell which it is. */
export const NO_ANSWER_YET =
  "No answer yet. The server takes its time, or the browser has no connection free: over HTTP/1.1 it has six for a " +
  "site, and each running answer takes one. Stopping one makes room.";

let cable = new AbortController();

export const offline = () => cable.signal.aborted;

/** `fetch`, but for what the switch does. */
export async function request(url, init) {
  if (offline()) throw new TypeError("This page is offline.");
  const signal = init.signal ? AbortSignal.any([init.signal, cable.signal]) : cable.signal;
  return fetch(url, { ...init, signal });
}

/** Breaks every connection, and refuses new ones, until it is called again. */
export function switchNetwork() {
  if (!offline()) return cable.abort(new TypeError("This page went offline."));
  cable = new AbortController();
  // As the browser says it after a real outage.
  window.dispatchEvent(new Event("online"));
}
