// The last values of a few series, and the lines they draw. Pure.

export class History {
  constructor(length = 90) {
    this.length = length;
    this.values = [];
  }

  /** One more value; null where there is none. */
  push(value) {
    this.values.push(value ?? null);
    if (this.values.length > this.length) this.values.shift();
  }

  /** The line in a box, newest at the right edge; gaps where there were no values. */
  path(width, height) {
    return this.#runs(width, height).map((run) => `M${run.join("L")}`).join("");
  }

  /** What is under the line. */
  area(width, height) {
    return this.#runs(width, height)
      .map((run) => `M${run[0].split(" ")[0]} ${height}L${run.join("L")}V${height}Z`).join("");
  }

  /** Stretches without gaps, as points; zero is the bottom, the largest value the top. */
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

/** What happened between two readings of the counters: hit rate, bytes a second; null if nothing. */
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
