// Several images as a search each: a row of them, of which one is answered below.

import { $, h, icon } from "./dom.js";
import { EXAMPLES, page, sameRef } from "./store.js";
import { go } from "./route.js";
import { tilePicture } from "./side.js";

export const MOST_SEARCHES = 48;

const current = () => (page.state.like.length === 1 ? page.state.searches.findIndex(sameRef(page.state.like[0])) : -1);
export const searchOnly = (ref) => { page.explained = 0; go({ like: [ref], unlike: [], text: "", selection: [], open: null }); };

// Each of these images by itself, beginning with the first.
export function searchEach(refs) {
  page.explained = 0;
  go({ searches: refs.slice(0, MOST_SEARCHES), like: [refs[0]], unlike: [], text: "", selection: [], open: null });
}

let drawn = "";

export function drawSearches() {
  const { searches } = page.state;
  const box = $("#searches");
  box.hidden = !searches.length;
  const at = current();
  const key = JSON.stringify([searches, at, page.state.catalog]);
  if (key === drawn) return;
  drawn = key;
  const tiles = searches.map((ref, i) => h("li", {}, h("button", {
    type: "button", class: "tile", "aria-pressed": String(i === at), "aria-label": `Search ${i + 1} of ${searches.length}`, onclick: () => searchOnly(ref),
  }, tilePicture(ref))));
  box.replaceChildren(
    h("h2", {}, `${searches.length} searches`, at < 0 ? "" : h("span", { class: "soft" }, `image ${at + 1}`)),
    h("ul", { class: "shelf" }, tiles),
    h("div", { class: "selection-acts" },
      h("button", { type: "button", class: "link", onclick: () => { page.explained = 0; go({ like: searches.slice(0, EXAMPLES), unlike: [], searches: [], text: "" }); } }, "Search with all together"),
      h("button", { type: "button", class: "link", "aria-label": "Close the searches", onclick: () => go({ searches: [] }) }, icon("close"))));
  $('[aria-pressed="true"]', box)?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

export function listenSearches() {
  $("#each").addEventListener("click", () => searchEach(page.state.like));
}
