// A picture that can be looked at closely: by wheel, double click, pinch, or from outside; a drag moves it.

const MOST = 12; // times its size on the page
const CLOSE = 3; // what a double click makes of it
const DRAG = 5; // pixels that make a press a drag

// `box` shows the part of its first child, the frame, that fits. `sharpen()` is called when more pixels are wanted than
// there are. Returns {box, by(factor), reset(), scale(), dragged()}.
export function zoomable(box, { sharpen = () => {}, changed = () => {} } = {}) {
  const frame = box.firstElementChild;
  const pointers = new Map();
  let [scale, x, y] = [1, 0, 0];
  let apart = 0; // of two fingers
  let travelled = 0;
  let asked = false;

  const range = (at, size, room) => (size * scale <= room ? Array(2).fill((room - size * scale) / 2 - at) : [room - size * scale - at, -at]);
  function place() {
    const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));
    x = scale === 1 ? 0 : clamp(x, range(frame.offsetLeft, frame.offsetWidth, box.clientWidth));
    y = scale === 1 ? 0 : clamp(y, range(frame.offsetTop, frame.offsetHeight, box.clientHeight));
    frame.style.transform = scale === 1 ? "" : `translate(${x}px, ${y}px) scale(${scale})`;
    box.classList.toggle("close", scale > 1);
    const image = frame.querySelector("img");
    if (!asked && image && image.naturalWidth && scale > 1 && scale * frame.offsetWidth * devicePixelRatio > 1.1 * image.naturalWidth) {
      asked = true;
      sharpen(image);
    }
    changed(scale);
  }
  // The place under a point of the screen stays where it is.
  function to(next, clientX, clientY) {
    const room = box.getBoundingClientRect();
    const [cx, cy] = [clientX - room.left - frame.offsetLeft, clientY - room.top - frame.offsetTop];
    const limited = Math.min(MOST, Math.max(1, next));
    [x, y] = [cx - ((cx - x) * limited) / scale, cy - ((cy - y) * limited) / scale];
    scale = limited < 1.01 ? 1 : limited;
    place();
  }
  const middle = () => {
    const room = box.getBoundingClientRect();
    return [room.left + room.width / 2, room.top + room.height / 2];
  };

  for (const image of frame.querySelectorAll("img")) image.draggable = false;
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    to(scale * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)), event.clientX, event.clientY);
  }, { passive: false });
  box.addEventListener("dblclick", (event) => {
    event.preventDefault();
    to(scale > 1 ? 1 : CLOSE, event.clientX, event.clientY);
  });
  box.addEventListener("touchmove", (event) => { if (event.touches.length > 1 || scale > 1) event.preventDefault(); }, { passive: false });
  box.addEventListener("pointerdown", (event) => {
    if (pointers.size === 0) travelled = 0;
    pointers.set(event.pointerId, event);
    apart = 0;
  });
  box.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    travelled += Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY);
    pointers.set(event.pointerId, event);
    if (travelled > DRAG && !box.hasPointerCapture(event.pointerId)) box.setPointerCapture(event.pointerId);
    const [one, two] = [...pointers.values()];
    if (two) {
      const now = Math.hypot(one.clientX - two.clientX, one.clientY - two.clientY);
      if (apart && now) to((scale * now) / apart, (one.clientX + two.clientX) / 2, (one.clientY + two.clientY) / 2);
      apart = now;
    } else if (scale > 1) {
      x += event.clientX - before.clientX;
      y += event.clientY - before.clientY;
      place();
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) box.addEventListener(kind, (event) => { pointers.delete(event.pointerId); apart = 0; });
  return {
    box,
    by: (factor) => to(scale * factor, ...middle()),
    reset: () => to(1, ...middle()),
    scale: () => scale,
    dragged: () => travelled > DRAG,
  };
}
