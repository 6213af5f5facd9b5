// HTTP client of the server's API. Stores the API key.

const KEY = "moefit-api-key";

/** An error response with the server's message. Errors within a stream have no status. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Client {
  get key() {
    return sessionStorage.getItem(KEY);
  }

  set key(value) {
    sessionStorage.setItem(KEY, value);
  }

  memory(signal) {
    return this.#json("v1/memory", { signal, cache: "no-store" });
  }

  setMemory(change) {
    return this.#json("v1/memory", this.#post(change));
  }

  requests(signal) {
    return this.#json("v1/requests", { signal, cache: "no-store" });
  }

  cancel(number) {
    return this.#json("v1/requests/cancel", this.#post({ number }));
  }

  /** Yield the events of a stream until it ends or `signal` aborts. Throws ApiError. */
  async *complete(request, signal) {
    const response = await this.#fetch("v1/completions", { ...this.#post(request), signal });
    const events = new EventReader();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      for (const data of events.push(value)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, null);
        yield event;
      }
    }
  }

  #post(body) {
    return {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
  }

  async #json(path, options) {
    return (await this.#fetch(path, options)).json();
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const response = await fetch(path, { ...options, headers });
    if (!response.ok) throw new ApiError(await errorMessage(response), response.status);
    return response;
  }
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server returned ${response.status} ${response.statusText}`;
  }
}

/** Parser of server-sent events. */
export class EventReader {
  #rest = "";

  /** Return the data of all events complete so far; chunks may end anywhere. */
  push(text) {
    const events = (this.#rest + text).replace(/\r\n/g, "\n").split("\n\n");
    this.#rest = events.pop();
    return events.map(data).filter((one) => one !== null);
  }
}

function data(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
}
