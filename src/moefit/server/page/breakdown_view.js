// View of the memory breakdown: the bar, its marks, and the size of each part.

import { byId, element, say } from "./dom.js";
import { breakdown, drafted, planned, reuse, sentence, tokensHeld } from "./breakdown.js";
import { grain, rangeOf } from "./dial.js";
import { formatBytes, formatCount, formatFine } from "./numbers.js";

export class BreakdownView {
  #bar = byId("bar");
  #list = byId("parts");
  #rows = new Map();

  /** Show a response of GET /v1/memory. */
  show(memory) {
    const view = breakdown(memory);
    if (!this.#rows.size) this.#build(view);
    for (const part of view.parts) this.#part(part, memory);
    this.#mark("floor", view.marks.floor, formatBytes(view.floor));
    this.#mark("held", view.marks.held, `${formatBytes(view.held)}, peak ${formatBytes(view.peak)}`);
    const [from, to] = [view.marks.floor * 100, view.marks.most * 100];
    byId("funnel").setAttribute("points", `${from},0 ${to},0 100,100 0,100`);
    byId("breakdown").setAttribute("aria-label", sentence(view, formatBytes));
    say("plan", planned(memory.plan));
    say("prefixes", reuse(memory.prefix_cache, formatCount));
    say("drafts", drafted(memory.speculation, formatCount));
    say("budget", formatFine(view.total, grain(rangeOf(memory))));
    const best = Object.keys(memory.everything_in).pop();
    const every = best ? `all experts at ${best} precision` : "all experts";
    say("budget-note", view.limited
      ? `of ${formatFine(view.most, grain(rangeOf(memory)))} for ${every}` : `no limit, ${every} in memory`);
  }

  #build(view) {
    for (const part of view.parts) {
      const segment = element("div", `part ${part.key}`, element("i"));
      this.#bar.append(segment);
      this.#rows.set(part.key, { segment, value: this.#row(part.key, part.label) });
    }
    this.#rows.set("floor", { value: this.#row("floor", "Minimum budget") });
    this.#rows.set("held", { value: this.#row("held", "Process") });
  }

  #row(key, label) {
    const value = element("dd");
    this.#list.append(element("div", "", element("dt", "", element("i", key), label), value));
    return value;
  }

  #part({ key, bytes, from, to }, memory) {
    const { segment, value } = this.#rows.get(key);
    segment.style.left = `${from * 100}%`;
    segment.style.width = `${(to - from) * 100}%`;
    if (key === "kv_cache" && memory.kv_tokens) {
      segment.firstChild.style.width = `${(100 * memory.kv_tokens_used) / memory.kv_tokens}%`;
    }
    const used = key === "kv_cache" && memory.kv_tokens ? `, ${tokensHeld(memory, formatCount)}` : "";
    segment.title = `${formatBytes(bytes)}${used}`;
    say(value, `${formatBytes(bytes)}${used}`);
  }

  #mark(key, share, text) {
    byId(`mark-${key}`).style.left = `${share * 100}%`;
    say(this.#rows.get(key).value, text);
  }
}
