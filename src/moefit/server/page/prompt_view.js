// Prompt form: streams one completion at a time.

import { ApiError } from "./client.js";
import { byId, say } from "./dom.js";
import { formatCount, formatRate, formatSeconds } from "./numbers.js";

export class PromptView {
  #client;
  #answer = byId("try-answer");
  #running = null;
  #model = null;

  constructor(client) {
    this.#client = client;
    byId("try").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("try-stop").addEventListener("click", () => this.#running?.abort());
    byId("try-prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
    });
  }

  /** Set the model name of requests. */
  show(model) {
    this.#model = model;
  }

  async #run() {
    if (this.#running || this.#model === null) return;
    const running = new AbortController();
    const pace = new Pace();
    this.#running = running;
    this.#begin();
    try {
      const reason = await this.#stream(running.signal, pace);
      say("try-state", `${pace.summary()}${REASONS[reason] ?? " The server ended the stream early."}`);
    } catch (error) {
      if (running.signal.aborted) say("try-state", `${pace.summary()} Stopped.`);
      else this.#fail(error);
    } finally {
      this.#running = null;
      this.#buttons(false);
    }
  }

  async #stream(signal, pace) {
    let reason = null;
    for await (const event of this.#client.complete(this.#request(), signal)) {
      const choice = event.choices[0];
      reason = choice?.finish_reason ?? reason;
      if (choice?.text) this.#write(choice.text);
      pace.add(choice, event.usage);
      say("try-pace", pace.rate());
    }
    return reason;
  }

  #request() {
    return {
      model: this.#model,
      prompt: byId("try-prompt").value,
      max_tokens: Number(byId("try-tokens").value),
      temperature: Number(byId("try-temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #begin() {
    this.#answer.replaceChildren();
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = byId("try-prompt").value;
    this.#answer.append(given);
    byId("try-state").classList.remove("wrong");
    say("try-state", "Waiting for the first token …");
    say("try-pace", "");
    this.#buttons(true);
  }

  #write(text) {
    const box = this.#answer;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    box.append(text);
    if (atEnd) box.scrollTop = box.scrollHeight;
    say("try-state", "Generating …");
  }

  #fail(error) {
    byId("try-state").classList.add("wrong");
    say("try-state", error instanceof ApiError ? error.message : `Connection lost: ${error.message}`);
  }

  #buttons(running) {
    byId("try-run").disabled = running;
    byId("try-stop").disabled = !running;
    byId("try").classList.toggle("running", running);
  }
}

const REASONS = { length: " Max tokens reached.", stop: " Finished." };

/** Token timing. Each event counts as one token until the server reports the usage. */
class Pace {
  #start = performance.now();
  #first = null;
  #last = null;
  #tokens = 0;

  add(choice, usage) {
    if (choice?.text) {
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#tokens += 1;
    }
    if (usage) this.#tokens = usage.completion_tokens;
  }

  rate() {
    const seconds = (this.#last - this.#first) / 1000;
    return this.#tokens > 1 && seconds > 0 ? `${formatRate((this.#tokens - 1) / seconds)} tokens/s` : "";
  }

  summary() {
    if (this.#first === null) return `${formatCount(this.#tokens)} tokens.`;
    return `${formatCount(this.#tokens)} tokens, first token after ${formatSeconds((this.#first - this.#start) / 1000)}.`;
  }
}
