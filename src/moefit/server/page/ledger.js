// The memory ledger as segments of one bar. Pure.

export const PARTS = [
  ["process", "Interpreter and libraries"],
  ["tokenizer", "Tokenizer"],
  ["weights", "Weights beside experts"],
  ["kv_cache", "KV cache"],
  ["workspace", "Workspace"],
  ["staging", "Staging"],
  ["slots", "Experts"],
  ["free", "Free"],
];

/**
 * What GET /v1/memory says, along one axis from 0 to the largest of its figures, in bytes.
 *
 * Without a limit the budget is the most that is of use. `parts` lie one behind the other; their
 * `from` and `to` and the marks are shares of the axis.
 */
export function ledger(memory) {
  const { budget, floor, most, process_bytes: held, slot_bytes: slots } = memory;
  const limited = budget.total != null;
  const total = limited ? budget.total : most;
  const bytes = { ...budget, slots };
  const fixed = PARTS.slice(0, 6).reduce((sum, [key]) => sum + bytes[key], 0);
  bytes.free = Math.max(0, total - fixed - slots);
  const axis = Math.max(most, total, held, fixed + slots);
  let from = 0;
  const parts = PARTS.map(([key, label]) => {
    const part = { key, label, bytes: bytes[key], from: from / axis, to: (from + bytes[key]) / axis };
    from += bytes[key];
    return part;
  });
  return {
    total, limited, floor, most, axis, parts, held, peak: memory.peak_process_bytes,
    marks: { floor: floor / axis, held: held / axis, most: most / axis },
  };
}

/** The ledger in a sentence, for people who do not see the bar. */
export function sentence(view, formatBytes) {
  const parts = view.parts.map((part) => `${part.label} ${formatBytes(part.bytes)}`).join(", ");
  return `Budget ${formatBytes(view.total)}: ${parts}. The process holds ${formatBytes(view.held)}; ` +
    `the floor is ${formatBytes(view.floor)}.`;
}

/** What was planned, and what it was said to cost; nothing where nothing is planned. */
export function planned(plan) {
  if (!plan) return "";
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const sign = plan.loss < 0 ? "" : "+";
  return `Planned: ${plan.words}. Predicted: perplexity ${sign}${percent(plan.loss)}, give or take ` +
    `${percent(plan.margin)}; ${plan.tokens_per_second.toFixed(1)} tokens/s.`;
}
