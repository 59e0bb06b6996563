// The side: what is searched with, and how its parts are weighed.

import { $, debounce, h, icon } from "./dom.js";
import { paths, upload } from "./api.js";
import { caption, fit, inWords, picture } from "./works.js";
import { drawOn, place, showRegion } from "./crop.js";
import { catalog, edition, page, partNames, sameRef, searching, STEP, workOf } from "./store.js";
import { say } from "./notes.js";
import { failed, go } from "./route.js";

export function refPicture(ref) {
  if ("id" in ref) {
    const image = picture(page.state.catalog, { id: ref.id }, { eager: true });
    workOf(ref.id).then((work) => { image.alt = inWords(work); }, failed);
    return image;
  }
  const { url, token } = upload(ref.upload);
  const image = h("img", { src: url, alt: "Your image", decoding: "async" });
  image.addEventListener("error", () => { image.src = paths.upload(token); }, { once: true }); // what the browser cannot show, the server can
  return image;
}

// The whole image in a frame of its shape, with a place for its heat map and the part that is searched with.
export function refFrame(ref) {
  const image = refPicture(ref);
  const canvas = h("canvas", { class: "heat", "aria-hidden": "true" });
  const frame = h("div", { class: "frame whole" }, image, canvas);
  if ("id" in ref) workOf(ref.id).then((work) => fit(frame, work.width, work.height), () => {});
  else fit(frame, upload(ref.upload).width, upload(ref.upload).height);
  image.addEventListener("load", () => fit(frame, image.naturalWidth, image.naturalHeight));
  if (ref.region) place(canvas, ref.region); // the map is of the part
  showRegion(frame, ref.region);
  return frame;
}

// The search with another part of one of its images, null for all of it.
export function withRegion(ref, region) {
  const { region: _, ...whole } = ref;
  const next = region ? { ...whole, region } : whole;
  const other = (list) => list.map((one) => (sameRef(ref)(one) ? next : one));
  page.k = STEP;
  go({ like: other(page.state.like), searches: other(page.state.searches), open: null });
}

// A small picture of what is searched with: of a part, that part where the browser can.
export function tilePicture(ref) {
  const image = refPicture(ref);
  if (ref.region) {
    const [x, y, width, height] = ref.region.map((value) => 100 * value);
    image.style.objectViewBox = `inset(${y}% ${100 - x - width}% ${100 - y - height}% ${x}%)`;
  }
  return image;
}

let sideKey = "";

export function drawSide() {
  $("#side").hidden = !searching();
  page.explained = Math.min(page.explained, Math.max(0, page.state.like.length - 1));
  const key = JSON.stringify([edition(), page.state.like, page.state.unlike, page.explained]);
  if (searching() && key !== sideKey) {
    drawPrimary();
    drawShelf($("#like"), page.state.like, "like");
    drawShelf($("#unlike"), page.state.unlike, "unlike");
    $("#unlike-title").hidden = $("#unlike").hidden = !page.state.unlike.length;
    $("#like-title").textContent = page.state.like.length > 1 ? "Works like all of these" : "Works like";
    $("#each").hidden = page.state.like.length < 2;
  }
  sideKey = key;
  drawTuning();
}

function drawPrimary() {
  const figure = $("#primary");
  const ref = page.state.like[page.explained];
  const text = h("figcaption");
  const frame = refFrame(ref);
  if (page.state.like.length === 1) frame.append(remover(ref, "like"));
  drawOn(frame, { region: ref.region, done: (region) => withRegion(ref, region) });
  figure.replaceChildren(frame, text, h("div", { class: "part-acts" },
    h("button", { type: "button", class: "link", id: "part-open" }, ref.region ? "Another part" : "Search a part"),
    ref.region ? h("button", { type: "button", class: "link", id: "part-whole", onclick: () => withRegion(ref, null) }, "Whole image") : null));
  if ("id" in ref) {
    workOf(ref.id).then((work) => {
      if (page.state.like[page.explained] !== ref) return;
      const { artist, title, year } = caption(work);
      text.replaceChildren(h("strong", {}, artist || title), h("span", {}, artist ? [title, year].filter(Boolean).join(", ") : year));
    }, () => {});
  } else {
    text.replaceChildren(h("strong", {}, ref.region ? "Part of your image" : "Your image"), h("span", {}, upload(ref.upload).file?.name ?? ""));
  }
}

