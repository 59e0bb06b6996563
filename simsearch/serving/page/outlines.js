// Where verified works lie in the photograph that is searched with, and the points that agree.

import { h, icon, svg, $ } from "./dom.js";
import { paths } from "./api.js";
import { caption, inWords } from "./works.js";
import { catalog, page, searching } from "./store.js";
import { go } from "./route.js";
import { withRegion } from "./side.js";
import { sound } from "./region.js";

const SAME_PLACE = 0.5; // of the smaller box: works that share so much of the photograph hang in one place
const MARGIN = 0.02;

const box = (outline) => {
  const [xs, ys] = [0, 1].map((i) => outline.map((corner) => Math.min(1, Math.max(0, corner[i]))));
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
};

function share(a, b) {
  const [across, down] = [0, 1].map((i) => Math.max(0, Math.min(a[i + 2], b[i + 2]) - Math.max(a[i], b[i])));
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  return (across * down) / Math.max(1e-9, Math.min(area(a), area(b)));
}

// A place in the image of which a part is searched with, given a place in the part.
const inImage = (region) => ([x, y]) => (region ? [region[0] + x * region[2], region[1] + y * region[3]] : [x, y]);

// The works of the answer that are verified, best first, with their outline in the whole image. Of several images
// nobody knows in which one a work was found.
export function verified() {
  if (!searching() || page.state.like.length !== 1) return [];
  const place = inImage(page.state.like[0].region);
  return page.shown.works.filter((work) => work.outline).map((work) => ({ work, outline: work.outline.map(place) }));
}

// Those that hang in places of their own: of several images of one work, the best.
export function places(found = verified()) {
  const kept = [];
  for (const one of found) if (!kept.some((other) => share(box(one.outline), box(other.outline)) > SAME_PLACE)) kept.push(one);
  return kept;
}

function overlay(...shapes) {
  return svg("svg", { class: "outlines", viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes);
}

const text = (outline) => outline.map((corner) => corner.map((value) => value.toFixed(5)).join(",")).join(" ");

// Draws outlines over the picture in `frame`; that of the work `id` stands out.
export function drawOutlines(frame, found, id = null) {
  $(".outlines", frame)?.remove();
  if (!found.length) return;
  const shapes = found.map(({ work, outline }) => svg("polygon", { points: text(outline), class: work.id === id ? "here" : null, "data-id": work.id }));
  frame.append(overlay(...shapes));
}

// The agreeing points of a work over both pictures: equal colours are one point. An empty list removes them.
export function drawPoints(query, work, points, region) {
  for (const frame of [query, work]) $(".points", frame)?.remove();
  if (!points.length) return;
  const place = inImage(region);
  const across = [...points].sort((a, b) => a[0] - b[0]); // colours run from left to right
  const dots = (of) => across.map((point, i) => {
    const [x, y] = of(point);
    const dot = svg("path", { d: `M${x.toFixed(5)} ${y.toFixed(5)}h0` });
    dot.style.stroke = `hsl(${Math.round((300 * i) / across.length)} 95% 60%)`;
    return dot;
  });
  for (const [frame, of] of [[query, ([x, y]) => place([x, y])], [work, ([, , x, y]) => [x, y]]]) {
    const drawn = overlay(...dots(of));
    drawn.classList.replace("outlines", "points");
    frame.append(drawn);
  }
}

// The outlines in the photograph beside the answers, and a chip for each work where there are several.
export function drawFound() {
  const found = verified();
  const apart = places(found);
  const frame = $("#primary .frame");
  if (frame) drawOutlines(frame, apart);
  const list = $("#found");
  list.hidden = apart.length < 2;
  if (apart.length < 2) return list.replaceChildren();
  const light = (id) => frame && drawOutlines(frame, apart, id);
  const chips = apart.map(({ work, outline }) => {
    const { artist, title } = caption(work);
    const [left, top, right, bottom] = box(outline);
    const part = sound([left - MARGIN, top - MARGIN, right - left + 2 * MARGIN, bottom - top + 2 * MARGIN]);
    return h("li", { onpointerenter: () => light(work.id), onpointerleave: () => light(null), onfocusin: () => light(work.id), onfocusout: () => light(null) },
      h("button", { type: "button", class: "chip on", title: inWords(work), "data-id": work.id, onclick: () => go({ open: work.id }) },
        h("img", { src: paths.thumbnail(catalog().name, work.id), alt: "" }), h("span", {}, artist ? `${title} — ${artist}` : title)),
      h("button", { type: "button", class: "tool round", title: "Search this part alone", "aria-label": `Search the part with ${title} alone`, onclick: () => withRegion(page.state.like[0], part) }, icon("search")));
  });
  list.replaceChildren(h("h2", {}, `${apart.length} works in this photograph`), h("ul", {}, chips));
}
