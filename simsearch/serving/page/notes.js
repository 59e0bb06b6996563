// What the page says: a line of status, and notes that go by themselves.

import { $, h, icon } from "./dom.js";
import { Lost } from "./api.js";
import { page, sameRef } from "./store.js";
import { exchanged, go } from "./route.js";

export function say(text) {
  $("#status").textContent = text;
}

export function tell(message) {
  const note = h("div", { class: "note" }, h("span", {}, message),
    h("button", { type: "button", class: "tool round", "aria-label": "Dismiss", onclick: () => note.remove() }, icon("close")));
  for (const other of [...$("#notes").children]) if (other.firstChild.textContent === message) other.remove();
  $("#notes").append(note);
  setTimeout(() => note.remove(), 9000);
}

export const busy = (seconds) => say(`The server is busy. Trying again in ${seconds} s.`);

export function failed(error) {
  if (error.name === "AbortError") return;
  if (error.status === 409) return exchanged();
  if (error instanceof Lost) {
    const keep = (list) => list.filter((ref) => !error.refs.some(sameRef(ref)));
    go({ like: keep(page.state.like), unlike: keep(page.state.unlike) }, { replace: true });
  }
  tell(error.message);
}
