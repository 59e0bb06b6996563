// Heat maps: which places of query and work make the score.

import { $, debounce, h } from "./dom.js";
import { paths, post, renewing, sent } from "./api.js";
import { draw } from "./heat.js";
import { cardOf, catalog, edition, large, page, searching } from "./store.js";
import { busy, tell } from "./notes.js";
import { failed } from "./route.js";

const INTENT = 350; // milliseconds of rest on a work before its heat map is asked for
const heats = new Map();
export const resting = debounce((id) => explain(id), INTENT);

function heatKey(id) {
  const { like, unlike, weights } = page.state;
  return JSON.stringify([edition(), like, unlike, page.explained, id, weights]);
}

async function heatOf(id) {
  const key = heatKey(id);
  if (!heats.has(key)) {
    const { catalog, like, unlike, weights } = page.state;
    const shown = page.explained;
    const call = () => post(paths.heatmap(catalog), { like: like.map(sent), unlike: unlike.map(sent), shown, id, weights }, { busy });
    const answer = renewing(call);
    heats.set(key, answer);
    answer.catch(() => heats.delete(key));
    if (heats.size > 200) heats.delete(heats.keys().next().value);
  }
  return heats.get(key);
}

const ratioOf = (image) => image.naturalWidth / image.naturalHeight || 1;

async function explain(id) {
  if (!catalog().explains || !searching()) return;
  page.wish = id;
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
  if (page.wish !== id) return;
  const [, , across = 1, down = 1] = page.state.like[page.explained]?.region ?? []; // the map is of the part
  const pairs = [[$("#primary"), heat.query, across / down], [cardOf(id), heat.item, 1]];
  if (large.open) pairs.push([$("#large-query"), heat.query, across / down], [$("#large-work"), heat.item, 1]);
  for (const [place, map, part] of pairs) {
    const canvas = place && $("canvas", place);
    if (!canvas) continue;
    draw(canvas, map, ratioOf($("img", place)) * part);
    place.classList.add("hot");
  }
  const score = page.shown.works.find((work) => work.id === id)?.score ?? heat.score; // what its card says
  $("#legend").replaceChildren(...legend(score, heat.rest));
  $("#legend").hidden = false;
  $(".large-legend")?.replaceChildren(...legend(score, heat.rest));
}

function legend(score, rest) {
  const others = Math.abs(rest) >= 0.005 ? `; ${rest.toFixed(2)} comes from parts that have no places in the image` : "";
  const said = `Bright places match more than dark ones. All of the work's together add ${(score - rest).toFixed(2)} to its score of ${score.toFixed(2)}${others}.`;
  return [h("span", { class: "scale", "aria-hidden": "true" }), said];
}

export function cool() {
  page.wish = null;
  resting.cancel();
  for (const place of document.querySelectorAll(".hot")) place.classList.remove("hot");
  $("#legend").hidden = true;
  $(".large-legend")?.replaceChildren();
}

export function toggleHeat(id) {
  if (!catalog().explains) return tell("The encoder of this collection cannot say which places match.");
  if (!searching()) return;
  const on = (large.open ? $("#large-work") : cardOf(id))?.classList.contains("hot");
  cool();
  page.pinned = !on;
  if (!on) explain(id);
}
