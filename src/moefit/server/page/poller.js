// Ask again and again: every second, slower while it fails, not while nobody looks.

const EVERY = 1000;
const PATIENCE = 8000;

/** How long to wait after so many failures in a row, in ms. */
export function pause(failures) {
  return failures ? Math.min(15000, 1000 * 2 ** (failures - 1)) : EVERY;
}

export class Poller {
  #read;
  #heard;
  #failed;
  #failures = 0;
  #timer = null;
  #asking = null;

  /** read(signal) gives a promise; heard(value) and failed(error, nextTryInMs) are told. */
  constructor({ read, heard, failed }) {
    this.#read = read;
    this.#heard = heard;
    this.#failed = failed;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.now()));
  }

  /** Ask at once, and go on from there. */
  now() {
    this.stop();
    this.#failures = 0;
    this.#ask();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#asking = null;
  }

  async #ask() {
    const asking = new AbortController();
    this.#asking = asking;
    const late = setTimeout(() => asking.abort(new Error("no answer")), PATIENCE);
    try {
      const value = await this.#read(asking.signal);
      if (this.#asking !== asking) return;
      this.#failures = 0;
      this.#heard(value);
    } catch (error) {
      if (this.#asking !== asking) return;
      this.#failures += 1;
      this.#failed(error, pause(this.#failures));
    } finally {
      clearTimeout(late);
    }
    if (this.#asking === asking) {
      this.#timer = setTimeout(() => this.#ask(), pause(this.#failures));
    }
  }
}
