// The page: what its address says is what it shows. Every change goes through `go`, which writes the address and
// draws again; only the latest request's answer is drawn.

import { $, debounce, h, icon, still } from "./dom.js";
import { addUpload, LostUploads, paths, post, readCatalogs, renewing, request, sent, upload } from "./api.js";
import { formatWhere, readAddress, sayable, START, writeAddress } from "./address.js";
import { facets, withRange, withValue } from "./filters.js";
import { draw } from "./heat.js";
import { caption, inWords, neighbour, picture, resultCard, scoreBar, shape, skeleton, wallCard } from "./works.js";

const PAGE = 60; // works of the wall that are fetched together
const STEP = 24; // results, and how many more at a time
const MOST = 120;
const EXAMPLES = 16; // images that a search may have of each kind
const KEPT = 30; // answers kept for the way back
const INTENT = 350; // milliseconds of rest on a work before its heat map is asked for
const ITEM = "application/x-simsearch-item";

let state = { ...START };
let catalogs = [];
let shown = { key: null, works: [], total: 0, done: true }; // what stands in #works
let k = STEP;
let anyway = false; // show the nearest although none is similar
let explained = 0; // which of the like images stands large and is explained
let wish = null; // the id whose heat map is on
let refreshFacets = () => {};
const answers = new Map();
const heats = new Map();
const known = new Map(); // id -> work, of this catalog
const scrolls = new Map();

const works = $("#works");
const large = $("#large");
const help = $("#help");
const catalog = () => catalogs.find((c) => c.name === state.catalog) ?? catalogs[0];
const partNames = () => Object.keys(catalog().parts ?? {});
const searching = () => state.like.length > 0;
const sameRef = (a) => (b) => (a.id ?? a.upload) === (b.id ?? b.upload);

// ---- messages

function say(text) {
  $("#status").textContent = text;
}

function tell(message) {
  const note = h("div", { class: "note" }, h("span", {}, message),
    h("button", { type: "button", class: "tool round", "aria-label": "Dismiss", onclick: () => note.remove() }, icon("close")));
  for (const other of [...$("#notes").children]) if (other.firstChild.textContent === message) other.remove();
  $("#notes").append(note);
  setTimeout(() => note.remove(), 9000);
}

function failed(error) {
  if (error.name === "AbortError") return;
  if (error instanceof LostUploads) {
    const keep = (list) => list.filter((ref) => !error.names.includes(ref.upload));
    go({ like: keep(state.like), unlike: keep(state.unlike) }, { replace: true });
  }
  tell(error.message);
}

const busy = (seconds) => say(`The server is busy. Trying again in ${seconds} s.`);

// ---- the address

function go(changes, { replace = false } = {}) {
  const before = location.hash;
  state = { ...state, ...changes };
  const address = writeAddress(state);
  scrolls.set(before, scrollY);
  if (address !== before && replace) history.replaceState(history.state, "", address);
  else if (address !== before) history.pushState(null, "", address);
  render();
}

function arrive() {
  const asked = readAddress(location.hash);
  const name = catalogs.some((c) => c.name === asked.catalog) ? asked.catalog : catalogs[0].name;
  const parts = catalogs.find((c) => c.name === name).parts;
  const fits = asked.weights && Object.keys(asked.weights).every((part) => part in parts);
  state = { ...asked, catalog: name, weights: fits ? asked.weights : null };
  render(scrolls.get(location.hash) ?? 0);
}

// ---- what is asked

let running = null;

function latest() {
  running?.abort();
  running = new AbortController();
  return running.signal;
}

function question() {
  const { catalog, like, unlike, weights, where, text, seed, diversity, collapse, hubness } = state;
  if (!like.length) return JSON.stringify(["wall", catalog, where, text, text ? 0 : seed]);
  return JSON.stringify(["search", catalog, like, unlike, weights, where, diversity, collapse, hubness, k]);
}

function remember(key, answer) {
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  for (const work of answer.works) known.set(work.id, work);
}

async function ask(key, signal) {
  const where = formatWhere(state.where);
  const options = { signal, busy };
  if (!searching()) {
    const answer = await request(paths.items(state.catalog, wallQuery(where, 0)), options);
    return { key, kind: "wall", works: answer.items, total: answer.total, done: answer.items.length < PAGE || answer.items.length >= answer.total };
  }
  const refs = [...state.like, ...state.unlike];
  const body = () => ({
    like: state.like.map(sent), unlike: state.unlike.map(sent), weights: state.weights, where, k,
    diversity: state.diversity, collapse: state.collapse, hubness: state.hubness,
  });
  const answer = await renewing(refs, () => post(paths.search(state.catalog), body(), options), { signal });
  return {
    key, kind: "search", works: answer.results, verdict: answer.verdict, total: answer.total_candidates,
    took: answer.milliseconds, done: answer.results.length < k || k >= MOST,
  };
}

