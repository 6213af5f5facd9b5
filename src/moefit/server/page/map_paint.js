// Paint the residency map on a canvas: layout, colours and cells.
//
// Experts in memory are squares, filled in proportion to the bits of their format; experts in
// storage are dots. Darker (in dark mode: brighter) is more important.

import { level } from "./residency.js";

const LEVELS = 24;
export const TOP = 18;

/** Cell sizes in CSS pixels for a grid in a box of this width; `dots` is the device pixel ratio. */
export function geometry(rows, columns, width, dots = 1) {
  const fitting = Math.floor((width / Math.max(1, columns)) * dots) / dots;
  const x = Math.max(4, Math.min(44, fitting));
  const tall = Math.floor(520 / Math.max(1, rows));
  const y = Math.max(8, Math.min(Math.max(10, Math.round(x * 1.5)), 30, tall));
  const gap = Math.min(x, y) >= 14 ? 4 : Math.min(x, y) >= 9 ? 2 : 1;
  return { x, y, gap, width: x * columns, height: TOP + y * rows };
}

/** Colours from CSS variables, with ramps indexed by importance. */
export function palette(style) {
  const colour = (name) => style.getPropertyValue(name).trim();
  return {
    inside: ramp(colour("--in-low"), colour("--in-high")),
    outside: ramp(colour("--out-low"), colour("--out-high")),
    edge: colour("--in-edge"),
    empty: colour("--in-empty"),
    text: colour("--muted"),
    cursor: colour("--ink"),
    font: colour("--sans"),
  };
}

function ramp(low, high) {
  const [a, b] = [low, high].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: LEVELS }, (_, step) => {
    const share = step / (LEVELS - 1);
    return `rgb(${a.map((from, i) => Math.round(from + (b[i] - from) * share)).join(" ")})`;
  });
}

function shadeOf(colours, cell) {
  return colours[Math.round(Math.sqrt(Math.min(1, Math.max(0, cell.shade))) * (LEVELS - 1))];
}

/** Paint column numbers, as many as fit, or the name of the sort order. */
export function paintAxis(context, size, columns, paint, order = "") {
  const step = [1, 2, 4, 8, 16, 32, 64].find((one) => one * size.x >= 28) ?? 128;
  context.fillStyle = paint.text;
  context.font = `11px ${paint.font}`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  if (order) {
    context.fillText(order, 2, 8);
    return;
  }
  context.textAlign = "center";
  for (let column = 0; column < columns; column += step) {
    const middle = Math.max(context.measureText(String(column)).width / 2, (column + 0.5) * size.x);
    context.fillText(String(column), middle, 8);
  }
}

/** Paint one cell; `moved` is the progress of its transition, 0 to 1. */
export function paintCell(context, size, paint, place, cell, { mixed, moved }) {
  const left = place.column * size.x + size.gap / 2;
  const top = TOP + place.row * size.y + size.gap / 2;
  const box = { left, top, width: size.x - size.gap, height: size.y - size.gap };
  if (cell.resident) paintSquare(context, paint, grown(box, 0.3 + 0.7 * moved), cell, mixed);
  else paintDot(context, paint, box, cell, 2 - moved);
}

function grown(box, share) {
  const width = box.width * share;
  const height = box.height * share;
  return { left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height };
}

function paintSquare(context, paint, box, cell, mixed) {
  const full = mixed ? level(cell.format) : 1;
  const filled = { ...box, top: box.top + box.height * (1 - full), height: box.height * full };
  const shade = shadeOf(paint.inside, cell);
  if (Math.min(box.width, box.height) < 8) {
    if (full < 1) fillBox(context, paint.empty, box);
    fillBox(context, shade, filled);
    return;
  }
  context.save();
  shape(context, box);
  context.clip();
  fillBox(context, paint.empty, box);
  fillBox(context, shade, filled);
  context.restore();
  context.strokeStyle = paint.edge;
  context.lineWidth = 1;
  shape(context, { left: box.left + 0.5, top: box.top + 0.5, width: box.width - 1, height: box.height - 1 });
  context.stroke();
}

function fillBox(context, colour, { left, top, width, height }) {
  context.fillStyle = colour;
  context.fillRect(left, top, width, height);
}

function shape(context, { left, top, width, height }) {
  context.beginPath();
  context.roundRect(left, top, width, height, Math.min(4, width / 5));
}

function paintDot(context, paint, box, cell, swell) {
  const radius = Math.max(1, Math.min(5, Math.min(box.width, box.height) * 0.19)) * swell;
  const x = box.left + box.width / 2;
  const y = box.top + box.height / 2;
  context.fillStyle = shadeOf(paint.outside, cell);
  if (radius <= 1.3) {
    context.fillRect(x - 1, y - 1, 2, 2);
    return;
  }
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

/** Paint the outline of the selected cell. */
export function paintCursor(context, size, paint, place) {
  context.strokeStyle = paint.cursor;
  context.lineWidth = 2;
  context.strokeRect(place.column * size.x + 1, TOP + place.row * size.y + 1, size.x - 2, size.y - 2);
}
