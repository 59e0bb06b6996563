// A rectangle that is drawn on a picture: by pointer, or moved and resized by keys.

import { $, h } from "./dom.js";
import { between, inPercent, moved, resized } from "./region.js";

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 0.02;

// Shows a part of the picture in `frame`, or none. `focusable`: keys move it.
export function showRegion(frame, region, { focusable = false } = {}) {
  let box = $(".region", frame);
  if (!region) {
    box?.remove();
    return;
  }
  if (!box) {
    box = h("div", { class: "region" });
    frame.append(box);
  }
  box.ariaHidden = focusable ? null : "true";
  if (focusable) {
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `The part: ${inPercent(region)}. Arrow keys move it, with Shift they change its size`);
  }
  place(box, region);
}

// Puts an element over a part of its picture.
export function place(element, region) {
  ["left", "top", "width", "height"].forEach((side, i) => { element.style[side] = `${100 * region[i]}%`; });
}

// Lets a person draw on the picture in `frame`. `draw(region)` is told of the part while it changes, `done(region)` when
// it was drawn; `touch`: fingers draw too, else they scroll the page.
export function drawOn(frame, { region, draw = () => {}, done = () => {}, touch = false }) {
  let start = null;
  const point = (event) => {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const show = (part) => { showRegion(frame, part, { focusable: touch }); draw(part); };
  frame.classList.add("drawn");
  frame.classList.toggle("fingers", touch);
  for (const image of frame.querySelectorAll("img")) image.draggable = false;
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target.closest("button") || !(touch || event.pointerType === "mouse" || event.pointerType === "pen")) return;
    if (!event.isPrimary) return;
    start = point(event);
    frame.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  frame.addEventListener("pointermove", (event) => {
    if (!start || !event.isPrimary) return;
    const part = between(start, point(event));
    if (part) show(part);
  });
  const end = (event) => {
    if (!start || !event.isPrimary) return;
    const part = event.type === "pointerup" ? between(start, point(event)) : null;
    start = null;
    if (part) { region = part; show(part); done(part); } else show(region);
  };
  frame.addEventListener("pointerup", end);
  frame.addEventListener("pointercancel", end);
  frame.addEventListener("keydown", (event) => {
    const way = KEYS[event.key];
    if (!way || !event.target.classList.contains("region")) return;
    event.preventDefault();
    event.stopPropagation();
    const [dx, dy] = way.map((sign) => STEP * sign);
    region = (event.shiftKey ? resized : moved)(region, dx, dy) ?? region;
    show(region);
  });
  show(region);
  // Another part, from elsewhere.
  return (part) => { region = part; show(part); };
}
