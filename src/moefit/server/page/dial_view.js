// View of the budget dial. User input is kept until it is applied or undone; the settings in force
// come from the server and stay visible.

import { byId, element, say } from "./dom.js";
import { STEPS, bytesAt, change, expertsAt, finest, formatTicks, grain, parseBytes, positionOf, rangeOf, ticks } from "./dial.js";
import { formatCount, formatFine } from "./numbers.js";

export class DialView {
  #form = byId("dial");
  #range = byId("dial-range");
  #box = byId("dial-box");
  #bound = byId("bound");
  #apply;
  #ends = null;
  #inForce = null;
  #formats = {};
  #map = null;
  #wanted = {};
  #busy = false;

  /** apply(change) returns a promise of the new /v1/memory. */
  constructor(apply) {
    this.#apply = apply;
    this.#range.max = String(STEPS);
    this.#range.addEventListener("input", () => {
      this.#want({ bytes: bytesAt(Number(this.#range.value), this.#ends) });
      this.#box.value = this.#text(this.#wanted.bytes);
    });
    this.#box.addEventListener("input", () => this.#want({ bytes: this.#typed() }));
    this.#bound.addEventListener("input", () => {
      this.#want({ bound: this.#bound.value === "" ? undefined : Number(this.#bound.value) });
    });
    for (const radio of this.#form.elements.mode) {
      radio.addEventListener("change", () => this.#want({ mode: radio.value }));
    }
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    new ResizeObserver(() => this.#ends && this.#scale()).observe(byId("ticks"));
    byId("undo").addEventListener("click", () => this.#undo());
    this.#form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#undo();
    });
  }

  /** Show the settings in force; user input stays unchanged. */
  show(memory, map) {
    const ends = rangeOf(memory);
    const moved = ends.floor !== this.#ends?.floor || ends.top !== this.#ends?.top;
    this.#ends = ends;
    this.#map = map;
    this.#formats = memory.everything_in;
    const { mode, prefill, bound } = memory;
    this.#inForce = { bytes: memory.budget.total ?? memory.most, mode, prefill, bound };
    if (moved) this.#scale();
    this.#refresh();
  }

  #typed() {
    const text = this.#box.value.trim();
    if (text === "") return undefined;
    return text === this.#text(this.#inForce.bytes) ? this.#inForce.bytes : text;
  }

  #want(part) {
    Object.assign(this.#wanted, part);
    this.#showResult("");
    this.#refresh();
  }

  #undo() {
    this.#settle();
    this.#showResult("");
    this.#refresh();
  }

  /** Discard user input. */
  #settle() {
    this.#wanted = {};
    this.#bound.value = this.#inForce.bound;
    this.#box.value = this.#text(this.#inForce.bytes);
  }

  #refresh() {
    if (!this.#inForce) return;
    const { bytes = this.#inForce.bytes, mode = this.#inForce.mode } = this.#wanted;
    const size = typeof bytes === "number" ? bytes : parseBytes(bytes);
    const pending = change(this.#wanted, this.#inForce) !== null;
    if (this.#wanted.bytes === undefined && document.activeElement !== this.#box) {
      this.#box.value = this.#text(this.#inForce.bytes);
    }
    if (this.#wanted.bound === undefined && document.activeElement !== this.#bound) {
      this.#bound.value = this.#inForce.bound;
    }
    if (size !== null) this.#range.value = String(positionOf(size, this.#ends));
    this.#range.setAttribute("aria-valuetext", this.#describe(size));
    for (const radio of this.#form.elements.mode) radio.checked = radio.value === mode;
    byId("bound-field").hidden = mode !== "bounded";
    byId("apply").disabled = this.#busy || !pending;
    byId("undo").hidden = !pending;
    this.#form.classList.toggle("pending", pending);
    this.#groove(size);
    say("dial-note", this.#note(pending, size, mode));
  }

  #describe(size) {
    if (size === null) return "invalid size";
    return `${this.#text(size)}, ${this.#experts(size)}`;
  }

  #experts(size) {
    const format = finest(size, this.#formats);
    const all = formatCount(this.#map.experts);
    if (format === Object.keys(this.#formats).pop()) return `all ${all} experts at ${format} precision`;
    if (format !== null) return `all ${all} experts, at ${format} or better`;
    return `about ${formatCount(expertsAt(size, this.#ends, this.#map))} of ${all} experts`;
  }

  #note(pending, size, mode) {
    if (!pending) return `${MODES[mode] ?? ""}${this.#prefill()}`;
    if (size === null) return "Enter a size, such as 4.7GiB or 512MB.";
    const current = `Current: ${this.#text(this.#inForce.bytes)}, ${this.#inForce.mode}.`;
    if (size < this.#ends.floor) return `Below the minimum budget of ${this.#text(this.#ends.floor)}. ${current}`;
    return `Not applied yet: ${this.#experts(size)}, ${mode}. ${current}`;
  }

  #prefill() {
    const { mode, prefill } = this.#inForce;
    return prefill === mode ? "" : ` Prompts are processed in ${prefill} mode.`;
  }

  #groove(size) {
    const share = (bytes) => (100 * positionOf(bytes, this.#ends)) / STEPS;
    const force = share(this.#inForce.bytes);
    byId("in-force").style.width = `${force}%`;
    const wanted = size === null ? force : share(size);
    byId("wanted").style.left = `${Math.min(force, wanted)}%`;
    byId("wanted").style.width = `${Math.abs(force - wanted)}%`;
  }

  #text(size) {
    return formatFine(size, grain(this.#ends));
  }

  #scale() {
    const { floor, top } = this.#ends;
    const box = byId("ticks");
    const best = Object.keys(this.#formats).pop();
    const all = best ? `all ${best}` : "all";
    const made = [tick("first", 0, `min ${this.#text(floor)}`), tick("last", 1, `${all} ${this.#text(top)}`)];
    const between = this.#ticks().map(({ bytes, text }) => tick("", (bytes - floor) / (top - floor), text));
    box.replaceChildren(...made, ...between);
    const [left, right] = [made[0].offsetWidth + 8, box.clientWidth - made[1].offsetWidth - 8];
    let free = left;
    for (const one of between) {
      const from = one.offsetLeft - one.offsetWidth / 2;
      const fits = one.textContent && from >= free && from + one.offsetWidth <= right;
      one.classList.toggle("bare", !fits);
      if (fits) free = from + one.offsetWidth + 12;
    }
  }

  /** Sizes at which all experts fit in a format, or round sizes if there is only one format. */
  #ticks() {
    const formats = formatTicks(this.#formats, this.#ends);
    if (formats.length) {
      return formats.map(({ bytes, name }) => ({ bytes, text: name && `${name} ${this.#text(bytes)}` }));
    }
    return ticks(this.#ends).map((bytes) => ({ bytes, text: this.#text(bytes).replace(/\.?0+ /, " ") }));
  }

  async #send() {
    const body = change(this.#wanted, this.#inForce);
    if (!body) return;
    this.#busy = true;
    this.#showResult("Applying …");
    this.#refresh();
    try {
      const memory = await this.#apply(body);
      this.#settle();
      const slots = memory.blocks.reduce((sum, block) => sum + block.slots, 0);
      const size = this.#text(memory.budget.total ?? memory.most);
      this.#showResult(`Applied: ${size}, ${memory.mode}; slots for ${formatCount(slots)} of ${formatCount(this.#map.experts)} experts.`);
    } catch (error) {
      this.#showResult(error.message, true);
    } finally {
      this.#busy = false;
      this.#refresh();
    }
  }

  #showResult(text, wrong = false) {
    byId("dial-answer").classList.toggle("wrong", wrong);
    byId("dial-answer").setAttribute("role", wrong ? "alert" : "status");
    say("dial-answer", text);
    byId("dial-note").hidden = text !== "";
  }
}

function tick(kind, share, text) {
  const made = element("span", kind, element("span", "", text));
  made.style.left = `${share * 100}%`;
  return made;
}

const MODES = {
  exact: "exact: missing experts are fetched; the output is the model's own.",
  bounded: "bounded: a resident expert may replace a missing one if little router weight is lost.",
  virtual: "virtual: only experts in memory are used; nothing waits for storage.",
};
