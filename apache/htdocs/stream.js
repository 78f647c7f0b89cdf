// Two ways to ask the server for a streamed answer. Both are
//
//     ask(url, {prompt, messages}, {signal, onOpen, onText}) -> Promise
//
// `onOpen(requestId)` is called when the answer begins (null where the browser does not tell), `onText(text)` for every
// piece of it. The promise is fulfilled when the server said that the answer is complete. It is rejected with the
// signal's AbortError when the caller stopped it, and otherwise with a StreamError: nothing ends silently.

import { events } from "./sse.js";

const END = "[DONE]";
/** What EventSource asks travels in the address, and servers take about 8 KB of that (Apache's LimitRequestLine). */
const ADDRESS_MAX = 7000;

export class StreamError extends Error {
  constructor(message, { code = "", requestId = "", retryAfter = "" } = {}) {
    super(message);
    this.name = "StreamError";
    Object.assign(this, { code, requestId, retryAfter });
  }
}

const truncated = () =>
  new StreamError("The connection ended before the answer was complete.", { code: "truncated" });
const unreachable = () =>
  new StreamError("The server could not be reached. Is it running, and are you online?", { code: "network" });

/** POST with fetch: sends the conversation, and learns status, reason and request id of a failure. */
export async function byFetch(url, { prompt, messages }, { signal, onOpen, onText }) {
  let response;
  try {
    response = await fetch(url, {
      method: "POST",
      headers: { Accept: "text/event-stream" },
      body: new URLSearchParams({ prompt, messages: JSON.stringify(messages) }),
      signal,
    });
  } catch (error) {
    throw signal.aborted ? error : unreachable();
  }
  const requestId = response.headers.get("X-Request-Id");
  if (!response.ok) throw await refusal(response);
  if (!/^text\/event-stream\b/i.test(response.headers.get("Content-Type") ?? "")) {
    response.body?.cancel().catch(() => {});
    throw new StreamError("The server answered, but not with a stream.", { code: "not_a_stream", requestId });
  }
  onOpen(requestId);
  let complete = false;
  try {
    for await (const { type, data } of events(response.body)) {
      if (type === "error") throw reported(data, requestId);
      if (type === "done") return;
      if (type !== "message" || complete) continue;
      if (data === END) complete = true;
      else onText(content(data));
    }
  } catch (error) {
    if (error instanceof StreamError || signal.aborted) throw error;
    if (!complete) throw truncated(); // the browser's own words for a broken connection help nobody
  }
  if (!complete) throw truncated();
}

/** GET with EventSource: the browser's own parser, but no conversation, no status and no reason before the stream. */
export function byEventSource(url, { prompt }, { signal, onOpen, onText }) {
  const address = `${url}?${new URLSearchParams({ prompt })}`;
  if (address.length > ADDRESS_MAX) {
    const message = "This is too long for EventSource, whose question travels in the address. Choose fetch.";
    return Promise.reject(new StreamError(message, { code: "too_long" }));
  }
  return new Promise((resolve, reject) => {
    const source = new EventSource(address);
    let opened = false;
    let complete = false;
    const settle = (how, value) => {
      source.close(); // or it would connect again, and ask, and pay, again
      signal.removeEventListener("abort", stop);
      how(value);
    };
    const stop = () => settle(reject, signal.reason);
    signal.addEventListener("abort", stop);
    source.onopen = () => {
      opened = true;
      onOpen(null);
    };
    source.onmessage = ({ data }) => {
      if (data === END) complete = true;
      else if (!complete) onText(content(data));
    };
    source.addEventListener("done", () => settle(resolve));
    // Two things go by this name: the server's `event: error`, which has data, and the browser's, which has none.
    source.addEventListener("error", ({ data }) => {
      if (data !== undefined) settle(reject, reported(data, ""));
      else if (complete) settle(resolve);
      else if (opened) settle(reject, truncated());
      else if (source.readyState === EventSource.CLOSED) settle(reject, refusedUnseen());
      else settle(reject, unreachable());
    });
  });
}

const refusedUnseen = () =>
  new StreamError("The server refused the request. EventSource does not let a page see why; fetch does.", {
    code: "refused",
  });

/** The error behind an HTTP status: forkd, the Apache module and the endpoint all answer {"error", "code", "request_id"}. */
async function refusal(response) {
  const body = parseObject(await response.text().catch(() => ""));
  const status = `HTTP ${response.status}${response.statusText ? ` ${response.statusText}` : ""}`;
  return new StreamError(typeof body?.error === "string" ? body.error : `The server answered ${status}.`, {
    code: [body?.code, status].filter(Boolean).join(" · "),
    requestId: body?.request_id ?? response.headers.get("X-Request-Id") ?? "",
    retryAfter: response.headers.get("Retry-After") ?? "",
  });
}

/** An `event: error`. Behind half an event its data has several lines; the last is the JSON. */
function reported(data, requestId) {
  const body = parseObject(data.slice(data.lastIndexOf("\n") + 1));
  return new StreamError(typeof body?.error === "string" ? body.error : "The stream was interrupted.", {
    code: body?.code ?? "error",
    requestId: body?.request_id ?? requestId ?? "",
  });
}

/** The text in an event: {"content"}, a chunk as OpenAI writes it, or the data itself where the server sends plain text. */
function content(data) {
  const object = parseObject(data);
  if (!object) return data;
  return String(object.content ?? object.choices?.[0]?.delta?.content ?? "");
}

function parseObject(text) {
  if (!text.startsWith("{")) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
