// View of the requests that run or wait, with a button to cancel each, and of what happened lately.

import { byId, element, say } from "../dom.js";
import { details, happened, progress, summary, waitShare } from "./requests.js";

export class RequestsView {
  #rows = new Map();
  #cancel;
  #before = null;

  /** cancel(number) returns a promise that is rejected with the server's error. */
  constructor(cancel) {
    this.#cancel = cancel;
  }

  /** Show a response of GET /v1/requests, with that of GET /v1/memory received at `now`, in ms. */
  show(state, memory, now) {
    const waited = memory.counters.wait_seconds ?? 0;
    const seconds = this.#before ? (now - this.#before.now) / 1000 : 0;
    say("requests-count", summary(state, waitShare(this.#before?.waited ?? null, waited, seconds)));
    this.#before = { waited, now };
    this.#list(state.requests);
    byId("history").hidden = !state.operator;
    history("changes", state.changes, "The budget has not been changed.");
    history("errors", state.errors, "No request has failed.");
  }

  #list(requests) {
    const wanted = new Set(requests.map((one) => one.number));
    for (const [number, row] of this.#rows) {
      if (wanted.has(number)) continue;
      row.item.remove();
      this.#rows.delete(number);
    }
    for (const request of requests) this.#row(request);
  }

  #row(request) {
    const row = this.#rows.get(request.number) ?? this.#build(request);
    row.item.dataset.state = request.state;
    say(row.progress, progress(request));
    say(row.details, details(request));
  }

  #build({ number, request_id: id }) {
    const parts = { progress: element("p", "progress"), details: element("p", "note") };
    const button = element("button", "", "Cancel");
    button.type = "button";
    button.setAttribute("aria-label", `Cancel request ${id}`);
    button.addEventListener("click", () => this.#stop(number, button));
    const text = element("div", "", element("code", "", id), parts.progress, parts.details);
    const row = { ...parts, item: element("li", "", text, button) };
    byId("requests-list").append(row.item);
    this.#rows.set(number, row);
    return row;
  }

  async #stop(number, button) {
    button.disabled = true;
    try {
      await this.#cancel(number);
      say("requests-answer", "");
    } catch (error) {
      button.disabled = false;
      say("requests-answer", error.message);
    }
  }
}

/** Show entries, the latest first; the list is written anew only if it has changed. */
function history(name, entries, none) {
  const list = byId(name);
  const key = entries.length ? `${entries.length} ${entries[0].at} ${entries.at(-1).at}` : "none";
  if (list.dataset.shown === key) return;
  list.dataset.shown = key;
  const items = entries.map((entry) => {
    const at = new Date(entry.at * 1000);
    const time = element("time", "", at.toLocaleTimeString());
    time.dateTime = at.toISOString();
    time.title = at.toLocaleString();
    return element("li", "", time, ` ${happened(entry)}`);
  });
  list.replaceChildren(...(items.length ? items : [element("li", "note", none)]));
}
