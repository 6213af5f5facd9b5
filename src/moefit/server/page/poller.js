// Poll every second, with backoff while requests fail, paused while the page is hidden.

const EVERY = 1000;
const TIMEOUT = 8000;

/** Milliseconds to wait after this many consecutive failures. */
export function pause(failures) {
  return failures ? Math.min(15000, 1000 * 2 ** (failures - 1)) : EVERY;
}

export class Poller {
  #read;
  #onValue;
  #onError;
  #failures = 0;
  #timer = null;
  #request = null;

  /** read(signal) returns a promise; its result goes to onValue(value) or onError(error, retryMs). */
  constructor({ read, onValue, onError }) {
    this.#read = read;
    this.#onValue = onValue;
    this.#onError = onError;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.now()));
  }

  /** Poll immediately and restart the schedule. */
  now() {
    this.stop();
    this.#failures = 0;
    this.#poll();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#request?.abort();
    this.#request = null;
  }

  async #poll() {
    const request = new AbortController();
    this.#request = request;
    const late = setTimeout(() => request.abort(new Error("no response")), TIMEOUT);
    try {
      const value = await this.#read(request.signal);
      if (this.#request !== request) return;
      this.#failures = 0;
      this.#onValue(value);
    } catch (error) {
      if (this.#request !== request) return;
      this.#failures += 1;
      this.#onError(error, pause(this.#failures));
    } finally {
      clearTimeout(late);
    }
    if (this.#request === request) {
      this.#timer = setTimeout(() => this.#poll(), pause(this.#failures));
    }
  }
}
