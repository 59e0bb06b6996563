// One work at large.

import { $, h, icon } from "./dom.js";
import { withRange, withValue } from "./filters.js";
import { caption, inWords, picture, scoreBar, shape } from "./works.js";
import { activate, cardOf, catalog, known, large, page, partNames, searching, workOf } from "./store.js";
import { failed, go } from "./route.js";
import { refPicture } from "./side.js";
import { act, search } from "./acts.js";
import { cool } from "./explain.js";

function openWork() {
  return page.shown.works.find((work) => work.id === page.state.open) ?? known.get(page.state.open);
}

export function drawLarge() {
  if (page.state.open === null) {
    if (large.open) large.close();
    return;
  }
  const id = page.state.open;
  const work = openWork();
  if (!work) {
    workOf(id).then(() => page.state.open === id && drawLarge(), (error) => { failed(error); closeLarge(); });
    return;
  }
  if (large.open && large.dataset.id === id) return;
  large.dataset.id = id;
  cool();
  page.pinned = false;
  const { artist, title, year } = caption(work);
  const figure = $("#large-work");
  const image = picture(page.state.catalog, work, { eager: true });
  image.alt = inWords(work);
  figure.replaceChildren(h("div", { class: "frame" }, image, h("canvas", { class: "heat", "aria-hidden": "true" })));
  shape(figure, work);
  drawLargeQuery();
  const result = work.score !== undefined && searching();
  const button = (label, name, act, strong) => h("button", { type: "button", class: `tool${strong ? " strong" : ""}`, "data-act": act }, icon(name), h("span", {}, label));
  $("#large-side").replaceChildren(
    work.verdict === "same work" && result ? h("span", { class: "badge" }, "Same work") : "",
    h("h2", { id: "large-title" }, title), h("p", { class: "by" }, [artist, year].filter(Boolean).join(", ")),
    result ? scoreBar(work, partNames()) : "",
    h("p", { class: "legend large-legend", "aria-live": "polite" }),
    h("div", { class: "large-acts" },
      button("More like this", "similar", "more", true),
      searching() ? button("Add to the search", "plus", "add") : "",
      searching() ? button("Not like this", "minus", "unlike") : "",
      searching() && catalog().explains ? button("Matching places", "heat", "heat") : ""),
    attributeList(work));
  const at = page.shown.works.findIndex((other) => other.id === id);
  $("#large-back").hidden = at <= 0;
  $("#large-next").hidden = at < 0 || at >= page.shown.works.length - 1;
  if (!large.open) large.showModal();
  $("#large-side").scrollTop = 0;
}

function drawLargeQuery() {
  const box = $("#large-query");
  box.hidden = !searching();
  if (!searching()) return box.replaceChildren();
  const image = refPicture(page.state.like[page.explained]);
  const frame = h("div", { class: "frame" }, image, h("canvas", { class: "heat", "aria-hidden": "true" }));
  box.replaceChildren(frame, h("figcaption", {}, "You search with"));
  image.addEventListener("load", () => shape(box, { width: image.naturalWidth, height: image.naturalHeight }));
}

function attributeList(work) {
  const filterable = new Map(catalog().attributes.map((a) => [a.name, a]));
  const rows = Object.entries(work.attributes).filter(([name, value]) => value !== null && value !== "" && !["title"].includes(name));
  const usual = ["artist", "year", "period", "style", "genre", "medium", "museum"];
  const order = ([name]) => usual.indexOf(name) + 1 || 99;
  const list = h("dl", { class: "attributes" });
  for (const [name, value] of rows.sort((a, b) => order(a) - order(b))) {
    const text = String(value);
    const attribute = filterable.get(name);
    const number = attribute?.kind === "number" && text.trim() !== "" && Number.isFinite(Number(text));
    const can = attribute && (number || (attribute.kind === "text" && attribute.distinct < catalog().items));
    const only = () => go({ where: number ? withRange(page.state.where, name, Number(text), Number(text)) : withValue(page.state.where, name, text, "is"), open: null });
    const not = () => go({ where: withValue(page.state.where, name, text, "not"), open: null });
    list.append(h("dt", {}, name.replace(/_/g, " ")), h("dd", {},
      can ? h("button", { type: "button", class: "link value", title: "Show only these", onclick: only }, text) : h("span", {}, text),
      can && !number ? h("button", { type: "button", class: "link not", title: "Show none of these", "aria-label": `No ${text}`, onclick: not }, "not") : null));
  }
  return list;
}

export function closeLarge() {
  cool();
  page.pinned = false;
  const id = page.state.open;
  page.state = { ...page.state, open: null };
  if (large.open) large.close();
  if (history.state?.opened) history.back();
  else go({}, { replace: true });
  const card = cardOf(id);
  if (card) activate(card);
}

export function step(by) {
  const at = page.shown.works.findIndex((work) => work.id === page.state.open);
  const next = page.shown.works[at + by];
  if (at < 0 || !next) return;
  go({ open: next.id }, { replace: true });
}

export function listenLarge() {
  large.addEventListener("cancel", (event) => { event.preventDefault(); closeLarge(); });
  large.addEventListener("close", () => page.state.open !== null && closeLarge());
  $("#large-close").addEventListener("click", closeLarge);
  $("#large-back").addEventListener("click", () => step(-1));
  $("#large-next").addEventListener("click", () => step(1));
  large.addEventListener("click", (event) => {
    if (event.target === large || event.target.classList.contains("large-stage")) return closeLarge();
    const name = event.target.closest("[data-act]")?.dataset.act;
    if (name === "add") search({ id: page.state.open }, { add: true });
    else if (name) act(name, page.state.open, event);
  });
}
