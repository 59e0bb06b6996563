// Choosing a part of what is searched with: drawn large by mouse or finger, by keys, or in numbers.

import { $ } from "./dom.js";
import { sound } from "./region.js";
import { page, searching } from "./store.js";
import { drawOn } from "./crop.js";
import { refFrame, withRegion } from "./side.js";

const dialog = $("#part");
const FIRST = [0.25, 0.25, 0.5, 0.5];
const ends = ["left", "top", "width", "height"].map((name) => $(`#part-${name}`));
let set = () => {};
let region = FIRST;
let ref = null;

function open() {
  ref = page.state.like[page.explained];
  region = ref.region ?? FIRST;
  const frame = refFrame(ref);
  $("#part-stage").replaceChildren(frame);
  set = drawOn(frame, { region, touch: true, draw: (part) => { region = part; fill(); } });
  dialog.showModal();
  $(".region", frame).focus();
}

function fill() {
  region.forEach((value, i) => { if (document.activeElement !== ends[i]) ends[i].value = Math.round(1000 * value) / 10; });
}

function read() {
  const given = ends.map((input) => input.valueAsNumber / 100);
  const part = given.every(Number.isFinite) ? (sound(given) ?? [0, 0, 1, 1]) : null;
  if (part) set(part);
}

export function listenPart() {
  document.addEventListener("click", (event) => { if (event.target.closest("#part-open") && searching()) open(); });
  for (const input of ends) {
    input.addEventListener("input", read);
    input.addEventListener("change", fill);
  }
  $("#part-search").addEventListener("click", () => { dialog.close(); withRegion(ref, sound(region)); });
  $("#part-cancel").addEventListener("click", () => dialog.close());
  $("#part-stage").addEventListener("keydown", (event) => { if (event.key === "Enter") $("#part-search").click(); });
}
