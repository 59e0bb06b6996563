// One work at large.

import { $, h, icon } from "./dom.js";
import { withRange, withValue } from "./filters.js";
import { paths } from "./api.js";
import { badgeOf, caption, fit, inWords, picture, scoreBar } from "./works.js";
import { activate, cardOf, catalog, known, large, page, partNames, searching, workOf } from "./store.js";
import { writeAddress } from "./address.js";
import { failed, go } from "./route.js";
import { refFrame } from "./side.js";
import { zoomable } from "./zoom.js";
import { drawMarks } from "./kept.js";
import { drawOutlines, drawPoints, places, verified } from "./outlines.js";
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
  const image = picture(page.state.catalog, work, { eager: true });
  image.alt = inWords(work);
  const frame = h("div", { class: "frame whole" }, image, h("canvas", { class: "heat", "aria-hidden": "true" }));
  fit(frame, work.width, work.height);
  const sharpen = () => sharper(image, paths.whole(page.state.catalog, work.id));
  zooms = { work: pane($("#large-work"), frame, searching() ? inWords(work) : "", sharpen) };
  drawLargeQuery();
  const result = work.score !== undefined && searching();
  const button = (label, name, act, strong) => h("button", { type: "button", class: `tool${strong ? " strong" : ""}`, "data-act": act }, icon(name), h("span", {}, label));
  $("#large-side").replaceChildren(
    (result && badgeOf(work)) ?? "",
    h("h2", { id: "large-title" }, title), h("p", { class: "by" }, [artist, year].filter(Boolean).join(", ")),
    result ? scoreBar(work, partNames()) : "",
    h("p", { class: "legend large-legend", "aria-live": "polite" }),
    h("div", { class: "large-acts" },
      button("More like this", "similar", "more", true),
      searching() ? button("Add to the search", "plus", "add") : "",
      searching() ? button("Not like this", "minus", "unlike") : "",
      searching() && catalog().explains ? button("Matching places", "heat", "heat") : "",
      result && work.points && page.state.like.length === 1 ? h("button", { type: "button", class: "tool", id: "points", "aria-pressed": "false", onclick: togglePoints }, icon("points"), h("span", {}, `${work.inliers} matched points`)) : "",
      button("Keep", "keep", "keep")),
    attributeList(work));
  drawMarks();
  drawZoom();
  const at = page.shown.works.findIndex((other) => other.id === id);
  $("#large-back").hidden = at <= 0;
  $("#large-next").hidden = at < 0 || at >= page.shown.works.length - 1;
  if (!large.open) large.showModal();
  $("#large-side").scrollTop = 0;
}

// A picture in the stage that can be looked at closely, with a line below.
function pane(figure, frame, text, sharpen) {
  const box = h("div", { class: "zoomed" }, frame);
  figure.replaceChildren(box, text ? h("figcaption", {}, text) : "");
  return zoomable(box, { sharpen, changed: () => drawZoom() });
}

async function sharper(image, address) {
  const sharp = new Image();
  sharp.src = address;
  try {
    await sharp.decode();
    if (sharp.naturalWidth > image.naturalWidth) image.src = address;
  } catch {
    // What there is stays.
  }
}

let zooms = {}; // of the panes

function drawZoom() {
  const scale = Math.max(1, ...Object.values(zooms).map((zoom) => zoom.scale()));
  $("#zoom-value").textContent = `${Math.round(100 * scale)} %`;
  $("#zoom-out").disabled = scale === 1;
}

export function zoom(factor) {
  for (const one of Object.values(zooms)) if (factor) one.by(factor); else one.reset();
}

const BESIDE = "simsearch beside";
let beside = remembered();

function remembered() {
  try {
    return localStorage.getItem(BESIDE) !== "no";
  } catch {
    return true;
  }
}

// Query and work side by side at one size, or the work large and the query small.
export function toggleBeside() {
  beside = !beside;
  try {
    localStorage.setItem(BESIDE, beside ? "yes" : "no");
  } catch {
    // It lasts as long as the page.
  }
  drawBeside();
  zoom(null);
}

function drawBeside() {
  large.classList.toggle("beside", searching() && beside);
  $("#beside").hidden = !searching();
  $("#beside").setAttribute("aria-pressed", String(beside));
}

function drawLargeQuery() {
  const box = $("#large-query");
  box.hidden = !searching();
  drawBeside();
  if (!searching()) return box.replaceChildren();
  const ref = page.state.like[page.explained];
  const frame = refFrame(ref);
  const found = verified();
  const here = found.filter(({ work }) => work.id === page.state.open);
  drawOutlines(frame, here.length ? [...here, ...places(found).filter(({ work }) => work.id !== page.state.open)] : [], page.state.open);
  zooms.query = pane(box, frame, ref.region ? "You search with this part" : "You search with", "id" in ref ? (image) => sharper(image, paths.whole(page.state.catalog, ref.id)) : undefined);
}

// The points of query and work that agree, over both, or no longer.
export function togglePoints() {
  const button = $("#points");
  if (!button) return;
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(on));
  drawPoints($("#large-query .frame"), $("#large-work .frame"), on ? openWork().points : [], page.state.like[0].region);
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
  if (history.state?.opened === writeAddress(page.state)) history.back(); // else what was there before would come back
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
  $("#zoom-in").addEventListener("click", () => zoom(1.5));
  $("#zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  $("#zoom-value").addEventListener("click", () => zoom(null));
  $("#beside").addEventListener("click", toggleBeside);
  large.addEventListener("click", (event) => {
    const pane = Object.values(zooms).find((one) => one.box === event.target); // beside its picture
    if (pane ? !pane.dragged() : event.target === large || event.target.matches(".large-stage, .large-stage figure")) return closeLarge();
    const name = event.target.closest("[data-act]")?.dataset.act;
    if (name === "add") search({ id: page.state.open }, { add: true });
    else if (name) act(name, page.state.open, event);
  });
}