const wallQuery = (where, offset) => {
  const query = { offset, limit: PAGE };
  if (where) query.where = where;
  if (state.text) query.text = state.text;
  else query.seed = state.seed;
  return query;
};

// ---- drawing

function render(scroll = null) {
  drawBar();
  drawChips();
  drawSide();
  refreshFacets();
  drawLarge();
  show(scroll);
}

async function show(scroll) {
  const key = question();
  if (key === shown.key) return;
  const fresh = !sameQuestion(key, shown.key);
  const cached = answers.get(key);
  const signal = latest();
  if (cached) {
    remember(key, cached);
    drawAnswer(cached, fresh);
    scrollTo(0, scroll ?? (fresh ? 0 : scrollY));
    return;
  }
  document.body.classList.add("busy");
  works.setAttribute("aria-busy", "true");
  if (fresh) {
    anyway = false;
    shown = { key: null, works: [], total: 0, done: true };
    drawSkeletons();
    if (scroll === null) scrollTo(0, 0);
  }
  try {
    const answer = await ask(key, signal);
    remember(key, answer);
    drawAnswer(answer, fresh);
    if (scroll) scrollTo(0, scroll);
  } catch (error) {
    if (error.name === "AbortError") return;
    shown = { key, works: [], total: 0, done: true };
    works.replaceChildren();
    say("");
    failed(error);
  }
  if (signal === running?.signal) {
    document.body.classList.remove("busy");
    works.removeAttribute("aria-busy");
  }
}

// The same images, only weighed, filtered or ordered anew: the answers move instead of being replaced.
function sameQuestion(a, b) {
  if (!a || !b) return false;
  const [x, y] = [JSON.parse(a), JSON.parse(b)];
  return x[0] === y[0] && x[1] === y[1] && (x[0] === "wall" || JSON.stringify(x[2]) === JSON.stringify(y[2]));
}

function drawSkeletons() {
  $("#none").hidden = true;
  $("#more-button").hidden = true;
  works.className = searching() ? "works results" : "works";
  works.replaceChildren(...[1.3, 0.8, 1, 1.5, 0.75, 1.2, 0.9, 1.4, 1, 0.7, 1.25, 1.1].map(skeleton));
  say(searching() ? "Looking…" : "Fetching works…");
}

function drawAnswer(answer, fresh) {
  document.body.classList.remove("busy");
  works.removeAttribute("aria-busy");
  const focused = works.contains(document.activeElement);
  shown = answer;
  wish = null;
  large.dataset.id = ""; // its neighbours and its score are others now
  const none = answer.kind === "search" && answer.verdict === "none" && answer.works.length && !anyway;
  drawNone(answer, none);
  works.className = answer.kind === "search" ? "works results" : "works";
  if (none) { cool(); works.replaceChildren(); }
  else if (answer.kind === "wall") works.replaceChildren(...answer.works.map((work) => wallCard(state.catalog, work)));
  else place(answer, fresh);
  activate($(".work", works), focused);
  drawMore(none);
  say(none ? "" : summary(answer));
  drawFacts(answer);
  drawLarge();
}

function drawMore(none) {
  const searched = shown.kind === "search";
  $("#more-button").hidden = Boolean(none) || shown.done || !shown.works.length || !searched;
}

function count(n, word) {
  return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
}

function summary(answer) {
  if (answer.kind === "wall") {
    if (!answer.works.length) return "";
    return state.text ? `${count(answer.total, "work")} with “${state.text}”` : count(answer.total, "work");
  }
  if (!answer.works.length) return "";
  const same = answer.works.filter((work) => work.verdict === "same work").length;
  return `The ${answer.works.length} nearest of ${count(answer.total, "work")}` + (same ? `; ${same === 1 ? "one is" : `${same} are`} the same work` : "");
}

function drawFacts(answer) {
  const has = catalog();
  const lines = [count(has.items, "work"), `${has.bytes_per_item} bytes each`];
  if (answer.took) lines.push(`encoded in ${answer.took.encode.toFixed(0)} ms, searched in ${answer.took.search.toFixed(1)} ms`);
  lines.push(has.calibration ? `“similar” is wrong for at most ${+(100 * has.calibration.rate).toFixed(2)} % of strangers` : "not calibrated: nothing is called similar or the same");
  $("#facts").textContent = lines.join(" · ");
}

