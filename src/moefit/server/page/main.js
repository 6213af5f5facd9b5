// Entry point: connects one client and one poller to six views.

import { ApiError, Client } from "./client.js";
import { byId, say } from "./dom.js";
import { DialView } from "./dial_view.js";
import { BreakdownView } from "./breakdown_view.js";
import { MapView } from "./map_view.js";
import { formatCount } from "./numbers.js";
import { PaceView } from "./pace_view.js";
import { Poller } from "./poller.js";
import { PromptView } from "./prompt_view.js";
import { RequestsView } from "./requests/requests_view.js";
import { grid } from "./residency.js";

const client = new Client();
const map = new MapView();
const breakdown = new BreakdownView();
const pace = new PaceView();
const prompt = new PromptView(client);
const dial = new DialView(async (change) => {
  const memory = await client.setMemory(change);
  show(memory);
  return memory;
});
const requests = new RequestsView((number) => client.cancel(number));
const poller = new Poller({ read, onValue, onError });

function read(signal) {
  return Promise.all([client.memory(signal), client.requests(signal)]);
}

function onValue([memory, running]) {
  const problems = memory.problems ?? [];
  if (problems.length) state("degraded", "degraded");
  else state("live", "live");
  byId("trouble").hidden = true;
  byId("key-form").hidden = true;
  pace.show(memory, performance.now());
  requests.show(running, memory, performance.now());
  show(memory);
}

function show(memory) {
  byId("main").hidden = false;
  showProblems(memory);
  const cells = grid(memory.blocks, memory.checkpoint);
  document.title = `${memory.model} · moefit`;
  say("model", memory.model);
  say("mode", memory.mode);
  say("running", formatCount(memory.requests.running));
  say("waiting", formatCount(memory.requests.waiting));
  map.show(cells);
  breakdown.show(memory);
  dial.show(memory, cells);
  prompt.show(memory.model);
}

/** Show the server's problems and the number of failed reads. */
function showProblems({ problems = [], counters }) {
  byId("problems").hidden = !problems.length;
  if (!problems.length) return;
  const { demand = 0, background = 0 } = counters.load_failures ?? {};
  const reads = `${formatCount(demand + background)} reads failed so far, ${formatCount(background)} of them in the background`;
  say("problems", `${problems.join(". ")}. ${reads}.`);
}

function onError(error, nextTry) {
  if (error.status === 401) {
    askForKey(error);
    return;
  }
  state("reconnecting", "reconnecting");
  const what = error instanceof ApiError ? error.message : "the server is not responding";
  say("trouble", `Showing the last known state: ${what}. Retrying in ${Math.round(nextTry / 1000)} s.`);
  byId("trouble").hidden = false;
}

function askForKey(error) {
  poller.stop();
  state("locked", "API key required");
  const first = byId("key-form").hidden;
  byId("key-form").hidden = false;
  byId("trouble").hidden = true;
  if (client.key) say("key-note", error.message);
  if (first) byId("key-input").focus();
}

function state(name, text) {
  byId("state").dataset.state = name;
  say("state-text", text);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key-input").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    say("key-note", "A key consists of ASCII letters, digits and punctuation, without spaces.");
    return;
  }
  client.key = key;
  byId("key-input").value = "";
  poller.now();
});

poller.now();