function remover(ref, list) {
  const without = () => go({ [list]: page.state[list].filter((other) => !sameRef(ref)(other)) });
  return h("button", { type: "button", class: "act remove", title: "Remove", "aria-label": list === "like" ? "Remove this image from the search" : "Remove this from what to avoid", onclick: without }, icon("close"));
}

function drawShelf(place, refs, list) {
  const tiles = refs.map((ref, i) => {
    const choose = () => { page.explained = i; drawSide(); };
    const pressed = list === "like" ? String(i === page.explained) : null;
    return h("li", {}, h("button", { type: "button", class: "tile", "aria-pressed": pressed, "aria-label": list === "like" ? `Show image ${i + 1} large` : `Image ${i + 1} to avoid`, onclick: list === "like" ? choose : null }, tilePicture(ref)), remover(ref, list));
  });
  const add = h("li", {}, h("button", { type: "button", class: "tile add", "data-file": list, title: "Add an image", "aria-label": "Add an image to the search" }, icon("plus")));
  place.replaceChildren(...(list === "like" && tiles.length === 1 ? [] : tiles), ...(list === "like" ? [add] : []));
}

const tuned = debounce((changes) => go(changes, { replace: true }), 120);

function shares() {
  const base = page.state.weights ?? catalog().parts;
  const total = Object.values(base).reduce((sum, value) => sum + value, 0) || 1;
  return Object.fromEntries(partNames().map((name) => [name, (base[name] ?? 0) / total]));
}

let weightsOf = null;
const fill = (input) => input.style.setProperty("--fill", `${input.value}%`);

function drawTuning() {
  const names = partNames();
  $("#weights-box").hidden = names.length < 2;
  $("#hover-box").hidden = !catalog().explains;
  if (weightsOf !== edition()) {
    weightsOf = edition();
    $("#weights").replaceChildren(...names.map((name, i) =>
      h("div", { class: "slider" },
        h("label", { for: `weight-${name}` }, h("i", { class: `part-${i % 4}`, "aria-hidden": "true" }), name),
        h("output", { for: `weight-${name}` }),
        h("input", { type: "range", id: `weight-${name}`, class: `part-${i % 4}`, "data-part": name, min: 0, max: 100, step: 1, oninput: weigh }))));
  }
  const values = shares();
  for (const input of document.querySelectorAll("#weights input")) {
    const value = values[input.dataset.part];
    if (document.activeElement !== input || page.state.weights === null) input.value = Math.round(100 * value);
    input.previousElementSibling.textContent = `${Math.round(100 * value)} %`;
    fill(input);
  }
  $("#weights-reset").hidden = page.state.weights === null;
  if (document.activeElement !== $("#diversity")) $("#diversity").value = 100 * page.state.diversity;
  $("#diversity-value").textContent = `${Math.round(100 * page.state.diversity)} %`;
  fill($("#diversity"));
  $("#collapse").checked = page.state.collapse;
  $("#hubness").checked = page.state.hubness;
}

function weigh() {
  const given = [...document.querySelectorAll("#weights input")].map((input) => [input.dataset.part, Number(input.value)]);
  const total = given.reduce((sum, [, value]) => sum + value, 0);
  if (!total) return say("At least one weight must be above 0.");
  const weights = Object.fromEntries(given.map(([name, value]) => [name, Number((value / total).toFixed(3))]));
  for (const input of document.querySelectorAll("#weights input")) {
    fill(input);
    input.previousElementSibling.textContent = `${Math.round(100 * weights[input.dataset.part])} %`;
  }
  tuned({ weights });
}

export function toggleTuning(open) {
  $("#tuning").classList.toggle("open", open);
  $("#tune-open").setAttribute("aria-expanded", String(open));
  (open ? $("#tune-close") : $("#tune-open")).focus({ preventScroll: true });
}

export function listenTuning() {
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
}