function drawNone(answer, none) {
  const box = $("#none");
  box.hidden = !none && answer.works.length > 0;
  if (none) {
    box.replaceChildren(h("h2", {}, "No similar work in this collection"),
      h("p", {}, "Images from outside come as near to this collection as yours does."),
      h("button", { type: "button", class: "tool", id: "anyway", onclick: () => { anyway = true; drawAnswer(shown, true); works.focus({ preventScroll: true }); } }, "Show the nearest anyway"));
  } else if (!answer.works.length) {
    const why = state.where.length ? "Nothing passes these filters" : state.text ? `Nothing is called “${state.text}”` : "Nothing to show";
    box.replaceChildren(h("h2", {}, why), state.where.length
      ? h("button", { type: "button", class: "tool", onclick: () => go({ where: [] }) }, "Clear the filters")
      : h("p", {}, "Try other words."));
  }
}

// Results take the places that their order says; those that stay glide there.
function place(answer, fresh) {
  const before = new Map();
  if (!fresh && !still()) for (const card of works.children) if (card.dataset.id) before.set(card.dataset.id, card.getBoundingClientRect());
  const cards = answer.works.map((work) => {
    const card = resultCard(state.catalog, work, partNames(), catalog().explains);
    const old = works.querySelector(`[data-id="${work.id}"] img`);
    if (old) $("img", card).replaceWith(old); // loaded already
    return card;
  });
  works.replaceChildren(...cards);
  for (const card of cards) {
    const was = before.get(card.dataset.id);
    if (!was) continue;
    const now = card.getBoundingClientRect();
    const [x, y] = [was.left - now.left, was.top - now.top];
    if ((x || y) && Math.abs(y) < innerHeight) card.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], { duration: 260, easing: "ease-out" });
  }
}

function drawBar() {
  const pick = $("#catalog");
  pick.value = state.catalog;
  if (document.activeElement !== $("#text")) $("#text").value = state.text;
  const filters = state.where.reduce((n, c) => n + (c.values?.length ?? 1), 0);
  $("#filter-count").hidden = !filters;
  $("#filter-count").textContent = filters;
  $("#start").hidden = searching() || Boolean(state.text) || filters > 0;
  $("#filter-clear").hidden = !filters;
  document.body.classList.toggle("searching", searching());
  document.title = searching() ? "Similar works · simsearch" : state.text ? `${state.text} · simsearch` : "simsearch";
}

function drawChips() {
  const chip = (text, without) =>
    h("span", { class: "chip on" }, text, h("button", { type: "button", "aria-label": `Remove the filter ${text}`, onclick: () => go({ where: without }) }, icon("close")));
  const chips = state.where.flatMap((c) =>
    c.values
      ? c.values.map((v) => chip(`${c.negate ? "not " : ""}${v === "*" ? `known ${c.attribute}` : v}`, withValue(state.where, c.attribute, v, "")))
      : [chip(`${c.attribute} ${c.low || "…"}–${c.high || "…"}`, withRange(state.where, c.attribute, "", ""))]);
  $("#chips").replaceChildren(...chips);
}

// ---- the side: what is searched with, and how

const workOf = async (id) => {
  if (!known.has(id)) known.set(id, await request(paths.item(state.catalog, id)));
  return known.get(id);
};

function refPicture(ref) {
  if ("id" in ref) {
    const image = picture(state.catalog, { id: ref.id }, { eager: true });
    workOf(ref.id).then((work) => { image.alt = inWords(work); }, failed);
    return image;
  }
  const { url, token } = upload(ref.upload);
  const image = h("img", { src: url, alt: "Your image", decoding: "async" });
  image.addEventListener("error", () => { image.src = paths.upload(token); }, { once: true }); // what the browser cannot show, the server can
  return image;
}

let sideKey = "";

function drawSide() {
  $("#side").hidden = !searching();
  explained = Math.min(explained, Math.max(0, state.like.length - 1));
  const key = JSON.stringify([state.catalog, state.like, state.unlike, explained]);
  if (searching() && key !== sideKey) {
    drawPrimary();
    drawShelf($("#like"), state.like, "like");
    drawShelf($("#unlike"), state.unlike, "unlike");
    $("#unlike-title").hidden = $("#unlike").hidden = !state.unlike.length;
    $("#like-title").textContent = state.like.length > 1 ? "Works like all of these" : "Works like";
  }
  sideKey = key;
  drawTuning();
}

