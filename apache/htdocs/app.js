// The chat page: what is on it, and when it changes. How an answer is streamed is in stream.js.

import { byEventSource, byFetch } from "./stream.js";

const ENDPOINT = "stream.php";
const TRANSPORTS = { fetch: byFetch, eventsource: byEventSource };
/** The conversation that goes along with a question holds at most so much text; the oldest turns are left out. */
const CONVERSATION_MAX = 200_000;
/** Within so many pixels of its end the page follows the answer; further up the reader is left in peace. */
const NEAR_END = 80;

const find = (id) => document.getElementById(id);
const [scroller, welcome, log, composer, prompt, send, stop, status] = [
  "scroller", "welcome", "log", "composer", "prompt", "send", "stop", "status",
].map(find);

/** Turns in order: {question, answer, view}. `answer` is the text that has arrived. */
let turns = [];
/** The AbortController of the answer that is being streamed; null when there is none. */
let streaming = null;

// Asking

async function ask(turn) {
  const controller = new AbortController();
  const { view } = turn;
  const asked = performance.now();
  let firstAt = 0;
  let chunks = 0;
  let requestId = "";
  turn.answer = "";
  view.begin();
  setStreaming(controller);
  announce("Waiting for the answer");

  const outcome = await TRANSPORTS[chosenTransport()](ENDPOINT, question(turn), {
    signal: controller.signal,
    onOpen: (id) => (requestId = id ?? ""),
    onText: (text) => {
      if (!text) return;
      firstAt ||= performance.now();
      chunks += 1;
      turn.answer += text;
      followEnd(() => view.append(text));
    },
  }).then(() => null, (error) => error);

  if (streaming === controller) setStreaming(null);
  if (!view.node.isConnected) return; // a new chat was begun meanwhile
  const stats = {
    firstMs: firstAt && firstAt - asked,
    chunks,
    totalMs: performance.now() - asked,
    requestId: requestId || outcome?.requestId,
  };
  followEnd(() => view.end(stats));
  if (!outcome) announce("The answer is complete");
  else if (controller.signal.aborted) followEnd(() => view.stopped());
  else followEnd(() => view.failed(outcome));
  if (outcome) announce(view.saysWhat());
}

/** What is sent: the question, and the conversation that led to it. */
function question(turn) {
  const messages = [{ role: "user", content: turn.question }];
  let size = turn.question.length;
  for (const past of turns.slice(0, turns.indexOf(turn)).reverse()) {
    if (!past.answer) continue;
    size += past.question.length + past.answer.length;
    if (size > CONVERSATION_MAX) break;
    messages.unshift({ role: "user", content: past.question }, { role: "assistant", content: past.answer });
  }
  return { prompt: turn.question, messages };
}

function submit(text) {
  const asked = text.trim();
  if (!asked || streaming) return;
  const turn = { question: asked, answer: "" };
  turn.view = new TurnView(turn, () => !streaming && ask(turn));
  turns.push(turn);
  welcome.hidden = true;
  log.append(turn.view.node);
  scroller.scrollTop = scroller.scrollHeight;
  ask(turn);
}

// Showing

/** One question and its answer on the page. */
class TurnView {
  #answer;
  #text;
  #problem;
  #what;
  #code;
  #stats;
  #piece = null;

  constructor(turn, retry) {
    this.node = find("turn").content.firstElementChild.cloneNode(true);
    this.node.querySelector(".question .text").textContent = turn.question;
    [this.#answer, this.#text, this.#problem, this.#what, this.#code, this.#stats] = [
      ".answer", ".answer > .text", ".problem", ".what", ".code", ".stats",
    ].map((part) => this.node.querySelector(part));
    this.node.querySelector(".retry").addEventListener("click", () => {
      retry();
      prompt.focus();
    });
  }

  begin() {
    this.#text.textContent = "";
    this.#piece = null;
    this.#problem.hidden = this.#stats.hidden = true;
    this.#answer.className = "answer waiting";
    this.#answer.ariaBusy = "true"; // read out once, when it is whole
  }

  append(text) {
    if (this.#piece) {
      this.#piece.appendData(text);
      return;
    }
    this.#piece = document.createTextNode(text);
    this.#text.append(this.#piece);
    this.#answer.className = "answer speaking";
  }

  end({ firstMs, chunks, totalMs, requestId }) {
    this.#answer.className = "answer";
    this.#answer.ariaBusy = "false";
    const facts = chunks
      ? [`first token ${duration(firstMs)}`, `${chunks} ${chunks === 1 ? "chunk" : "chunks"}`, duration(totalMs)]
      : [duration(totalMs)];
    this.#stats.replaceChildren(...facts.map((fact) => span(fact)));
    if (requestId) this.#stats.append(span(`request ${requestId}`, "id"));
    this.#stats.hidden = false;
  }

  stopped() {
    this.#answer.className = "answer stopped";
    this.#say("You stopped the answer.", "");
  }

  failed({ message, code, retryAfter }) {
    this.#answer.className = "answer failed";
    const wait = /^\d+$/.test(retryAfter ?? "") ? `try again in ${retryAfter} s` : "";
    this.#say(message, [code, wait].filter(Boolean).join(" · "));
  }

  saysWhat() {
    return this.#what.textContent;
  }

  #say(what, code) {
    this.#what.textContent = what;
    this.#code.textContent = code;
    this.#problem.hidden = false;
  }
}

function span(text, className = "") {
  const node = document.createElement("span");
  node.className = className;
  node.textContent = text;
  return node;
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** Makes a change, and keeps the end in view if it was. */
function followEnd(change) {
  const following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
  change();
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

function announce(text) {
  status.textContent = text;
}

function setStreaming(controller) {
  streaming = controller;
  const hadFocus = document.activeElement === stop;
  stop.hidden = !controller;
  send.hidden = Boolean(controller);
  for (const retry of log.querySelectorAll(".retry")) retry.disabled = Boolean(controller);
  if (hadFocus) prompt.focus(); // a hidden button drops the focus to nowhere
}

// The composer

function sizePrompt() {
  send.disabled = !prompt.value.trim();
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function chosenTransport() {
  return document.querySelector("input[name=transport]:checked").value;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (streaming || !prompt.value.trim()) return;
  const text = prompt.value;
  prompt.value = "";
  sizePrompt();
  submit(text);
});

prompt.addEventListener("input", sizePrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  composer.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) streaming?.abort();
});

stop.addEventListener("click", () => streaming?.abort());

for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    submit(example.textContent);
    prompt.focus();
  });
}

find("new-chat").addEventListener("click", () => {
  streaming?.abort();
  turns = [];
  log.replaceChildren();
  welcome.hidden = false;
  announce("New chat");
  prompt.focus();
});

// The transport is remembered where the browser allows it.
try {
  const name = localStorage.getItem("forkd.transport");
  if (Object.hasOwn(TRANSPORTS, name)) document.querySelector(`input[value=${name}]`).checked = true;
} catch {}
for (const radio of document.querySelectorAll("input[name=transport]")) {
  radio.addEventListener("change", () => {
    try {
      localStorage.setItem("forkd.transport", radio.value);
    } catch {}
  });
}
sizePrompt();
