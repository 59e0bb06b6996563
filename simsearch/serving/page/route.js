// The address says what is shown: every change goes through `go`, which writes it and draws again.

import { readAddress, writeAddress } from "./address.js";
import { page } from "./store.js";
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

export function render(scroll = null) {
  drawBar();
  drawChips();
  drawSide();
  drawFacets();
  drawLarge();
  show(scroll);
}
