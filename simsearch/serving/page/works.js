// Works on a wall: a figure each, at its own aspect ratio, with its caption and what may be done with it.

import { h, icon } from "./dom.js";
import { paths } from "./api.js";

const NARROWEST = { wall: 0.35, result: 0.55 }; // width by height; what is beyond stands whole in a frame of this shape
const WIDEST = 2.6;

export function caption(work) {
  const has = work.attributes ?? {};
  const file = (has.path ?? "").split("/").pop().replace(/\.\w+$/, "");
  const artist = has.artist ?? has.label ?? "";
  const title = has.title ?? file ?? "";
  const year = has.year ?? has.date ?? "";
  return { artist, title: title || work.id, year };
}

export function inWords(work) {
  const { artist, title, year } = caption(work);
  return [artist && `${artist} —`, title + (year && ","), year].filter(Boolean).join(" ");
}

const LATER = 5000; // milliseconds until a busy server is asked once more

// Puts the sharp image in the thumbnail's place where it is shown larger than it is.
async function sharpen(image, address, again = true) {
  if (image.clientWidth * devicePixelRatio <= image.naturalWidth * 1.15) return;
  const sharp = new Image();
  sharp.src = address;
  try {
    await sharp.decode();
    image.src = address;
  } catch { // the thumbnail stays
    if (again) setTimeout(() => sharpen(image, address, false), LATER);
  }
}

export function picture(catalog, work, { eager = false } = {}) {
  const image = h("img", {
    alt: "", loading: eager ? null : "lazy", decoding: "async", draggable: "true",
    width: work.width || null, height: work.height || null, src: paths.thumbnail(catalog, work.id),
  });
  image.addEventListener("load", () => sharpen(image, paths.image(catalog, work.id)), { once: true });
  let again = true; // where the server is busy
  image.addEventListener("error", () => {
    if (!again) return image.closest(".frame")?.classList.add("broken");
    again = false;
    setTimeout(() => { image.src = paths.thumbnail(catalog, work.id); }, 1500);
  });
  return image;
}

export function shape(element, work, kind = "wall") {
  const ratio = work.width > 0 && work.height > 0 ? work.width / work.height : 1;
  const shown = Math.min(WIDEST, Math.max(NARROWEST[kind], ratio));
  element.style.setProperty("--ratio", shown.toFixed(4));
  element.classList.toggle("boxed", shown !== ratio);
}

// The parts of a score, as a bar of its length and a list in words.
export function scoreBar(work, names) {
  const said = names.map((name) => [name, work.parts?.[name] ?? 0]);
  const bar = h("span", { class: "bar-track", "aria-hidden": "true" });
  said.forEach(([name, value], i) => {
    const piece = h("span", { class: `part-${i % 4}` });
    piece.style.width = `${(100 * Math.max(0, value)).toFixed(1)}%`;
    bar.append(piece);
  });
  const list = h("span", { class: "parts" });
  if (names.length > 1) {
    said.forEach(([name, value], i) => list.append(h("span", {}, h("i", { class: `part-${i % 4}` }), name, h("b", {}, value.toFixed(2)))));
  }
  return h("div", { class: "score" }, bar, h("span", { class: "number" }, work.score.toFixed(2)), names.length > 1 && list);
}

// A frame of exactly the picture's shape, so that places in it are places in the picture.
export function fit(frame, width, height) {
  if (width > 0 && height > 0) frame.style.setProperty("--ratio", (width / height).toFixed(5));
}

const tool = (label, name, act) =>
  h("button", { type: "button", class: "act", tabindex: "-1", title: label, "aria-label": label, "data-act": act }, icon(name));

// A work of the collection, to choose.
export function wallCard(catalog, work) {
  const { artist, title, year } = caption(work);
  const frame = h("button", { type: "button", class: "frame", tabindex: "-1", "data-act": "more", "aria-label": `${inWords(work)}. Find similar works` },
    picture(catalog, work),
    h("span", { class: "label", "aria-hidden": "true" }, h("strong", {}, artist || title), h("span", {}, artist ? [title, year].filter(Boolean).join(", ") : year)));
  const card = h("li", { class: "work wall", "data-id": work.id }, frame,
    h("div", { class: "actions" }, tool("Large view", "search", "open"), tool("Keep in the selection", "keep", "keep")));
  shape(card, work);
  return card;
}

// What is said of a work that is the same, and by what: points that agree, or the score alone.
export function badgeOf(work) {
  if (work.verdict !== "same work") return null;
  const proof = work.inliers ? `${work.inliers} points of both pictures agree` : null;
  return h("span", { class: "badge", title: proof }, work.inliers ? "The same work" : "Same work");
}
const VERDICTS = { "same work": ", same work", similar: ", similar", none: ", not similar" };

// A result. `names` are the catalog's parts, `explains` whether it draws heat maps.
export function resultCard(catalog, work, names, explains) {
  const { artist, title, year } = caption(work);
  const badge = badgeOf(work);
  const words = `${work.rank}. ${inWords(work)}. Score ${work.score.toFixed(2)}${VERDICTS[work.verdict] ?? ""}`;
  const frame = h("button", { type: "button", class: "frame", tabindex: "-1", "data-act": "open", "aria-label": words },
    picture(catalog, work), h("canvas", { class: "heat", "aria-hidden": "true" }), badge);
  const shared = Object.entries(work.shared ?? {}).map(([attribute, value]) =>
    h("button", { type: "button", class: "chip", tabindex: "-1", "data-attribute": attribute, "data-value": value, title: `${value}: show only these` }, `same ${attribute}`));
  const card = h("li", { class: "work result", "data-id": work.id },
    h("div", { class: "hold" }, frame,
      h("div", { class: "actions" },
        tool("More like this", "similar", "more"), tool("Not like this", "minus", "unlike"),
        explains && tool("Which places match", "heat", "heat"), tool("Keep in the selection", "keep", "keep"))),
    h("div", { class: "caption" }, h("strong", {}, artist || title), h("span", {}, artist ? title : year, artist && year && `, ${year}`)),
    scoreBar(work, names),
    shared.length ? h("div", { class: "because", role: "group", "aria-label": "Because of" }, shared) : null);
  shape(card, work, "result");
  card.classList.toggle("far", work.verdict === "none");
  return card;
}

export function skeleton(ratio) {
  const card = h("li", { class: "work skeleton", "aria-hidden": "true" }, h("div", { class: "frame" }));
  card.style.setProperty("--ratio", ratio);
  return card;
}

// The card beside `card` in the direction of an arrow key, by where they stand on the page.
export function neighbour(cards, card, key) {
  const at = cards.indexOf(card);
  if (key === "Home") return cards[0];
  if (key === "End") return cards.at(-1);
  if (key === "ArrowLeft") return cards[at - 1];
  if (key === "ArrowRight") return cards[at + 1];
  const here = card.getBoundingClientRect();
  const middle = here.left + here.width / 2;
  const down = key === "ArrowDown";
  const beyond = cards
    .map((other) => ({ other, box: other.getBoundingClientRect() }))
    .filter(({ box }) => (down ? box.top >= here.bottom - 4 : box.bottom <= here.top + 4));
  const away = ({ box }) => Math.abs(down ? box.top - here.bottom : here.top - box.bottom) * 3 + Math.abs(box.left + box.width / 2 - middle);
  return beyond.sort((a, b) => away(a) - away(b))[0]?.other;
}
