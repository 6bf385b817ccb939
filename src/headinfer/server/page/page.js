// The page: a conversation with the model, and where its KV cache is.

import { count, counted, took } from "./estimate.js";
import { Files, withFiles } from "./files.js";
import { element, showSlots } from "./memory.js";
import { Reading } from "./reading.js";
import { Sessions } from "./sessions.js";
import { ask, stream, Told } from "./stream.js";

const BUSY_MS = 1000;
const IDLE_MS = 4000;
const KEY = "headinfer-api-key";
const SHOWN = 4000; // characters of a restored message, which may be a book

const $ = (id) => document.getElementById(id);

const state = {
  key: sessionStorage.getItem(KEY) ?? "",
  model: null, // its name, once the server is ready
  messages: [],
  said: [], // what the system said to them
  slot: null, // of the server, with all that
  stopper: null, // while an answer is under way
};
const files = new Files(showProblem);
const sessions = new Sessions({
  key: () => state.key,
  current: () =>
    state.stopper ? null : { slot: state.slot, messages: [...state.said, ...state.messages] },
  restored: takeUp,
  onProblem: (error) => showProblem(problemOf(error)),
});

function showProblem(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
  showNote("");
}

/** Tell what is no error. */
function showNote(message) {
  $("note").textContent = message;
  $("note").hidden = !message;
}

function problemOf(error) {
  if (error instanceof Told) return error.message;
  return `Something failed in this page: ${error.message}`;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// The server: whether it is there, whether it wants a key, and which model it has.

async function begin() {
  for (;;) {
    try {
      const models = await (await ask("v1/models", state.key)).json();
      const [model] = models.data;
      state.model = model.id;
      const most = model.max_model_len ? `, up to ${counted(model.max_model_len, "token")}` : "";
      $("model").textContent = model.id + most;
      showProblem("");
      showButtons();
      sessions.look();
      return;
    } catch (error) {
      if (error.status === 401) return wantKey();
      const loads = error.status === 503 && error.code !== "closing";
      if (!loads) showProblem(problemOf(error));
      $("model").textContent = loads ? "The model is loading …" : "no server";
      await pause(BUSY_MS);
    }
  }
}

function wantKey() {
  if (state.key) showProblem("The server does not know this API key.");
  $("model").textContent = "an API key is needed";
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  sessionStorage.setItem(KEY, state.key);
  $("key").value = "";
  $("key-form").hidden = true;
  showProblem("");
  begin().then(() => $("key-form").hidden && $("message").focus());
});

// The cache: asked for again and again, and less often while nothing is under way or seen.

async function watch() {
  for (;;) {
    if (state.model && !document.hidden) await look();
    await pause(state.stopper || !state.model ? BUSY_MS : IDLE_MS);
  }
}

async function look() {
  try {
    const slots = await (await ask("slots", state.key)).json();
    follow(() => showSlots(slots)); // whose line above may break, and move all below
    $("cache").classList.remove("stale");
  } catch {
    $("cache").classList.add("stale"); // the next request says what is wrong
    $("cache-total").textContent = "unknown: the server does not answer";
  }
}

const wide = matchMedia("(min-width: 60rem)");
const openWhereWide = () => ($("cache").open = wide.matches);
wide.addEventListener("change", openWhereWide);
$("cache").querySelector("summary").addEventListener("click", (event) => {
  if (wide.matches) event.preventDefault(); // beside the conversation it stays open
});
for (const [opened, other] of [
  ["cache", "settings"],
  ["settings", "cache"],
]) {
  $(opened).addEventListener("toggle", () => {
    // Both at once would leave nothing of the conversation in a narrow window.
    if ($(opened).open && !wide.matches) $(other).open = false;
  });
}

// The conversation.

function showButtons() {
  const busy = state.stopper !== null;
  $("send").disabled = busy || !state.model;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("anew").disabled = busy || !state.messages.length;
  sessions.show();
}

function showEnd() {
  $("said").scrollTop = $("said").scrollHeight;
  scrollTo(0, document.documentElement.scrollHeight);
}

/** Keep the newest text in sight, unless the reader went back. */
function follow(change) {
  const said = $("said");
  const atEnd = said.scrollHeight - said.scrollTop - said.clientHeight < 60;
  const pageAtEnd = document.documentElement.scrollHeight - scrollY - innerHeight < 60;
  change();
  if (atEnd) said.scrollTop = said.scrollHeight;
  if (pageAtEnd) scrollTo(0, document.documentElement.scrollHeight);
}

function addTurn(who, text, given = []) {
  const turn = element("article", who);
  turn.append(element("h2", "", who === "user" ? "You" : "Answer"));
  for (const file of given) {
    const size = counted(file.text.length, "character");
    turn.append(element("p", "hint", `${file.name}, ${size}`));
  }
  const body = element("div", "text", text);
  turn.append(body);
  follow(() => $("said").append(turn));
  return { turn, body };
}

function settings() {
  const chosen = {};
  const [tokens, temperature] = [$("max-tokens"), $("temperature")];
  for (const field of [tokens, temperature]) {
    if (field.validity.valid) continue;
    $("settings").open = true;
    field.focus();
    throw new Told(`${field.parentElement.textContent.trim()}: ${field.validationMessage}`);
  }
  if (tokens.value) chosen.max_tokens = Number(tokens.value);
  if (temperature.value) chosen.temperature = Number(temperature.value);
  return chosen;
}

/** One answer as it grows. */
class Answer {
  constructor() {
    this.text = "";
    this.finish = null;
    this.timings = null;
    this._thought = null;
    Object.assign(this, addTurn("assistant", ""));
    this.turn.setAttribute("aria-busy", "true"); // to be read aloud once it is whole
  }

