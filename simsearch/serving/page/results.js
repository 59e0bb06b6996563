// What is asked of the server and drawn in the middle: the wall of works, or the answers to a search. Only the latest
// request's answer is drawn.

import { $, h, still } from "./dom.js";
import { paths, post, renewing, request, sent } from "./api.js";
import { resultCard, skeleton, wallCard } from "./works.js";
import { activate, cardOf, catalog, edition, known, large, MOST, nothing, page, partNames, searching, STEP, works } from "./store.js";
import { busy, say, tell } from "./notes.js";
import { changed, failed, go } from "./route.js";
import { cool } from "./explain.js";
import { drawLarge } from "./view.js";
import { drawMarks, showing } from "./kept.js";
import { MOST_KEPT } from "./selection.js";
import { drawFound } from "./outlines.js";

const PAGE = 60; // works of the wall that are fetched together
const KEPT = 30; // answers kept for the way back
const answers = new Map();
let running = null; // {key, abort, signal} of the request whose answer is to come

function latest(key) {
  running?.abort();
  const controller = new AbortController();
  running = { key, signal: controller.signal, abort: () => controller.abort() };
  return running.signal;
}

function question() {
  const { like, unlike, selection, weights, where, text, seed, diversity, collapse, hubness } = page.state;
  if (!like.length && selection.length) return JSON.stringify(["wall", edition(), selection]);
  if (!like.length) return JSON.stringify(["wall", edition(), where, text, text ? 0 : seed]);
  return JSON.stringify(["search", edition(), like, unlike, weights, where, diversity, collapse, hubness, page.k]);
}

function remember(key, answer) {
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  for (const work of answer.works) known.set(work.id, work);
}

async function ask(key, signal) {
  const options = { signal, busy };
  if (showing()) {
    const ids = page.state.selection.slice(0, MOST_KEPT);
    const [items, missing] = [[], []];
    for (let at = 0; at < ids.length; at += PAGE) {
      const some = await post(paths.some(page.state.catalog), { ids: ids.slice(at, at + PAGE) }, options);
      items.push(...some.items);
      missing.push(...some.missing);
    }
    if (missing.length) tell(`${count(missing.length, "work")} of this selection ${missing.length === 1 ? "is" : "are"} not in this collection.`);
    return { key, kind: "wall", works: items, total: items.length, done: true };
  }
  if (!searching()) {
    const answer = await request(paths.items(page.state.catalog, wallQuery(0)), options);
    return { key, kind: "wall", works: answer.items, total: answer.total, done: answer.items.length < PAGE || answer.items.length >= answer.total };
  }
  const body = () => ({
    like: page.state.like.map(sent), unlike: page.state.unlike.map(sent), weights: page.state.weights,
    filters: page.state.where, k: page.k,
    diversity: page.state.diversity, collapse: page.state.collapse, hubness: page.state.hubness,
  });
  const answer = await renewing(() => post(paths.search(page.state.catalog), body(), options), { signal });
  return {
    key, kind: "search", works: answer.results, verdict: answer.verdict, total: answer.total_candidates,
    took: answer.milliseconds, done: answer.results.length < page.k || page.k >= MOST,
  };
}

const wallQuery = (offset) => {
  const query = { offset, limit: PAGE };
  if (page.state.where.length) query.filters = JSON.stringify(page.state.where);
  if (page.state.text) query.text = page.state.text;
  else query.seed = page.state.seed;
  return query;
};

export async function show(scroll) {
  const key = question();
  if (key === (running ? running.key : page.shown.key)) return;
  const fresh = !sameQuestion(key, page.shown.key);
  const cached = answers.get(key);
  const signal = latest(key);
  if (cached) {
    running = null;
    remember(key, cached);
    drawAnswer(cached, fresh);
    scrollTo(0, scroll ?? (fresh ? 0 : scrollY));
    return;
  }
  document.body.classList.add("busy");
  works.setAttribute("aria-busy", "true");
  if (fresh) {
    page.anyway = false;
    page.shown = nothing();
    drawFound();
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
    page.shown = nothing();
    drawFailed(() => show(null));
    failed(error);
  }
  if (signal === running?.signal) {
    running = null;
    document.body.classList.remove("busy");
    works.removeAttribute("aria-busy");
  }
}

// Whether only weights, filters or order changed, not the images: then the answers move instead of being replaced.
function sameQuestion(a, b) {
  if (!a || !b) return false;
  const [x, y] = [JSON.parse(a), JSON.parse(b)];
  return x[0] === y[0] && x[1] === y[1] && (x[0] === "wall" || JSON.stringify(x[2]) === JSON.stringify(y[2]));
}

export function drawSkeletons() {
  $("#none").hidden = true;
  $("#more-button").hidden = true;
  works.className = searching() ? "works results" : "works";
  works.replaceChildren(...[1.3, 0.8, 1, 1.5, 0.75, 1.2, 0.9, 1.4, 1, 0.7, 1.25, 1.1].map(skeleton));
  say(searching() ? "Looking…" : "Fetching works…");
}

// Nothing came: a way to try again.
export function drawFailed(again) {
  works.replaceChildren();
  $("#more-button").hidden = true;
  $("#none").hidden = false;
  $("#none").replaceChildren(h("h2", {}, "The works could not be fetched"), h("button", { type: "button", class: "tool", id: "again", onclick: again }, "Try again"));
  say("");
}