function drawPrimary() {
  const figure = $("#primary");
  const ref = state.like[explained];
  const image = refPicture(ref);
  const text = h("figcaption");
  const frame = h("div", { class: "frame" }, image, h("canvas", { class: "heat", "aria-hidden": "true" }), state.like.length === 1 && remover(ref, "like"));
  figure.replaceChildren(frame, text);
  if ("id" in ref) {
    workOf(ref.id).then((work) => {
      if (state.like[explained] !== ref) return;
      shape(frame, work);
      const { artist, title, year } = caption(work);
      text.replaceChildren(h("strong", {}, artist || title), h("span", {}, artist ? [title, year].filter(Boolean).join(", ") : year));
    }, () => {});
  } else {
    const { width, height, file } = upload(ref.upload);
    if (width) shape(frame, { width, height });
    image.addEventListener("load", () => shape(frame, { width: image.naturalWidth, height: image.naturalHeight }));
    text.replaceChildren(h("strong", {}, "Your image"), h("span", {}, file?.name ?? ""));
  }
}

function remover(ref, list) {
  const without = () => go({ [list]: state[list].filter((other) => !sameRef(ref)(other)) });
  return h("button", { type: "button", class: "act remove", title: "Remove", "aria-label": list === "like" ? "Remove this image from the search" : "Remove this from what to avoid", onclick: without }, icon("close"));
}

function drawShelf(place, refs, list) {
  const tiles = refs.map((ref, i) => {
    const choose = () => { explained = i; drawSide(); };
    const pressed = list === "like" ? String(i === explained) : null;
    return h("li", {}, h("button", { type: "button", class: "tile", "aria-pressed": pressed, "aria-label": list === "like" ? `Show image ${i + 1} large` : `Image ${i + 1} to avoid`, onclick: list === "like" ? choose : null }, refPicture(ref)), remover(ref, list));
  });
  const add = h("li", {}, h("button", { type: "button", class: "tile add", "data-add": list, title: "Add an image", "aria-label": "Add an image to the search", onclick: () => chooseFile(list) }, icon("plus")));
  place.replaceChildren(...(list === "like" && tiles.length === 1 ? [] : tiles), ...(list === "like" ? [add] : []));
}

const tuned = debounce((changes) => go(changes, { replace: true }), 120);

function shares() {
  const base = state.weights ?? catalog().parts;
  const total = Object.values(base).reduce((sum, value) => sum + value, 0) || 1;
  return Object.fromEntries(partNames().map((name) => [name, (base[name] ?? 0) / total]));
}

let weightsOf = null;

const fill = (input) => input.style.setProperty("--fill", `${input.value}%`);

function drawTuning() {
  const names = partNames();
  $("#weights-box").hidden = names.length < 2;
  $("#hover-box").hidden = !catalog().explains;
  if (weightsOf !== state.catalog) {
    weightsOf = state.catalog;
    $("#weights").replaceChildren(...names.map((name, i) =>
      h("div", { class: "slider" },
        h("label", { for: `weight-${name}` }, h("i", { class: `part-${i % 4}`, "aria-hidden": "true" }), name),
        h("output", { for: `weight-${name}` }),
        h("input", { type: "range", id: `weight-${name}`, class: `part-${i % 4}`, "data-part": name, min: 0, max: 100, step: 1, oninput: weigh }))));
  }
  const values = shares();
  for (const input of document.querySelectorAll("#weights input")) {
    const value = values[input.dataset.part];
    if (document.activeElement !== input || state.weights === null) input.value = Math.round(100 * value);
    input.previousElementSibling.textContent = `${Math.round(100 * value)} %`;
    fill(input);
  }
  $("#weights-reset").hidden = state.weights === null;
  if (document.activeElement !== $("#diversity")) $("#diversity").value = 100 * state.diversity;
  $("#diversity-value").textContent = `${Math.round(100 * state.diversity)} %`;
  fill($("#diversity"));
  $("#collapse").checked = state.collapse;
  $("#hubness").checked = state.hubness;
}

function weigh() {
  const given = [...document.querySelectorAll("#weights input")].map((input) => [input.dataset.part, Number(input.value)]);
  const total = given.reduce((sum, [, value]) => sum + value, 0);
  if (!total) return say("At least one of them must count.");
  const weights = Object.fromEntries(given.map(([name, value]) => [name, Number((value / total).toFixed(3))]));
  for (const input of document.querySelectorAll("#weights input")) {
    fill(input);
    input.previousElementSibling.textContent = `${Math.round(100 * weights[input.dataset.part])} %`;
  }
  tuned({ weights });
}

// ---- acting on works

