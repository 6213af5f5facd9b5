// What the list of requests says, from GET /v1/requests. Pure functions.

import { formatCount, formatSeconds, formatShare } from "../numbers.js";

/** Describe what one request does and what it waits for. */
export function progress(request) {
  const { state, prompt_tokens: prompt, computed_tokens: computed } = request;
  const most = formatCount(request.max_tokens);
  const choices = request.choices > 1 ? `, ${formatCount(request.choices)} choices` : "";
  const texts = {
    waiting: `waits for ${request.waits_for || "its turn"}`,
    prompt: request.waits_for ? `waits for ${request.waits_for}`
      : `reading the prompt, ${formatCount(Math.min(computed, prompt))} of ${formatCount(prompt)} tokens`,
    answer: `answering, ${formatCount(request.generated_tokens)} of at most ${most} tokens`,
    ended: "ending",
  };
  return `${texts[state] ?? state}${choices}`;
}

/** Describe what is known of one request besides its progress. */
export function details(request) {
  const cached = request.cached_tokens ? `, ${formatCount(request.cached_tokens)} of them kept` : "";
  const parts = [
    `${formatSeconds(request.seconds)} since it arrived`,
    `prompt of ${formatCount(request.prompt_tokens)} tokens${cached}`,
    request.path,
  ];
  if (request.key) parts.push(`key ${request.key}`);
  return parts.join(" · ");
}

/** Summarise the requests, and the share of the last second that steps waited for experts. */
export function summary({ requests, total }, waited) {
  if (!total) return "none";
  const shown = requests.length < total ? `, the first ${formatCount(requests.length)} shown` : "";
  const experts = waited === null ? "" : ` · steps wait for experts ${formatShare(waited)} of the time`;
  return `${formatCount(total)}${shown}${experts}`;
}

/** Return the share of the time between two polls that steps waited for experts; null at first. */
export function waitShare(before, after, seconds) {
  if (before === null || !(seconds > 0) || after < before) return null;
  return Math.min(1, (after - before) / seconds);
}

/** Describe an entry of the history. */
export function happened(entry) {
  const who = entry.by ? ` by ${entry.by}` : "";
  const where = entry.request_id ? ` · ${entry.request_id}` : "";
  return `${entry.text}${who}${where}`;
}