function drawAnswer(answer, fresh) {
  document.body.classList.remove("busy");
  works.removeAttribute("aria-busy");
  const focused = works.contains(document.activeElement);
  page.shown = answer;
  page.wish = null;
  large.dataset.id = ""; // its neighbours and its score are others now
  const none = answer.kind === "search" && answer.verdict === "none" && answer.works.length && !page.anyway;
  drawNone(answer, none);
  works.className = answer.kind === "search" ? "works results" : "works";
  if (none) { cool(); works.replaceChildren(); }
  else if (answer.kind === "wall") works.replaceChildren(...answer.works.map((work) => wallCard(page.state.catalog, work)));
  else place(answer, fresh);
  activate($(".work", works), focused);
  drawMarks();
  drawFound();
  drawMore(none);
  say(none ? "" : summary(answer));
  drawFacts(answer);
  drawLarge();
  if (near()) extend(); // on a large screen no scrolling asks for more
}

function drawMore(none) {
  const searched = page.shown.kind === "search";
  $("#more-button").hidden = Boolean(none) || page.shown.done || !page.shown.works.length || !searched;
}

export function count(n, word) {
  return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
}

export function summary(answer) {
  if (answer.kind === "wall") {
    if (!answer.works.length) return "";
    if (showing()) return count(answer.total, "work");
    return page.state.text ? `${count(answer.total, "work")} with “${page.state.text}”` : count(answer.total, "work");
  }
  if (!answer.works.length) return "";
  const same = answer.works.filter((work) => work.verdict === "same work").length;
  return `The ${answer.works.length} nearest of ${count(answer.total, "work")}` + (same ? `; ${same === 1 ? "one is" : `${same} are`} the same work` : "");
}

function drawFacts(answer) {
  const has = catalog();
  const lines = [count(has.items, "work"), `${has.bytes_per_item} bytes each`];
  if (answer.took) lines.push(`encoded in ${answer.took.encode.toFixed(0)} ms, searched in ${answer.took.search.toFixed(1)} ms`);
  const uncalibrated = has.verifies ? "not calibrated: a work is called the same if its points agree, none similar" : "not calibrated: nothing is called similar or the same";
  lines.push(has.calibration ? promise(has.calibration) : uncalibrated);
  $("#facts").textContent = lines.join(" · ");
}

// What a calibration promises, of the kinds of match that it knows.
function promise({ rate, coverage }) {
  const percent = (value) => `${+(100 * value).toFixed(2)} %`;
  const by = rate.verified === undefined ? "same_work" : "verified";
  const found = coverage?.[by] ? ` and finds at least ${percent(coverage[by])} of true ones` : "";
  const lines = [`“same work” is wrong for at most ${percent(rate[by])} of other works${found}`];
  if (rate.similar !== undefined) lines.push(`“similar” is wrong for at most ${percent(rate.similar)} of unrelated images`);
  return lines.join(" · ");
}

function drawNone(answer, none) {
  const box = $("#none");
  box.hidden = !none && answer.works.length > 0;
  if (none) {
    box.replaceChildren(h("h2", {}, "No similar work in this collection"),
      h("p", {}, "Unrelated images come as close to these works as yours does."),
      h("button", { type: "button", class: "tool", id: "anyway", onclick: () => { page.anyway = true; drawAnswer(page.shown, true); works.focus({ preventScroll: true }); } }, "Show the nearest anyway"));
  } else if (!answer.works.length) {
    const why = page.state.where.length ? "No work passes these filters" : page.state.text ? `No work matches “${page.state.text}”` : "Nothing to show";
    box.replaceChildren(h("h2", {}, why), page.state.where.length
      ? h("button", { type: "button", class: "tool", onclick: () => go({ where: [] }) }, "Clear the filters")
      : h("p", {}, "Try other words."));
  }
}

// Puts results in their order. Those that were there before glide to their new places.
export function place(answer, fresh) {
  const before = new Map();
  if (!fresh && !still()) for (const card of works.children) if (card.dataset.id) before.set(card.dataset.id, card.getBoundingClientRect());
  const cards = answer.works.map((work) => {
    const card = resultCard(page.state.catalog, work, partNames(), catalog().explains);
    const old = cardOf(work.id);
    if (old) $("img", card).replaceWith($("img", old)); // loaded already
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

let extending = false;

// What the button below asks for: more results, or the rest of a wall that could not be fetched.
export function more() {
  if (page.shown.kind === "wall") return extend();
  page.k = Math.min(MOST, page.k + STEP);
  changed();
}

export async function extend() {
  if (extending || page.shown.kind !== "wall" || page.shown.done) return;
  extending = true;
  const before = page.shown;
  let came = true;
  $("#more-button").hidden = true;
  try {
    const answer = await request(paths.items(page.state.catalog, wallQuery(before.works.length)), { busy });
    if (page.shown !== before) return;
    const have = new Set(before.works.map((work) => work.id));
    const fresh = answer.items.filter((work) => !have.has(work.id));
    before.works.push(...fresh);
    before.done = !answer.items.length || before.works.length >= answer.total;
    for (const work of fresh) known.set(work.id, work);
    works.append(...fresh.map((work) => wallCard(page.state.catalog, work)));
    drawMarks();
  } catch (error) {
    came = page.shown !== before;
    if (!came) $("#more-button").hidden = false;
    failed(error);
  } finally {
    extending = false;
    if (came && near()) extend();
  }
}

const near = () => $("#more").getBoundingClientRect().top < innerHeight + 900;
