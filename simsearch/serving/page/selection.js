// The works that a person keeps, of each collection, in this browser alone. Those who draw listen.

import { page } from "./store.js";

const KEY = "simsearch selection";
export const MOST_KEPT = 500; // of a collection, and of an address
const listeners = [];
let selections = read();

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return typeof found === "object" && found !== null ? found : {};
  } catch {
    return {}; // no storage, or another program's text
  }
}

export const onSelection = (listener) => listeners.push(listener);
const tellAll = () => { for (const listener of listeners) listener(); };

export function kept() {
  const found = selections[page.state.catalog];
  return Array.isArray(found) ? found.filter((id) => typeof id === "string") : [];
}

export function keep(ids) {
  selections = { ...read(), [page.state.catalog]: [...new Set(ids)].slice(0, MOST_KEPT) };
  try {
    localStorage.setItem(KEY, JSON.stringify(selections));
  } catch {
    // It lasts as long as the page.
  }
  tellAll();
}

export const isKept = (id) => kept().includes(id);
export const isOwn = (ids) => String(ids) === String(kept());

// Another window of this browser changed it.
addEventListener("storage", (event) => {
  if (event.key !== KEY) return;
  selections = read();
  tellAll();
});