  take(told) {
    const choice = told.choices?.[0];
    this.timings = told.timings ?? this.timings;
    this.finish = choice?.finish_reason ?? this.finish;
    const { content, reasoning_content: thought } = choice?.delta ?? {};
    if (thought) follow(() => this._think(thought));
    const shown = this.body.hasChildNodes() ? content : content?.trimStart();
    if (shown) follow(() => this.body.append(shown));
    this.text += content ?? "";
    return Boolean(content || thought);
  }

  _think(thought) {
    if (!this._thought) {
      const details = element("details", "thought");
      this._thought = element("div", "text");
      details.append(element("summary", "", "Thoughts"), this._thought);
      this.body.before(details);
    }
    this._thought.append(thought);
  }

  end(note) {
    this.turn.removeAttribute("aria-busy");
    if (note) follow(() => this.turn.append(element("p", "hint", note)));
  }

  /** What it took, in a line. */
  get took() {
    if (!this.timings) return "";
    const { prompt_n: read, cache_n: cached, prompt_ms: readMs } = this.timings;
    const { predicted_n: tokens, predicted_ms: ms } = this.timings;
    const known = cached ? `, ${count(cached)} were in the cache` : "";
    const speed = ms > 0 && tokens > 1 ? `, ${((1000 * (tokens - 1)) / ms).toFixed(1)}/s` : "";
    const limit = this.finish === "length" ? " The answer ends at its limit." : "";
    const prompt = `${counted(read, "token")} read in ${took(readMs / 1000)}${known}`;
    return `${prompt}. ${counted(tokens, "token")} answered${speed}.${limit}`;
  }
}

async function send() {
  const message = $("message").value.trim();
  const given = files.held;
  if (!state.model || state.stopper || (!message && !given.length)) return;
  let chosen;
  try {
    chosen = settings();
  } catch (error) {
    return showProblem(problemOf(error));
  }
  showProblem("");
  state.stopper = new AbortController();
  const asked = { role: "user", content: withFiles(given, message) };
  const said = $("system").value.trim();
  const system = said ? [{ role: "system", content: said }] : [];
  const { turn } = addTurn("user", message, given);
  files.take();
  $("message").value = "";
  showButtons();
  const outcome = await answer([...system, ...state.messages, asked], chosen);
  if (outcome.text || !outcome.failed) {
    state.said = system;
    state.slot = outcome.slot;
    state.messages.push(asked, { role: "assistant", content: outcome.text });
  } else {
    turn.remove(); // it was not answered, so it is to be sent again or changed
    files.put([...given, ...files.held]);
    $("message").value ||= message;
  }
  state.stopper = null;
  showButtons();
  $("message").focus();
  look();
}

/** Have messages answered; return the text, the slot that has it, and whether it ended early. */
async function answer(messages, chosen) {
  const reading = new Reading();
  showEnd();
  let growing = null;
  let failed = false;
  let note = "";
  let slot = null;
  const body = {
    ...chosen,
    model: state.model,
    messages,
    stream: true,
    return_progress: true,
    stream_options: { include_usage: true },
  };
  try {
    const told = stream("v1/chat/completions", state.key, body, state.stopper.signal);
    for await (const part of told) {
      if (part.queue_position !== undefined) reading.queued(part.queue_position);
      if (part.prompt_progress) reading.progress(part.prompt_progress);
      const delta = part.choices?.[0]?.delta;
      if (!growing && (delta?.content || delta?.reasoning_content || part.timings)) {
        reading.end();
        $("status").textContent = "Answering";
        growing = new Answer();
      }
      growing?.take(part);
      slot = part.id_slot ?? slot;
    }
    note = growing?.took ?? "";
    $("status").textContent = "The answer is complete";
  } catch (error) {
    failed = true;
    note = "It ends here, unfinished.";
    if (error.name === "AbortError") stopped(growing);
    else if (error.status === 401) wantKey();
    else showProblem(problemOf(error));
  }
  reading.end();
  growing?.end(note);
  if (failed && growing && !growing.text) growing.turn.remove();
  return { text: growing?.text ?? "", slot, failed };
}

function stopped(growing) {
  $("status").textContent = "Stopped";
  if (!growing) showNote("Stopped. What was read stays in the cache: send it again to go on.");
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => state.stopper?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.stopper) state.stopper.abort();
});
/** Go on with a conversation that was saved. */
function takeUp({ messages, slot, tokens, name }) {
  if (state.stopper) return; // another conversation went on meanwhile
  const said = messages.filter((message) => message.role === "system");
  beginAnew(messages.slice(said.length), said, slot);
  $("system").value = said[0]?.content ?? "";
  for (const { role, content } of state.messages) {
    const cut = content.length > SHOWN;
    const more = cut ? ` … ${counted(content.length, "character")} in all` : "";
    addTurn(role, content.slice(0, SHOWN).trim() + more);
  }
  const known = `${name}: ${counted(tokens, "token")} are in the cache.`;
  const rest = " It has no messages: a text that begins alike goes on from there.";
  showNote(known + (state.messages.length ? "" : rest));
  showEnd();
}

function beginAnew(messages = [], said = [], slot = null) {
  Object.assign(state, { messages, said, slot });
  $("said").replaceChildren();
  showProblem("");
  showButtons();
}

$("anew").addEventListener("click", () => {
  beginAnew();
  $("message").focus();
});

openWhereWide();
showSlots([]);
begin();
watch();
