// Server-Sent Events as a stream of text, by the standard:
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
//
// Lines end with LF, CR or CRLF. A line is `field: value`, `field:value` or `field`; one that begins with a colon is a
// comment. A blank line ends an event. Pieces may be cut anywhere, between CR and LF too. An event that the end of the
// stream cuts off is no event.

const LINE_END = /[\r\n]/g;

export class EventStreamParser {
  #line = "";
  #afterCR = false;
  #type = "";
  #data = null;

  /** Takes the next piece of the stream; returns the events [{type, data}] that it completes. */
  push(text) {
    const events = [];
    if (this.#afterCR && text.startsWith("\n")) text = text.slice(1);
    else if (text === "") return events;
    this.#afterCR = false;
    let start = 0;
    LINE_END.lastIndex = 0;
    for (let found; (found = LINE_END.exec(text)); ) {
      const line = this.#line + text.slice(start, found.index);
      this.#line = "";
      start = LINE_END.lastIndex;
      if (found[0] === "\r") {
        if (start === text.length) this.#afterCR = true;
        else if (text[start] === "\n") LINE_END.lastIndex = ++start;
      }
      const event = this.#take(line);
      if (event) events.push(event);
    }
    this.#line += text.slice(start);
    return events;
  }

  #take(line) {
    if (line === "") {
      const event = this.#data === null ? null : { type: this.#type || "message", data: this.#data };
      this.#type = "";
      this.#data = null;
      return event;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") this.#data = this.#data === null ? value : `${this.#data}\n${value}`;
    else if (field === "event") this.#type = value;
    return null;
  }
}

/** The events of a response body. Leaving the loop early cancels the body. */
export async function* events(body) {
  const decoder = new TextDecoder();
  const parser = new EventStreamParser();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
