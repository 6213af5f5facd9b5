// View of the residency map: pointer and keyboard selection, and animated changes.

import { byId, element, say } from "./dom.js";
import { formatCount } from "./numbers.js";
import { NATIVE, describe, summary } from "./residency.js";
import { TOP, geometry, paintAxis, paintCell, paintCursor, palette } from "./map_paint.js";

const MOVE_MS = 380;
const HINT = "Point at an expert or use the arrow keys for details.";

export class MapView {
  #canvas = byId("map-canvas");
  #box = byId("map-scroll");
  #calm = matchMedia("(prefers-reduced-motion: reduce)");
  #map = null;
  #cursor = null;
  #moves = new Map();
  #frame = 0;
  #size = null;

  constructor() {
    byId("map-sort").addEventListener("change", () => this.#layOut());
    new ResizeObserver(() => this.#layOut()).observe(this.#box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#layOut());
    const point = (event) => this.#move(this.#placeOf(event));
    this.#canvas.addEventListener("pointermove", point);
    this.#canvas.addEventListener("pointerdown", point);
    this.#canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== this.#canvas) this.#move(null);
    });
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("focus", () => {
      if (!this.#cursor && this.#canvas.matches(":focus-visible")) this.#move({ row: 0, column: 0 });
    });
    this.#canvas.addEventListener("blur", () => this.#move(null));
    say("map-readout", HINT);
  }

  /** Show a grid. */
  show(map) {
    this.#noteMoves(map);
    const laidOut = this.#map?.columns === map.columns && this.#map.rows.length === map.rows.length;
    this.#map = map;
    say("map-count", formatCount(map.resident));
    const slots = map.slots > map.resident ? `, ${formatCount(map.slots)} slots` : "";
    say("map-of", `of ${formatCount(map.experts)}${slots}`);
    say("map-summary", summary(map));
    this.#legend();
    if (laidOut) this.#repaint();
    else this.#layOut();
  }

  #noteMoves(map) {
    if (!this.#map || this.#calm.matches) return;
    const now = performance.now();
    map.rows.forEach((row, index) => row.cells.forEach((cell, expert) => {
      const before = this.#map.rows[index]?.cells[expert];
      if (before && before.resident !== cell.resident) this.#moves.set(`${index} ${expert}`, now);
    }));
  }

  #layOut() {
    if (!this.#map || !this.#map.rows.length) return;
    const { rows, columns } = this.#map;
    document.body.classList.toggle("many", columns > 32);
    const labels = byId("map-labels");
    const tails = byId("map-tails");
    labels.replaceChildren(...rows.map((row) => element("span", "", row.label)));
    tails.replaceChildren(...rows.map(() => element("span")));
    const beside = labels.offsetWidth + 58;
    this.#size = geometry(rows.length, columns, this.#box.clientWidth - beside, devicePixelRatio);
    const every = Math.ceil(13 / this.#size.y);
    for (const column of [labels, tails]) {
      column.style.paddingTop = `${TOP}px`;
      [...column.children].forEach((child, index) => {
        child.style.height = `${this.#size.y}px`;
        child.classList.toggle("unseen", index % every !== 0);
      });
    }
    this.#repaint();
  }

  #tails() {
    [...byId("map-tails").children].forEach((child, index) => {
      const row = this.#map.rows[index];
      say(child, `${row.resident}/${row.cells.length}`);
    });
  }

  #repaint() {
    this.#tails();
    this.#readOut();
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame((now) => this.#paint(now));
  }

  #paint(now) {
    const size = this.#size;
    const scale = devicePixelRatio || 1;
    const context = this.#canvas.getContext("2d");
    this.#canvas.width = Math.round(size.width * scale);
    this.#canvas.height = Math.round(size.height * scale);
    this.#canvas.style.width = `${size.width}px`;
    this.#canvas.style.height = `${size.height}px`;
    context.scale(scale, scale);
    const paint = palette(getComputedStyle(document.documentElement));
    paintAxis(context, size, this.#map.columns, paint, byId("map-sort").checked ? "most important first" : "");
    this.#map.rows.forEach((row, index) => {
      for (let column = 0; column < row.cells.length; column += 1) {
        const cell = this.#cellAt({ row: index, column });
        const moved = this.#moved(index, cell.expert, now);
        paintCell(context, size, paint, { row: index, column }, cell, { mixed: this.#map.mixed, moved });
      }
    });
    if (this.#cursor) paintCursor(context, size, paint, this.#cursor);
    if (this.#moves.size) this.#frame = requestAnimationFrame((next) => this.#paint(next));
  }

  #moved(row, expert, now) {
    const key = `${row} ${expert}`;
    const since = this.#moves.get(key);
    if (since === undefined) return 1;
    const share = Math.max(0, (now - since) / MOVE_MS);
    if (share >= 1) this.#moves.delete(key);
    return 1 - (1 - Math.min(1, share)) ** 3;
  }

  #cellAt({ row, column }) {
    const one = this.#map.rows[row];
    return one.cells[byId("map-sort").checked ? one.order[column] : column];
  }

  #placeOf(event) {
    const bounds = this.#canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - bounds.top - TOP) / this.#size.y);
    const column = Math.floor((event.clientX - bounds.left) / this.#size.x);
    return this.#map.rows[row]?.cells[column] ? { row, column } : null;
  }

  #key(event) {
    const { row, column } = this.#cursor ?? { row: 0, column: 0 };
    const last = this.#map.rows[row].cells.length - 1;
    const places = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, last],
      PageUp: [0, column], PageDown: [this.#map.rows.length - 1, column],
    };
    if (!places[event.key]) return;
    event.preventDefault();
    const [nextRow, nextColumn] = places[event.key];
    if (this.#map.rows[nextRow]?.cells[nextColumn]) this.#move({ row: nextRow, column: nextColumn });
    this.#keepInView();
  }