const find = debounce(() => {
  const text = $("#text").value.trim();
  if (text !== state.text) go({ text, like: [], unlike: [], open: null }, { replace: Boolean(state.text) && Boolean(text) });
}, 250);

function search(ref, { add = false, list = "like" } = {}) {
  k = STEP;
  find.cancel();
  if (list === "unlike") {
    if (!searching()) return tell("First choose a work to search with, then what it should not be like.");
    if (state.unlike.some(sameRef(ref))) return;
    if (state.unlike.length >= EXAMPLES) return tell(`A search takes at most ${EXAMPLES} images to avoid.`);
    return go({ unlike: [...state.unlike, ref], like: withoutLast(ref), open: null });
  }
  if (add && searching()) {
    if (state.like.some(sameRef(ref))) return;
    if (state.like.length >= EXAMPLES) return tell(`A search takes at most ${EXAMPLES} images.`);
    return go({ like: [...state.like, ref], unlike: state.unlike.filter((other) => !sameRef(ref)(other)), text: "", open: null });
  }
  explained = 0;
  go({ like: [ref], unlike: [], text: "", open: null });
}

// A work that is to be avoided is no longer searched with, unless nothing else is.
function withoutLast(ref) {
  const left = state.like.filter((other) => !sameRef(ref)(other));
  return left.length ? left : state.like;
}

async function take(files, to) {
  const images = [...files].filter((file) => !file.type || file.type.startsWith("image/")).slice(0, EXAMPLES);
  if (!images.length) return tell("That is not an image: give a JPEG, PNG or WebP file.");
  document.body.classList.add("busy");
  say(images.length === 1 ? "Reading your image…" : `Reading ${images.length} images…`);
  const refs = [];
  for (const file of images) {
    try {
      refs.push({ upload: await addUpload(file, { busy }) });
    } catch (error) {
      failed(error);
    }
  }
  document.body.classList.remove("busy");
  say(shown.works.length ? summary(shown) : "");
  if (!refs.length) return;
  k = STEP;
  if (to === "unlike" && searching()) return go({ unlike: [...state.unlike, ...refs].slice(-EXAMPLES) });
  const add = to === "like" && searching();
  if (!add) explained = 0;
  go(add ? { like: [...state.like, ...refs].slice(-EXAMPLES), text: "" } : { like: refs, unlike: [], text: "" });
}

let fileTo = "new";

function chooseFile(to) {
  fileTo = to;
  $("#file").value = "";
  $("#file").click();
}

function home() {
  if (!searching() && !state.text && !state.where.length) return scrollTo({ top: 0, behavior: still() ? "auto" : "smooth" });
  $("#text").value = "";
  go({ like: [], unlike: [], text: "", where: [], open: null });
}

function act(name, id, event) {
  if (name === "more") search({ id }, { add: event.shiftKey });
  else if (name === "unlike") search({ id }, { list: "unlike" });
  else if (name === "heat") toggleHeat(id);
  else if (name === "open") {
    history.pushState({ opened: true }, "", writeAddress({ ...state, open: id }));
    state = { ...state, open: id };
    drawLarge();
  }
}

// ---- moving through the works

const cards = () => [...works.querySelectorAll(".work:not(.skeleton)")];
const cardOf = (id) => works.querySelector(`.work[data-id="${id}"]`);

// One work at a time is in the order of the Tab key, with its buttons.
function activate(card, focus = true) {
  for (const button of works.querySelectorAll('button[tabindex="0"]')) button.tabIndex = -1;
  if (!card) return;
  for (const button of card.querySelectorAll("button")) button.tabIndex = 0;
  if (focus) $(".frame", card).focus();
}

// ---- heat maps

const resting = debounce((id) => explain(id), INTENT);

function heatKey(id) {
  return JSON.stringify([state.catalog, state.like[explained], id, state.weights]);
}

async function heatOf(id) {
  const key = heatKey(id);
  if (!heats.has(key)) {
    const ref = state.like[explained];
    const weights = state.weights;
    const call = () => post(paths.heatmap(state.catalog), { like: sent(ref), id, weights }, { busy });
    const answer = renewing([ref], call);
    heats.set(key, answer);
    answer.catch(() => heats.delete(key));
    if (heats.size > 200) heats.delete(heats.keys().next().value);
  }
  return heats.get(key);
}

const ratioOf = (image) => image.naturalWidth / image.naturalHeight || 1;

