// The address says what is shown: every change goes through `go`, which writes it and draws again.

import { readAddress, writeAddress } from "./address.js";
import { readCatalogs } from "./api.js";
import { known, page } from "./store.js";
import { busy, failed, tell } from "./notes.js";
import { show } from "./results.js";
import { drawBar, drawChips, drawFacets } from "./bar.js";
import { drawSide } from "./side.js";
import { drawLarge } from "./view.js";

const scrolls = new Map();

export function go(changes, { replace = false } = {}) {
  const before = location.hash;
  page.state = { ...page.state, ...changes };
  const address = writeAddress(page.state);
  scrolls.set(before, scrollY);
  if (address !== before && replace) history.replaceState(history.state, "", address);
  else if (address !== before) history.pushState(null, "", address);
  render();
}

export function arrive() {
  const asked = readAddress(location.hash);
  const name = page.catalogs.some((c) => c.name === asked.catalog) ? asked.catalog : page.catalogs[0].name;
  const parts = page.catalogs.find((c) => c.name === name).parts;
  const fits = asked.weights && Object.keys(asked.weights).every((part) => part in parts);
  page.state = { ...asked, catalog: name, weights: fits ? asked.weights : null };
  render(scrolls.get(location.hash) ?? 0);
}

let exchanging = false;

// The server has another collection in the place of one that the page knows: the page learns it and asks anew. What is
// in the address are ids, which are the same works in both.
export async function exchanged() {
  if (exchanging) return;
  exchanging = true;
  try {
    page.catalogs = await readCatalogs({ busy });
    known.clear();
    arrive();
    tell("The collection was exchanged for a new one: this is the new one.");
  } catch (error) {
    failed(error);
  } finally {
    exchanging = false;
  }
}

export function render(scroll = null) {
  drawBar();
  drawChips();
  drawSide();
  drawFacets();
  drawLarge();
  show(scroll);
}
