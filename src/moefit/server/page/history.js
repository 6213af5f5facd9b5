// Recent values of a series and their sparkline. Pure functions.

export class History {
  constructor(length = 90) {
    this.length = length;
    this.values = [];
  }

  /** Append a value, or null for a gap. */
  push(value) {
    this.values.push(value ?? null);
    if (this.values.length > this.length) this.values.shift();
  }

  /** SVG path of the line, newest value at the right edge, with gaps for null. */
  path(width, height) {
    return this.#runs(width, height).map((run) => `M${run.join("L")}`).join("");
  }

  /** SVG path of the area under the line. */
  area(width, height) {
    return this.#runs(width, height)
      .map((run) => `M${run[0].split(" ")[0]} ${height}L${run.join("L")}V${height}Z`).join("");
  }

  /** Points of each run without gaps, scaled from zero to the largest value. */
  #runs(width, height) {
    const top = Math.max(...this.values.filter((value) => value !== null), 0) || 1;
    const step = width / (this.length - 1);
    const first = this.length - this.values.length;
    const runs = [];
    let open = null;
    this.values.forEach((value, index) => {
      if (value === null) {
        open = null;
        return;
      }
      if (!open) runs.push((open = []));
      const y = height - 1 - (value / top) * (height - 2);
      open.push(`${((first + index) * step).toFixed(1)} ${y.toFixed(1)}`);
    });
    return runs;
  }
}

/** Hit rate and bytes per second between two readings of the counters; null without data. */
export function between(before, now, seconds) {
  if (!before || seconds <= 0) return { hitRate: null, bytesRead: null };
  const hits = now.hits - before.hits;
  const all = hits + now.fetches - before.fetches;
  const read = now.bytes_read - before.bytes_read;
  return {
    hitRate: all > 0 && hits >= 0 ? hits / all : null,
    bytesRead: read >= 0 ? read / seconds : null,
  };
}
