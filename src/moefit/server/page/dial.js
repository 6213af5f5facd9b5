// Budget dial between the minimum and the largest useful budget, and pending changes. Pure functions.

export const STEPS = 1000;

/** Bytes at a slider position, 0 to STEPS; the ends are exact. */
export function bytesAt(position, range) {
  return Math.round(range.floor + ((range.top - range.floor) * position) / STEPS);
}

/** Nearest slider position of a size. */
export function positionOf(bytes, range) {
  const span = range.top - range.floor;
  if (span <= 0) return STEPS;
  return Math.min(STEPS, Math.max(0, Math.round(((bytes - range.floor) / span) * STEPS)));
}

/** Smallest difference in bytes that sizes on this dial show: 1/200 of the range. */
export function grain(range) {
  return (range.top - range.floor) / 200;
}

/**
 * Range of the slider, up to the largest useful budget. A larger budget is shown at the end, so
 * that it does not compress the useful range.
 *
 * `full` holds all experts, in the smallest format if there are several; `top` in the best.
 */
export function rangeOf(memory) {
  const { floor, everything, most } = memory;
  return { floor, full: everything, top: Math.max(floor, most) };
}

/** Best format in which all experts fit into these bytes; null if none, or if there is only one. */
export function finest(bytes, everythingIn) {
  const held = Object.entries(everythingIn).filter(([, size]) => size <= bytes);
  return held.length ? held[held.length - 1][0] : null;
}

const NAMED = ["int4", "int8"];

/** Ticks at which all experts fit in a format, away from the ends; common formats have labels. */
export function formatTicks(everythingIn, range) {
  const away = (range.top - range.floor) * 0.05;
  return Object.entries(everythingIn)
    .filter(([, size]) => size > range.floor + away && size < range.top - away)
    .map(([name, bytes]) => ({ bytes, name: NAMED.includes(name) ? name : "" }));
}

/** Round sizes for ticks between the ends and away from them; at most `most`. */
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

/** Parse a size (4.7GiB, 512 MB, 1048576), or return null. The server validates it again. */
export function parseBytes(text) {
  const match = /^\s*(\d*\.?\d+)\s*(?:([kmgt])(i?)b?|b)?\s*$/i.exec(text);
  if (!match) return null;
  const power = match[2] ? "kmgt".indexOf(match[2].toLowerCase()) + 1 : 0;
  const size = Math.floor(Number(match[1]) * (match[3] ? 1024 : 1000) ** power);
  return size > 0 ? size : null;
}

/** Estimate how many experts a budget holds: linear from one per layer to all. */
export function expertsAt(bytes, range, grid) {
  const span = range.full - range.floor;
  const share = span <= 0 ? 1 : Math.min(1, Math.max(0, (bytes - range.floor) / span));
  return Math.floor(grid.rows.length + (grid.experts - grid.rows.length) * share);
}

/**
 * Body of the change request: only what differs from the settings in force, or null.
 *
 * Typed text is sent unchanged, so that the server validates it; slider values are bytes.
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