async function explain(id) {
  if (!catalog().explains || !searching()) return;
  wish = id;
  cardOf(id)?.classList.add("asking");
  let heat;
  try {
    heat = await heatOf(id);
  } catch (error) {
    failed(error);
    return;
  } finally {
    cardOf(id)?.classList.remove("asking");
  }
  if (wish !== id) return;
  const pairs = [[$("#primary"), heat.query], [cardOf(id), heat.item]];
  if (large.open) pairs.push([$("#large-query"), heat.query], [$("#large-work"), heat.item]);
  for (const [place, map] of pairs) {
    const canvas = place && $("canvas", place);
    if (!canvas) continue;
    draw(canvas, map, ratioOf($("img", place)));
    place.classList.add("hot");
  }
  const words = legend(heat);
  $("#legend").replaceChildren(...words);
  $("#legend").hidden = false;
  $(".large-legend")?.replaceChildren(...legend(heat));
}

function legend(heat) {
  const places = heat.score - heat.rest;
  const rest = Math.abs(heat.rest) >= 0.005 ? `; ${heat.rest.toFixed(2)} comes from parts without places` : "";
  return [h("span", { class: "scale", "aria-hidden": "true" }), `Bright places match more than dark ones. All together add ${places.toFixed(2)} to the score of ${heat.score.toFixed(2)}${rest}.`];
}

function cool() {
  wish = null;
  resting.cancel();
  for (const place of document.querySelectorAll(".hot")) place.classList.remove("hot");
  $("#legend").hidden = true;
  $(".large-legend")?.replaceChildren();
}

let pinned = false;

function toggleHeat(id) {
  if (!catalog().explains) return tell("The encoder of this collection cannot say which places match.");
  if (!searching()) return;
  const on = (large.open ? $("#large-work") : cardOf(id))?.classList.contains("hot");
  cool();
  pinned = !on;
  if (!on) explain(id);
}

// ---- large view

function openWork() {
  return shown.works.find((work) => work.id === state.open) ?? known.get(state.open);
}

function drawLarge() {
  if (state.open === null) {
    if (large.open) large.close();
    return;
  }
  const id = state.open;
  const work = openWork();
  if (!work) {
    workOf(id).then(() => state.open === id && drawLarge(), (error) => { failed(error); closeLarge(); });
    return;
  }
  if (large.open && large.dataset.id === String(id)) return;
  large.dataset.id = id;
  cool();
  pinned = false;
  const { artist, title, year } = caption(work);
  const figure = $("#large-work");
  const image = picture(state.catalog, work, { eager: true });
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
  const at = shown.works.findIndex((other) => other.id === id);
  $("#large-back").hidden = at <= 0;
  $("#large-next").hidden = at < 0 || at >= shown.works.length - 1;
  if (!large.open) large.showModal();
  $("#large-side").scrollTop = 0;
}

function drawLargeQuery() {
  const box = $("#large-query");
  box.hidden = !searching();
  if (!searching()) return box.replaceChildren();
  const image = refPicture(state.like[explained]);
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
    const number = attribute?.kind === "number" && /^-?\d+(\.\d+)?$/.test(text);
    const can = attribute && (number || (attribute.kind === "text" && attribute.distinct < catalog().items && sayable(text)));
    const only = () => go({ where: number ? withRange(state.where, name, text, text) : withValue(state.where, name, text, "is"), open: null });
    const not = () => go({ where: withValue(state.where, name, text, "not"), open: null });
    list.append(h("dt", {}, name.replace(/_/g, " ")), h("dd", {},
      can ? h("button", { type: "button", class: "link value", title: "Show only these", onclick: only }, text) : h("span", {}, text),
      can && !number ? h("button", { type: "button", class: "link not", title: "Show none of these", "aria-label": `No ${text}`, onclick: not }, "not") : null));
  }
  return list;
}

function closeLarge() {
  cool();
  pinned = false;
  const id = state.open;
  state = { ...state, open: null };
  if (large.open) large.close();
  if (history.state?.opened) history.back();
  else history.replaceState(null, "", writeAddress(state));
  const card = cardOf(id);
  if (card) activate(card);
}

function step(by) {
  const at = shown.works.findIndex((work) => work.id === state.open);
  const next = shown.works[at + by];
  if (at < 0 || !next) return;
  state = { ...state, open: next.id };
  history.replaceState(history.state, "", writeAddress(state));
  drawLarge();
}

// ---- more of the wall

let extending = false;

