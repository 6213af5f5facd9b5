// The memory breakdown as segments of one bar. Pure functions.

export const PARTS = [
  ["process", "Interpreter and libraries"],
  ["tokenizer", "Tokenizer"],
  ["weights", "Dense weights"],
  ["kv_cache", "KV cache"],
  ["workspace", "Workspace"],
  ["staging", "Staging"],
  ["slots", "Experts"],
  ["free", "Free"],
];

/**
 * Lay out GET /v1/memory along one axis from 0 to the largest size, in bytes.
 *
 * Without a limit, the budget is the largest useful one. `parts` are adjacent; their `from` and
 * `to` and the marks are fractions of the axis.
 */
export function breakdown(memory) {
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

/** Describe the breakdown in a sentence, for screen readers. */
export function sentence(view, formatBytes) {
  const parts = view.parts.map((part) => `${part.label} ${formatBytes(part.bytes)}`).join(", ");
  return `Budget ${formatBytes(view.total)}: ${parts}. The process uses ${formatBytes(view.held)}; ` +
    `the minimum budget is ${formatBytes(view.floor)}.`;
}

/** Describe the plan and its predicted cost; empty without a plan. */
export function planned(plan) {
  if (!plan) return "";
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const sign = plan.loss < 0 ? "" : "+";
  return `Plan: ${plan.words}. Predicted: perplexity ${sign}${percent(plan.loss)} ` +
    `(±${percent(plan.margin)}), ${plan.tokens_per_second.toFixed(1)} tokens/s.`;
}

/** Describe drafted tokens in a sentence; empty where none are drafted. */
export function drafted(speculation, formatCount) {
  if (!speculation || !(speculation.active || speculation.drafts)) return "";
  const { drafted: tokens, accepted, drafts } = speculation;
  if (!tokens) return "No drafted tokens were verified yet.";
  const share = Math.round((100 * accepted) / tokens);
  const each = (1 + accepted / drafts).toFixed(1);
  return `${formatCount(accepted)} of ${formatCount(tokens)} drafted tokens were right (${share}%), ` +
    `${each} tokens a step that verified a draft.`;
}

/** Describe how many tokens the KV cache holds, and to how many it may grow. */
export function tokensHeld(memory, formatCount) {
  const [used, now, most] = [memory.kv_tokens_used, memory.kv_tokens, memory.kv_tokens_most];
  const more = most > now ? `, up to ${formatCount(most)}` : "";
  return `${formatCount(used)} of ${formatCount(now)} tokens${more}`;
}

/** Describe the reuse of keys and values in a sentence. */
export function reuse(cache, formatCount) {
  if (!cache) return "";
  if (!cache.active) return `Prefixes are not reused: ${cache.reason}.`;
  const share = cache.queries ? ` (${Math.round((100 * cache.hits) / cache.queries)}%)` : "";
  const held = formatCount(cache.tokens + cache.shared);
  return `Prefixes: ${formatCount(cache.hits)} of ${formatCount(cache.queries)} prompt tokens ` +
    `reused${share}, ${held} tokens kept.`;
}
