// Parts of an image: [x, y, width, height] in fractions of its width and height.

const LEAST = 0.01; // of a side
const rounded = (value) => Number(value.toFixed(4));
const within = (value, low, high) => Math.min(high, Math.max(low, value));

// The part within the image that is nearest to what was given, null for what is none or all of it.
export function sound(given) {
  if (!given || given.length !== 4 || !given.every(Number.isFinite)) return null;
  const [width, height] = [within(given[2], LEAST, 1), within(given[3], LEAST, 1)];
  if (width > 0.995 && height > 0.995) return null;
  return [within(given[0], 0, 1 - width), within(given[1], 0, 1 - height), width, height].map(rounded);
}

// The part between two corners, null where they are too near for a rectangle that anybody meant.
export function between([x0, y0], [x1, y1]) {
  const [left, right, top, bottom] = [Math.min(x0, x1), Math.max(x0, x1), Math.min(y0, y1), Math.max(y0, y1)].map((value) => within(value, 0, 1));
  if (right - left < 2 * LEAST || bottom - top < 2 * LEAST) return null;
  return [left, top, right - left, bottom - top].map(rounded);
}

// The part moved, or made larger, by fractions.
export const moved = ([x, y, width, height], dx, dy) => sound([x + dx, y + dy, width, height]);
export const resized = ([x, y, width, height], dx, dy) => sound([x, y, Math.min(width + dx, 1 - x), Math.min(height + dy, 1 - y)]) ?? [0, 0, 1, 1];

// What a screen reader says of it.
export const inPercent = ([x, y, width, height]) => {
  const [left, right, top, bottom] = [x, x + width, y, y + height].map((value) => Math.round(100 * value));
  return `${left} to ${right} % across, ${top} to ${bottom} % down`;
};