async function extend() {
  if (extending || shown.kind !== "wall" || shown.done) return;
  extending = true;
  const before = shown;
  try {
    const answer = await request(paths.items(state.catalog, wallQuery(formatWhere(state.where), before.works.length)), { busy });
    if (shown !== before) return;
    const have = new Set(before.works.map((work) => work.id));
    const fresh = answer.items.filter((work) => !have.has(work.id));
    before.works.push(...fresh);
    before.done = !answer.items.length || before.works.length >= answer.total;
    for (const work of fresh) known.set(work.id, work);
    works.append(...fresh.map((work) => wallCard(state.catalog, work)));
  } catch (error) {
    before.done = true;
    failed(error);
  } finally {
    extending = false;
    if (shown === before && near()) extend();
  }
}

const near = () => $("#more").getBoundingClientRect().top < innerHeight + 900;

// ---- listening

function listenWorks() {
  works.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-attribute]");
    const card = event.target.closest(".work");
    if (chip) {
      if (!sayable(chip.dataset.value)) return tell("This value cannot be filtered by: it holds ; or |.");
      return go({ where: withValue(state.where, chip.dataset.attribute, chip.dataset.value, "is") });
    }
    const button = event.target.closest("[data-act]");
    if (button && card) act(button.dataset.act, Number(card.dataset.id), event);
  });
  works.addEventListener("focusin", (event) => {
    const card = event.target.closest(".work");
    if (card && $(".frame", card)?.tabIndex !== 0) activate(card, false);
  });
  works.addEventListener("pointerover", (event) => {
    const card = event.target.closest(".result .hold")?.parentElement;
    if (!card || event.pointerType !== "mouse" || !$("#hover").checked || pinned) return;
    if (wish === Number(card.dataset.id)) return;
    cool();
    resting(Number(card.dataset.id));
  });
  works.addEventListener("pointerout", (event) => {
    if (pinned || !event.target.closest(".hold") || event.relatedTarget?.closest?.(".hold") === event.target.closest(".hold")) return;
    cool();
  });
  works.addEventListener("dragstart", (event) => {
    const card = event.target.closest(".work");
    if (card) event.dataTransfer.setData(ITEM, card.dataset.id);
  });
  works.addEventListener("keydown", (event) => {
    const card = event.target.closest(".work");
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const id = Number(card.dataset.id);
    if (/^(Arrow|Home$|End$)/.test(event.key)) {
      const next = neighbour(cards(), card, event.key);
      if (next) activate(next);
      event.preventDefault();
    } else if (event.key === "Enter" && event.target.closest(".frame")) {
      event.preventDefault();
      act("more", id, event);
    }
  });
}

function listenKeys() {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=range], [type=checkbox]), select, textarea");
    if (event.key === "Escape" && !event.defaultPrevented) {
      if (large.open || help.open) return; // dialogs close themselves
      if (!$("#filters").hidden) return toggleFilters(false);
      if ($("#tuning").classList.contains("open")) return toggleTuning(false);
      if (wish !== null) { pinned = false; return cool(); }
      if (typing) event.target.blur();
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const id = large.open ? state.open : Number(document.activeElement?.closest(".work")?.dataset.id ?? $(".work:hover")?.dataset.id ?? NaN);
    const key = event.key.toLowerCase();
    const arrow = event.key.startsWith("Arrow");
    if (large.open && (event.key === "ArrowLeft" || event.key === "ArrowRight")) step(event.key === "ArrowLeft" ? -1 : 1);
    else if (large.open && event.key === "Enter" && !event.target.closest("button")) act("more", id, event);
    else if (key === "h" && !Number.isNaN(id)) toggleHeat(id);
    else if (key === "n" && !Number.isNaN(id)) search({ id }, { list: "unlike" });
    else if (large.open) return;
    else if (event.key === "/") $("#text").focus();
    else if (event.key === "?") help.showModal();
    else if (arrow && event.target === document.body && cards().length) activate(cards().find((card) => card.getBoundingClientRect().bottom > 60) ?? cards()[0]);
    else return;
    event.preventDefault();
  });
}

function listenLarge() {
  large.addEventListener("cancel", (event) => { event.preventDefault(); closeLarge(); });
  large.addEventListener("close", () => state.open !== null && closeLarge());
  $("#large-close").addEventListener("click", closeLarge);
  $("#large-back").addEventListener("click", () => step(-1));
  $("#large-next").addEventListener("click", () => step(1));
  large.addEventListener("click", (event) => {
    if (event.target === large || event.target.classList.contains("large-stage")) return closeLarge();
    const name = event.target.closest("[data-act]")?.dataset.act;
    if (name === "add") search({ id: state.open }, { add: true });
    else if (name) act(name, state.open, event);
  });
}

