// View of throughput, latency and hit rate: figures with sparklines.

import { byId, element, say } from "./dom.js";
import { History, between } from "./history.js";
import { formatBytes, formatRate, formatSeconds, formatShare } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const TILES = [
  ["rate", "Tokens per second"],
  ["ttft", "Time to first token"],
  ["itl", "Time between tokens"],
  ["hits", "Expert hit rate"],
  ["read", "Read from storage"],
];

export class PaceView {
  #tiles = new Map();
  #before = null;

  constructor() {
    for (const [key, label] of TILES) this.#build(key, label);
  }

  /** Show a response of GET /v1/memory received at `now`, in ms. */
  show(memory, now) {
    const { latency, counters } = memory;
    const seconds = this.#before ? (now - this.#before.now) / 1000 : 0;
    const { hitRate, bytesRead } = between(this.#before?.counters, counters, seconds);
    this.#before = { counters, now };
    this.#set("rate", memory.tokens_per_second, formatRate(memory.tokens_per_second), "");
    this.#set("ttft", latency.ttft_p50, formatSeconds(latency.ttft_p50), tail(latency.ttft_p99));
    this.#set("itl", latency.itl_p50, formatSeconds(latency.itl_p50), tail(latency.itl_p99));
    this.#set("hits", hitRate, formatShare(hitRate), this.#lost(counters));
    this.#set("read", bytesRead, bytesRead === null ? "–" : `${formatBytes(bytesRead)}/s`,
      `${formatBytes(counters.bytes_read)} in total`);
  }

  #lost(counters) {
    const lost = counters.substituted_mass;
    return lost > 0 ? `${formatShare(lost)} of router weight substituted` : "";
  }

  #build(key, label) {
    const value = element("b", "", "–");
    const note = element("small");
    const line = document.createElementNS(SVG, "path");
    const spark = document.createElementNS(SVG, "svg");
    spark.setAttribute("viewBox", "0 0 120 30");
    spark.setAttribute("preserveAspectRatio", "none");
    spark.setAttribute("aria-hidden", "true");
    const area = document.createElementNS(SVG, "path");
    area.classList.add("area");
    spark.append(area, line);
    const text = element("div", "", element("h3", "", label), element("p", "", value, note));
    const tile = element("div", `tile ${key}`, text);
    tile.append(spark);
    byId("tiles").append(tile);
    this.#tiles.set(key, { value, note, line, area, history: new History() });
  }

  #set(key, number, text, note) {
    const tile = this.#tiles.get(key);
    tile.history.push(number);
    say(tile.value, text);
    say(tile.note, note);
    tile.line.setAttribute("d", tile.history.path(120, 30));
    tile.area.setAttribute("d", tile.history.area(120, 30));
  }
}

function tail(p99) {
  return p99 == null ? "" : `p99 ${formatSeconds(p99)}`;
}
