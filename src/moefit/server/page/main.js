// The page: one client, one poller, five views.

import { ApiError, Client } from "./client.js";
import { byId, say } from "./dom.js";
import { DialView } from "./dial_view.js";
import { LedgerView } from "./ledger_view.js";
import { MapView } from "./map_view.js";
import { formatCount } from "./numbers.js";
import { PaceView } from "./pace_view.js";
import { Poller } from "./poller.js";
import { PromptView } from "./prompt_view.js";
import { grid } from "./residency.js";

const client = new Client();
const map = new MapView();
const ledger = new LedgerView();
const pace = new PaceView();
const prompt = new PromptView(client);
const dial = new DialView(async (change) => {
  const memory = await client.setMemory(change);
  show(memory);
  return memory;
});
const poller = new Poller({ read: (signal) => client.memory(signal), heard, failed });

function heard(memory) {
  const problems = memory.problems ?? [];
  if (problems.length) state("degraded", "degraded");
  else state("live", "live");
  byId("trouble").hidden = true;
  byId("key-form").hidden = true;
  pace.show(memory, performance.now());
  show(memory);
}

function show(memory) {
  byId("main").hidden = false;
  showProblems(memory);
  const cells = grid(memory.blocks);
  document.title = `${memory.model} · moefit`;
  say("model", memory.model);
  say("mode", memory.mode);
  say("running", formatCount(memory.requests.running));
  say("waiting", formatCount(memory.requests.waiting));
  map.show(cells);
  ledger.show(memory);
  dial.show(memory, cells);
  prompt.show(memory.model);
}

/** What the server says is wrong; how many reads failed belongs to it. */
function showProblems({ problems = [], counters }) {
  byId("problems").hidden = !problems.length;
  if (!problems.length) return;
  const { demand = 0, background = 0 } = counters.load_failures ?? {};
  const reads = `${formatCount(demand + background)} reads failed, ${formatCount(background)} of them in the background`;
  say("problems", `${problems.join(". ")}. So far ${reads}.`);
}

function failed(error, nextTry) {
  if (error.status === 401) {
    askForKey(error);
    return;
  }
  state("reconnecting", "reconnecting");
  const what = error instanceof ApiError ? error.message : "the server does not answer";
  say("trouble", `What you see is the last that was heard: ${what}. Next try in ${Math.round(nextTry / 1000)} s.`);
  byId("trouble").hidden = false;
}

function askForKey(error) {
  poller.stop();
  state("locked", "needs a key");
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
    say("key-note", "A key is plain letters, digits and signs, without spaces.");
    return;
  }
  client.key = key;
  byId("key-input").value = "";
  poller.now();
});

poller.now();