function listenFiles() {
  const drop = $("#drop");
  let depth = 0;
  const ours = (event) => event.dataTransfer?.types.includes(ITEM) || event.dataTransfer?.types.includes("Files") || event.dataTransfer?.types.includes("text/uri-list");
  const hide = () => { depth = 0; drop.hidden = true; };
  addEventListener("dragenter", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    depth++;
    drop.classList.toggle("one", !searching());
    drop.hidden = false;
  });
  addEventListener("dragleave", (event) => { if (ours(event) && --depth <= 0) hide(); });
  addEventListener("dragend", hide);
  addEventListener("dragover", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    const over = event.target.closest?.("[data-to]");
    for (const zone of drop.children) zone.classList.toggle("over", zone === over);
  });
  addEventListener("drop", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    const to = event.target.closest?.("[data-to]")?.dataset.to ?? "new";
    hide();
    const data = event.dataTransfer;
    const item = data.getData(ITEM);
    if (item) return search({ id: Number(item) }, { add: to === "like", list: to === "unlike" ? "unlike" : "like" });
    if (data.files.length) return take(data.files, to);
    tell("Only the address of that image came along. Copy the image and paste it here, or save it first.");
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    if (state.open !== null) closeLarge();
    take(files, "new");
  });
  $("#file").addEventListener("change", (event) => take(event.target.files, fileTo));
  $("#zone").addEventListener("click", () => chooseFile("new"));
  $("#upload-open").addEventListener("click", () => chooseFile("new"));
}

function toggleFilters(open) {
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
  refreshFacets = facets($("#facets"), catalog(), () => state.where, (where) => go({ where }));
  refreshFacets();
}

function toggleTuning(open) {
  $("#tuning").classList.toggle("open", open);
  $("#tune-open").setAttribute("aria-expanded", String(open));
  (open ? $("#tune-close") : $("#tune-open")).focus({ preventScroll: true });
}

function listenBar() {
  $("#home").addEventListener("click", home);
  $("#surprise").addEventListener("click", () => {
    $("#text").value = "";
    go({ seed: 1 + Math.floor(Math.random() * 1e6), like: [], unlike: [], text: "", open: null });
  });
  $("#filter-open").addEventListener("click", () => toggleFilters($("#filters").hidden));
  $("#filter-close").addEventListener("click", () => toggleFilters(false));
  $("#filter-clear").addEventListener("click", () => go({ where: [] }));
  $("#help-open").addEventListener("click", () => help.showModal());
  $("#tune-open").addEventListener("click", () => toggleTuning(!$("#tuning").classList.contains("open")));
  $("#tune-close").addEventListener("click", () => toggleTuning(false));
  $("#weights-reset").addEventListener("click", () => { tuned.cancel(); go({ weights: null }, { replace: true }); });
  $("#diversity").addEventListener("input", (event) => {
    $("#diversity-value").textContent = `${event.target.value} %`;
    fill(event.target);
    tuned({ diversity: Number(event.target.value) / 100 });
  });
  $("#collapse").addEventListener("change", (event) => go({ collapse: event.target.checked }, { replace: true }));
  $("#hubness").addEventListener("change", (event) => go({ hubness: event.target.checked }, { replace: true }));
  $("#hover").addEventListener("change", () => { pinned = false; cool(); });
  $("#more-button").addEventListener("click", () => { k = Math.min(MOST, k + STEP); render(); });
  $("#text").addEventListener("input", find);
  $("#text").addEventListener("keydown", (event) => { if (event.key === "ArrowDown" && cards().length) { event.preventDefault(); activate(cards()[0]); } });
  $("#catalog").addEventListener("change", (event) => {
    const uploads = (list) => list.filter((ref) => "upload" in ref);
    known.clear();
    go({ ...START, catalog: event.target.value, like: uploads(state.like), unlike: uploads(state.unlike) });
    if (!$("#filters").hidden) makeFacets();
  });
}

async function begin() {
  history.scrollRestoration = "manual";
  drawSkeletons();
  try {
    catalogs = await readCatalogs({ busy });
    if (!catalogs.length) throw new Error("The server has no catalog: start it with catalog=<folder>.");
  } catch (error) {
    works.replaceChildren();
    say("");
    return failed(error);
  }
  $("#catalog").replaceChildren(...catalogs.map((c) => h("option", { value: c.name }, c.name)));
  $("#catalog-box").hidden = catalogs.length < 2;
  listenBar();
  listenWorks();
  listenKeys();
  listenLarge();
  listenFiles();
  new IntersectionObserver(([entry]) => entry.isIntersecting && extend(), { rootMargin: "900px" }).observe($("#more"));
  addEventListener("popstate", arrive);
  arrive();
}

begin();
