// Elements and pictures. Text goes in as text nodes, never as HTML: the page's policy forbids the other way too.

/** An element with attributes, listeners (`on...`) and children; strings become text. */
export function el(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** A line of values over time, from 0 to `top`. Its meaning is in the text beside it. */
export function sparkline(values, top) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const high = Math.max(top ?? 0, ...values, 1e-9);
  const points = values.map((value, at) => {
    const x = values.length < 2 ? 100 : (100 * at) / (values.length - 1);
    return `${x.toFixed(2)},${(23 - (22 * value) / high).toFixed(2)}`;
  });
  for (const [kind, corners] of [["area", ["0,24", ...points, "100,24"]], ["line", points]]) {
    const shape = document.createElementNS(SVG, kind === "area" ? "polygon" : "polyline");
    shape.setAttribute("class", kind);
    shape.setAttribute("points", corners.join(" "));
    svg.append(shape);
  }
  return svg;
}

function color(name) {
  const found = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(found.slice(at, at + 2), 16));
}

/**
 * Rows of cells, each as dark as its share of the most: `value(row, column)`. `marks` are [row, column, 0..1]
 * in the second colour. Heights follow the width unless `height` says how many CSS pixels a row has.
 */
export function heat(canvas, rows, columns, value, { marks = [], height = null } = {}) {
  const width = canvas.parentElement.clientWidth;
  if (!width || !rows || !columns) return;
  const tall = height ?? Math.max(3, Math.min(14, Math.floor(220 / rows)));
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(rows * tall * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  canvas.style.height = `${rows * tall}px`;
  const [from, to, mark] = [color("--heat-0"), color("--heat-1"), color("--mark")];
  const paint = canvas.getContext("2d");
  let most = 0;
  for (let row = 0; row < rows; row++) for (let at = 0; at < columns; at++) most = Math.max(most, value(row, at));
  const gap = w / columns >= 5 * scale && tall >= 5 ? scale : 0;
  const cell = (row, at, rgb) => {
    const [x, y] = [Math.round((at * w) / columns), Math.round((row * h) / rows)];
    const [right, bottom] = [Math.round(((at + 1) * w) / columns), Math.round(((row + 1) * h) / rows)];
    paint.fillStyle = `rgb(${rgb.join(" ")})`;
    paint.fillRect(x, y, Math.max(1, right - x - gap), Math.max(1, bottom - y - gap));
  };
  paint.clearRect(0, 0, w, h);
  for (let row = 0; row < rows; row++) {
    for (let at = 0; at < columns; at++) {
      const share = most ? value(row, at) / most : 0;
      cell(row, at, from.map((low, k) => Math.round(low + (to[k] - low) * share)));
    }
  }
  for (const [row, at, share] of marks) {
    cell(row, at, from.map((low, k) => Math.round(low + (mark[k] - low) * (0.35 + 0.65 * share))));
  }
}

/** The row and column under a pointer. */
export function cellAt(canvas, event, rows, columns) {
  const box = canvas.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const at = Math.floor(((event.clientX - box.left) / box.width) * columns);
  return row >= 0 && row < rows && at >= 0 && at < columns ? [row, at] : null;
}

export const number = new Intl.NumberFormat("en");
export function short(value, digits = 1) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]]) {
    if (Math.abs(value) >= size) return `${(value / (unit === "K" ? 1e3 : size)).toFixed(digits)}${unit}`;
  }
  return number.format(Math.abs(value) >= 100 ? Math.round(value) : Math.round(value * 100) / 100);
}
export function bytes(value) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${(value / size).toFixed(value / size < 10 ? 2 : 1)} ${unit}`;
  }
  return `${Math.round(value)} bytes`;
}
export function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(value * 1e3).toFixed(value < 0.01 ? 2 : 0)} ms` : `${(value * 1e6).toFixed(0)} µs`;
}
