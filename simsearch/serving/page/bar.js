// The bar on top: words, collections, filters.

import { $, debounce, h, icon, still } from "./dom.js";
import { START } from "./address.js";
import { facets, inWords } from "./filters.js";
import { activate, cards, catalog, edition, help, page, searching } from "./store.js";
import { go } from "./route.js";
import { cool } from "./explain.js";
import { more } from "./results.js";

let refreshFacets = () => {};
let facetsOf = null; // which edition of a catalog they are of, once they were opened
let facetsWhere = null; // the conditions that they show

export function drawBar() {
  const pick = $("#catalog");
  pick.value = page.state.catalog;
  if (document.activeElement !== $("#text")) $("#text").value = page.state.text;
  const filters = page.state.where.reduce((n, c) => n + (c.values?.length ?? 1), 0);
  $("#filter-count").hidden = !filters;
  $("#filter-count").textContent = filters;
  $("#start").hidden = searching() || Boolean(page.state.text) || filters > 0 || page.state.selection.length > 0;
  $("#filter-clear").hidden = !filters;
  document.body.classList.toggle("searching", searching());
  document.title = searching() ? "Similar works · simsearch" : page.state.text ? `${page.state.text} · simsearch` : "simsearch";
}

export function drawChips() {
  const chip = ([text, without]) =>
    h("span", { class: "chip on" }, text, h("button", { type: "button", "aria-label": `Remove the filter ${text}`, onclick: () => go({ where: without }) }, icon("close")));
  $("#chips").replaceChildren(...inWords(page.state.where).map(chip));
}

export function drawFacets() {
  if (facetsOf && facetsOf !== edition()) makeFacets();
  else if (facetsWhere !== page.state.where) refreshFacets();
  facetsWhere = page.state.where;
}

export function toggleFilters(open) {
  const drawer = $("#filters");
  drawer.hidden = !open;
  $("#filter-open").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("filtering", open);
  if (open) {
    makeFacets();
    $("summary", drawer)?.focus({ preventScroll: true });
  } else $("#filter-open").focus({ preventScroll: true });
}

function makeFacets() {
  facetsOf = edition();
  refreshFacets = facets($("#facets"), catalog(), () => page.state.where, (where) => go({ where }));
  refreshFacets();
}

// A search that begins within the moment after typing wins.
const find = debounce(({ like, unlike }) => {
  if (like !== page.state.like || unlike !== page.state.unlike) return;
  const text = $("#text").value.trim();
  if (text !== page.state.text) go({ text, like: [], unlike: [], selection: [], open: null }, { replace: Boolean(page.state.text) && Boolean(text) });
}, 250);

function home() {
  if (!searching() && !page.state.text && !page.state.where.length && !page.state.selection.length && !page.state.searches.length) return scrollTo({ top: 0, behavior: still() ? "auto" : "smooth" });
  $("#text").value = "";
  go({ like: [], unlike: [], searches: [], selection: [], text: "", where: [], open: null });
}

export function listenBar() {
  $("#home").addEventListener("click", home);
  $("#surprise").addEventListener("click", () => {
    $("#text").value = "";
    go({ seed: 1 + Math.floor(Math.random() * 1e6), like: [], unlike: [], selection: [], text: "", open: null });
  });
  $("#filter-open").addEventListener("click", () => toggleFilters($("#filters").hidden));
  $("#filter-close").addEventListener("click", () => toggleFilters(false));
  $("#filter-clear").addEventListener("click", () => go({ where: [] }));
  $("#help-open").addEventListener("click", () => help.showModal());
  $("#hover").addEventListener("change", () => { page.pinned = false; cool(); });
  $("#more-button").addEventListener("click", more);
  $("#text").addEventListener("input", () => find(page.state));
  $("#text").addEventListener("keydown", (event) => { if (event.key === "ArrowDown" && cards().length) { event.preventDefault(); activate(cards()[0]); } });
  $("#catalog").addEventListener("change", (event) => {
    const uploads = (list) => list.filter((ref) => "upload" in ref);
    const { like, unlike, searches } = page.state;
    go({ ...START, catalog: event.target.value, like: uploads(like), unlike: uploads(unlike), searches: uploads(searches) });
  });
}
