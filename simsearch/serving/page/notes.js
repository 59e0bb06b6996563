// What the page says: a line of status, and notes that go by themselves.

import { $, h, icon } from "./dom.js";

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
