// The address says what is shown: every change goes through `go`, which writes it and tells those who listen. They draw;
// nothing here knows them.

import { readAddress, writeAddress } from "./address.js";
import { Lost, readCatalogs } from "./api.js";
import { edition, known, large, nothing, page, sameImage, works } from "./store.js";
import { busy, tell } from "./notes.js";

const scrolls = new Map();
const listeners = [];

export const onChange = (listener) => listeners.push(listener);

let stood = ""; // the edition that the page's works are of

// Tells the listeners that `page` has changed. `scroll` is the position to return to, null for a new place.
export function changed(scroll = null) {
  if (stood !== edition()) { // whose ids mean other works
    stood = edition();
    known.clear();
    page.shown = nothing();
    works.replaceChildren();
    large.dataset.id = "";
  }
  for (const listener of listeners) listener(scroll);
}

export function go(changes, { replace = false } = {}) {
  const before = location.hash;
  const closed = writeAddress({ ...page.state, open: null });
  page.state = { ...page.state, ...changes };
  const address = writeAddress(page.state);
  scrolls.set(before, scrollY);
  if (address !== before && replace) history.replaceState(history.state, "", address);
  else if (address !== before) history.pushState(changes.open ? { opened: closed } : null, "", address);
  changed();
}

export function arrive() {
  const asked = readAddress(location.hash);
  const name = page.catalogs.some((c) => c.name === asked.catalog) ? asked.catalog : page.catalogs[0].name;
  const parts = page.catalogs.find((c) => c.name === name).parts;
  const fits = asked.weights && Object.keys(asked.weights).every((part) => part in parts);
  page.state = { ...asked, catalog: name, weights: fits ? asked.weights : null };
  changed(scrolls.get(location.hash) ?? 0);
}

let exchanging = false;

// Reads the catalogs again after the server replaced one that the page knows, and repeats the request. The ids in the
// address mean the same works in both versions.
export async function exchanged() {
  if (exchanging) return;
  exchanging = true;
  try {
    page.catalogs = await readCatalogs({ busy });
    arrive();
    tell("The collection was replaced by a new version, which is shown now.");
  } catch (error) {
    failed(error);
  } finally {
    exchanging = false;
  }
}

export function failed(error) {
  if (error.name === "AbortError") return;
  if (error.status === 409) return exchanged();
  if (error instanceof Lost) {
    const keep = (list) => list.filter((ref) => !error.refs.some(sameImage(ref)));
    const { like, unlike, searches } = page.state;
    go({ like: keep(like), unlike: keep(unlike), searches: keep(searches) }, { replace: true });
  }
  tell(error.message);
}