  #keepInView() {
    const left = this.#cursor.column * this.#size.x;
    const seen = this.#box.clientWidth - byId("map-labels").offsetWidth - byId("map-tails").offsetWidth;
    if (left < this.#box.scrollLeft) this.#box.scrollLeft = left;
    else if (left + this.#size.x > this.#box.scrollLeft + seen) {
      this.#box.scrollLeft = left + this.#size.x - seen;
    }
  }

  #move(place) {
    if (place?.row === this.#cursor?.row && place?.column === this.#cursor?.column) return;
    this.#cursor = place;
    this.#repaint();
  }

  #readOut() {
    if (this.#cursor && !this.#map.rows[this.#cursor.row]?.cells[this.#cursor.column]) this.#cursor = null;
    const text = this.#cursor ? describe(this.#map.rows[this.#cursor.row], this.#cellAt(this.#cursor)) : HINT;
    say("map-readout", text);
  }

  #legend() {
    const items = [
      [shades("square"), "in memory"],
      [shades("dot"), "in storage"],
      ["", "stronger colour: more important within its layer"],
    ];
    for (const [name, { count, level }] of this.#map.mixed ? this.#map.formats : []) {
      const swatch = element("i", "square format", element("i"));
      swatch.firstChild.style.height = `${level * 100}%`;
      items.push([swatch, `${name} × ${formatCount(count)}`]);
    }
    const [only] = this.#map.formats.keys();
    if (!this.#map.mixed && only && only !== NATIVE) {
      items[0][1] = `in memory, all as ${only}${this.#map.stored ? ", as the checkpoint has them" : ""}`;
    }
    const shown = items.map(([, text]) => text).join("|");
    if (byId("map-legend").dataset.shown === shown) return;
    byId("map-legend").dataset.shown = shown;
    byId("map-legend").replaceChildren(...items.map(([swatch, text]) => element("span", "", swatch, text)));
  }
}

function shades(kind) {
  return element("i", "shades", ...["low", "half", "high"].map((shade) => element("i", `${kind} ${shade}`)));
}
