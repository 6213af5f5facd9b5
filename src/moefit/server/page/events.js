// Parser of server-sent events. Pure functions.

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
