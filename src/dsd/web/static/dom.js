// Small helpers. Text is only ever set as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// A map of 0..1 as a veil that is open where the map is high.
export function veil(canvas, map) {
  paint(canvas, map, (value) => [8, 10, 18, Math.round(170 * (1 - Math.min(1, Math.max(0, value))) ** 0.8)]);
}

// A map of -1..1: orange where A fits better, blue where B does.
export function signed(canvas, map) {
  paint(canvas, map, (value) => [...(value > 0 ? [255, 140, 20] : [60, 130, 255]), Math.round(220 * Math.min(1, Math.abs(value)))]);
}

function paint(canvas, map, colour) {
  canvas.height = map.length;
  canvas.width = map[0].length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  map.forEach((row, y) => row.forEach((value, x) => pixels.data.set(colour(value), 4 * (y * canvas.width + x))));
  context.putImageData(pixels, 0, 0);
}

// Scores of one choice => shares that sum to one.
export function softmax(scores) {
  const top = Math.max(...scores);
  const odds = scores.map((s) => Math.exp(s - top));
  const sum = odds.reduce((a, b) => a + b, 0);
  return odds.map((o) => o / sum);
}

export const percent = (share) => (share >= 0.995 && share < 1 ? "> 99 %" : share > 0 && share < 0.005 ? "< 1 %" : `${Math.round(100 * share)} %`);

export const signedNumber = (value) => value.toFixed(3).replace("-", "−");
