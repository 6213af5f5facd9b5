// Number formatting. Pure functions.

const UNITS = ["B", "KiB", "MiB", "GiB"];

/** Format a size with three significant digits and a binary unit, like the command line: 4.70 GiB. */
export function formatBytes(size) {
  let power = 0;
  while (Math.abs(size) >= 1024 && power < UNITS.length - 1) {
    size /= 1024;
    power += 1;
  }
  return `${size.toFixed(power ? decimals(size) : 0)} ${UNITS[power]}`;
}

function decimals(size) {
  return Math.abs(size) < 10 ? 2 : Math.abs(size) < 100 ? 1 : 0;
}

/** Like formatBytes, with enough decimals to distinguish sizes that differ by `step`. */
export function formatFine(size, step) {
  const power = Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, size)) / 10)));
  const scaled = size / 1024 ** power;
  const needed = step > 0 ? Math.ceil(Math.log10(1024 ** power / step)) : 0;
  return `${scaled.toFixed(power ? Math.min(3, Math.max(decimals(scaled), needed)) : 0)} ${UNITS[power]}`;
}

/** Format a whole number with thousands separators; a dash for null. */
export function formatCount(value) {
  if (value == null) return "–";
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** Format a rate with one decimal below 100; a dash for null. */
export function formatRate(value) {
  return value == null ? "–" : value >= 100 ? formatCount(value) : value.toFixed(1);
}

/** Format seconds, as ms below one second; a dash for null. */
export function formatSeconds(value) {
  if (value == null) return "–";
  if (value >= 1) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const ms = value * 1000;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/** Format a fraction in percent; a dash for null. Only 1 is 100% and only 0 is 0%. */
export function formatShare(value) {
  if (value == null) return "–";
  const percent = value * 100;
  const near = (percent > 99.9 && percent < 100) || (percent > 0 && percent < 0.1);
  if (near) return percent > 50 ? ">99.9%" : "<0.1%";
  return `${percent.toFixed(percent === 100 || percent === 0 ? 0 : 1)}%`;
}
