// The bar on top: words, collections, filters.

import { $, debounce, h, icon, still } from "./dom.js";
import { START } from "./address.js";
import { facets, withRange, withValue } from "./filters.js";
import { activate, cards, catalog, edition, help, known, MOST, page, searching, STEP } from "./store.js";
import { go, render } from "./route.js";
import { cool } from "./explain.js";

let refreshFacets = () => {};
let facetsOf = null; // which edition of a catalog they are of, once they were opened

export function drawBar() {
  const pick = $("#catalog");
  pick.value = page.state.catalog;
  if (document.activeElement !== $("#text")) $("#text").value = page.state.text;
  const filters = page.state.where.reduce((n, c) => n + (c.values?.length ?? 1), 0);
  $("#filter-count").hidden = !filters;
  $("#filter-count").textContent = filters;
  $("#start").hidden = searching() || Boolean(page.state.text) || filters > 0;
  $("#filter-clear").hidden = !filters;
  document.body.classList.toggle("searching", searching());
  document.title = searching() ? "Similar works · simsearch" : page.state.text ? `${page.state.text} · simsearch` : "simsearch";
}

export function drawChips() {
  const chip = (text, without) =>
    h("span", { class: "chip on" }, text, h("button", { type: "button", "aria-label": `Remove the filter ${text}`, onclick: () => go({ where: without }) }, icon("close")));
  const chips = page.state.where.flatMap((c) =>
    c.values
      ? c.values.map((v) => chip(`${c.negate ? "not " : ""}${v}`, withValue(page.state.where, c.attribute, v, "")))
      : [chip(`${c.attribute} ${c.low || "…"}–${c.high || "…"}`, withRange(page.state.where, c.attribute, "", ""))]);
  $("#chips").replaceChildren(...chips);
}

export const drawFacets = () => (facetsOf && facetsOf !== edition() ? makeFacets() : refreshFacets());

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

export const find = debounce(() => {
  const text = $("#text").value.trim();
  if (text !== page.state.text) go({ text, like: [], unlike: [], open: null }, { replace: Boolean(page.state.text) && Boolean(text) });
}, 250);

function home() {
  if (!searching() && !page.state.text && !page.state.where.length) return scrollTo({ top: 0, behavior: still() ? "auto" : "smooth" });
  $("#text").value = "";
  go({ like: [], unlike: [], text: "", where: [], open: null });
}

export function listenBar() {
  $("#home").addEventListener("click", home);
  $("#surprise").addEventListener("click", () => {
    $("#text").value = "";
    go({ seed: 1 + Math.floor(Math.random() * 1e6), like: [], unlike: [], text: "", open: null });
  });
  $("#filter-open").addEventListener("click", () => toggleFilters($("#filters").hidden));
  $("#filter-close").addEventListener("click", () => toggleFilters(false));
  $("#filter-clear").addEventListener("click", () => go({ where: [] }));
  $("#help-open").addEventListener("click", () => help.showModal());
  $("#hover").addEventListener("change", () => { page.pinned = false; cool(); });
  $("#more-button").addEventListener("click", () => { page.k = Math.min(MOST, page.k + STEP); render(); });
  $("#text").addEventListener("input", find);
  $("#text").addEventListener("keydown", (event) => { if (event.key === "ArrowDown" && cards().length) { event.preventDefault(); activate(cards()[0]); } });
  $("#catalog").addEventListener("change", (event) => {
    const uploads = (list) => list.filter((ref) => "upload" in ref);
    known.clear();
    go({ ...START, catalog: event.target.value, like: uploads(page.state.like), unlike: uploads(page.state.unlike) });
  });
}
