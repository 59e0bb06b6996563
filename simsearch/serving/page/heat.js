// A map of contributions, drawn over an image: places that add little lie in shade, places that add much glow
// and places that take away turn blue. The shade begins at the least that any place adds.

const LONG = 192; // pixels of the drawing's longer side; the browser stretches it over the image

const spline = (t) => {
  const s = 1 - t;
  return [s ** 3 / 6, (4 - 6 * t * t + 3 * t ** 3) / 6, (4 - 6 * s * s + 3 * s ** 3) / 6, t ** 3 / 6];
};

// For each of n pixels, the four of `cells` cells around it and their weights.
function taps(n, cells) {
  return Array.from({ length: n }, (_, i) => {
    const at = ((i + 0.5) / n) * cells - 0.5;
    const first = Math.floor(at);
    const cell = (k) => Math.min(cells - 1, Math.max(0, first - 1 + k));
    return spline(at - first).map((weight, k) => [cell(k), weight]);
  });
}

// The values of `map` {height, width, values} by a cubic B-spline: (rows, columns) numbers, row by row.
export function smooth(map, rows, columns) {
  const across = taps(columns, map.width);
  const wide = map.values.map((row) => across.map((tap) => tap.reduce((sum, [cell, weight]) => sum + weight * row[cell], 0)));
  const result = new Float32Array(rows * columns);
  taps(rows, map.height).forEach((tap, y) => {
    for (const [cell, weight] of tap) for (let x = 0; x < columns; x++) result[y * columns + x] += weight * wide[cell][x];
  });
  return result;
}

function colour(t) {
  if (t < 0) return [14 + 22 * -t, 14 + 76 * -t, 26 + 190 * -t, 176];
  if (t < 0.5) return [14, 14, 26, 176 * (1 - t / 0.5)];
  const up = (t - 0.5) / 0.5;
  return [255, 190 - 60 * up, 60, 105 * up];
}

// `ratio` is the image's width by its height.
export function draw(canvas, map, ratio) {
  canvas.width = Math.max(2, Math.round(ratio >= 1 ? LONG : LONG * ratio));
  canvas.height = Math.max(2, Math.round(ratio >= 1 ? LONG / ratio : LONG));
  const values = smooth(map, canvas.height, canvas.width);
  const least = Math.max(0, values.reduce((a, b) => Math.min(a, b)));
  const most = values.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
  const level = (value) => (value < 0 ? value / most : (value - least) / (most - least || 1));
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => picture.data.set(colour(level(value)), 4 * i));
  context.putImageData(picture, 0, 0);
}
