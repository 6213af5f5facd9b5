// The dial between floor and all that can be used, and what of it waits to be applied. Pure.

export const STEPS = 1000;

/** Bytes at a position of the slider, 0 to STEPS; the ends are exact. */
export function bytesAt(position, range) {
  return Math.round(range.floor + ((range.top - range.floor) * position) / STEPS);
}

/** The nearest position of these bytes. */
export function positionOf(bytes, range) {
  const span = range.top - range.floor;
  if (span <= 0) return STEPS;
  return Math.min(STEPS, Math.max(0, Math.round(((bytes - range.floor) / span) * STEPS)));
}

/** What sizes on this dial should be told apart by, in bytes: a two-hundredth of its way. */
export function grain(range) {
  return (range.top - range.floor) / 200;
}

/**
 * Where the slider ends: where no more memory is of use. A budget in force beyond it is at its end,
 * so that a large one leaves room on the dial for those that matter.
 *
 * `full` holds every expert; where they may differ in format, in the smallest, and `top` in the best.
 */
export function rangeOf(memory) {
  const { floor, everything, most } = memory;
  return { floor, full: everything, top: Math.max(floor, most) };
}

/** The best format in which these bytes hold every expert; null if in none, or if there is one only. */
export function finest(bytes, everythingIn) {
  const held = Object.entries(everythingIn).filter(([, size]) => size <= bytes);
  return held.length ? held[held.length - 1][0] : null;
}

const NAMED = ["int4", "int8"];

/** Ticks where every expert fits in a format, away from the ends; those with a name are the usual. */
export function formatTicks(everythingIn, range) {
  const away = (range.top - range.floor) * 0.05;
  return Object.entries(everythingIn)
    .filter(([, size]) => size > range.floor + away && size < range.top - away)
    .map(([name, bytes]) => ({ bytes, name: NAMED.includes(name) ? name : "" }));
}

/** Round sizes for ticks, strictly between the ends and away from them; at most `most`. */
export function ticks(range, most = 6) {
  const span = range.top - range.floor;
  if (span <= 0) return [];
  let step = 2 ** Math.floor(Math.log2(span / most));
  while (span / step > most) step *= 2;
  const first = Math.ceil((range.floor + span * 0.05) / step) * step;
  const sizes = [];
  for (let size = first; size < range.top - span * 0.05; size += step) sizes.push(size);
  return sizes;
}

/** Bytes of what was typed (4.7GiB, 512 MB, 1048576), or null. The server has the last word. */
export function parseBytes(text) {
  const match = /^\s*(\d*\.?\d+)\s*(?:([kmgt])(i?)b?|b)?\s*$/i.exec(text);
  if (!match) return null;
  const power = match[2] ? "kmgt".indexOf(match[2].toLowerCase()) + 1 : 0;
  const size = Math.floor(Number(match[1]) * (match[3] ? 1024 : 1000) ** power);
  return size > 0 ? size : null;
}

/** About how many experts a budget holds: slots grow evenly from one a layer to all. */
export function expertsAt(bytes, range, grid) {
  const span = range.full - range.floor;
  const share = span <= 0 ? 1 : Math.min(1, Math.max(0, (bytes - range.floor) / span));
  return Math.floor(grid.rows.length + (grid.experts - grid.rows.length) * share);
}

/**
 * What to ask the server for: only what differs from what is in force, or null if nothing does.
 *
 * The text is sent as it was typed, so that the server judges it, unless it came from the slider.
 */
export function change(wanted, inForce) {
  const body = {};
  if (wanted.bytes !== undefined && wanted.bytes !== inForce.bytes) body.bytes = wanted.bytes;
  if (wanted.mode !== undefined && wanted.mode !== inForce.mode) body.mode = wanted.mode;
  const mode = wanted.mode ?? inForce.mode;
  if (mode === "bounded" && wanted.bound !== undefined && wanted.bound !== inForce.bound) {
    Object.assign(body, { mode, bound: wanted.bound });
  }
  return Object.keys(body).length ? body : null;
}
