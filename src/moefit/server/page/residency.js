// Residency of experts as rows of cells. Pure functions.

/** Format of the checkpoint's own precision. */
export const NATIVE = "native";

/**
 * Convert the blocks of GET /v1/memory to a grid.
 *
 * A cell's `shade` is its importance relative to the largest in its layer, 0 to 1; `rank` counts
 * from 1. A row's `held`: name of the checkpoint's codes that memory holds as the format "native",
 * empty if it holds values. `formats`: number of resident experts and fill level by the name shown.
 * `mixed`: there are several. `stored`: all are as the checkpoint has them.
 */
export function grid(blocks, checkpoint = null) {
  const labels = shortNames(blocks.map((block) => block.name));
  const rows = blocks.map((block, index) => row(block, labels[index], heldIn(checkpoint, block.name)));
  const formats = new Map();
  let stored = true;
  for (const { cells, held } of rows) {
    for (const { format } of cells.filter((cell) => cell.resident && cell.format)) {
      const name = formatName(format, held) || NATIVE;
      formats.set(name, { count: (formats.get(name)?.count ?? 0) + 1, level: level(format) });
      stored &&= format === NATIVE;
    }
  }
  return {
    rows,
    columns: Math.max(0, ...rows.map((one) => one.cells.length)),
    experts: sum(rows, (one) => one.cells.length),
    resident: sum(rows, (one) => one.resident),
    slots: sum(rows, (one) => one.slots),
    formats: new Map([...formats].sort(([, a], [, b]) => b.level - a.level)),
    mixed: formats.size > 1,
    stored,
  };
}

function heldIn(checkpoint, name) {
  return checkpoint?.held_in[name]?.join(" and ") ?? "";
}

function row(block, label, held) {
  const resident = new Set(block.resident);
  const most = Math.max(...block.importance, 0);
  const order = block.importance.map((_, expert) => expert);
  order.sort((a, b) => block.importance[b] - block.importance[a] || a - b);
  const cells = block.importance.map((importance, expert) => ({
    expert,
    importance,
    shade: most > 0 ? importance / most : 0,
    rank: 0,
    resident: resident.has(expert),
    format: block.formats?.[expert] ?? null,
  }));
  order.forEach((expert, place) => { cells[expert].rank = place + 1; });
  return { name: block.name, label, slots: block.slots, resident: resident.size, cells, order, held };
}

function sum(items, value) {
  return items.reduce((total, item) => total + value(item), 0);
}

/** Layer numbers from module names, with a prefix where numbers repeat. */
export function shortNames(names) {
  const short = names.map((name) => /\d+/.exec(name)?.[0] ?? name);
  if (new Set(short).size === short.length) return short;
  const parts = names.map((name) => (/(?:en|de)coder/.exec(name) ?? name.split("."))[0]);
  const prefixed = parts.map((part, index) => `${part.slice(0, 3)} ${short[index]}`);
  return new Set(prefixed).size === prefixed.length ? prefixed : names.map((_, index) => String(index));
}

/** Fill level of a cell in this format, 0 to 1; the checkpoint's own format is full. */
export function level(format) {
  const bits = /^int(\d+)/.exec(format ?? "");
  return bits ? Math.min(1, 0.04 + 0.095 * Number(bits[1])) : 1;
}

/** Describe the map in a sentence. */
export function summary(map) {
  const full = map.rows.filter((one) => one.resident === one.cells.length).length;
  const covered = sum(map.rows, (one) => (one.cells[one.order[0]]?.resident ? 1 : 0));
  return `${map.resident} of ${map.experts} experts are in memory, in ${map.rows.length} layers of ` +
    `up to ${map.columns}; ${full} layers are complete. The most important expert is in memory in ` +
    `${covered} of ${map.rows.length} layers.`;
}

/** Name of a cell's format for readers; empty for values in the model's own precision. */
export function formatName(format, held) {
  return format === NATIVE ? held : format ?? "";
}

/** Describe one cell. */
export function describe(one, cell) {
  const name = formatName(cell.format, one.held);
  const where = cell.resident ? `in memory${name && ` as ${name}`}` : "in storage";
  return `Layer ${one.label}, expert ${cell.expert}: ${where}; importance ` +
    `${cell.importance.toFixed(3)}, ${ordinal(cell.rank)} of ${one.cells.length}`;
}

function ordinal(rank) {
  const tail = rank % 100 > 10 && rank % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][rank % 10] ?? "th";
  return `${rank}${tail}`;
}
