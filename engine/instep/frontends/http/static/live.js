// Server-sent events over fetch. EventSource gives up on an HTTP error and does not notice a server that is stuck.

const RETRY_MS = 1000;
const SILENT_MS = 5000; // statistics come every second, so a server that is silent for longer is stuck
const ALL_EVENTS = { "Last-Event-ID": "0" }; // the server repeats what it remembers; the page begins anew with it

/** The JSON at a path of the server; an Error with its sentence if it refuses. */
export async function getJson(path, signal) {
  const response = await fetch(path, { cache: "no-store", signal });
  if (!response.ok) throw new Error((await errorOf(response)).message);
  return response.json();
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return { code: "", message: `${response.status} ${response.statusText}`, ...body?.error };
}

/** Parameters as text, without those that are empty. */
export const query = (parameters) =>
  new URLSearchParams(Object.entries(parameters).filter(([, value]) => value)).toString();

/**
 * Calls `onEvent(kind, data)` for each event until it is closed, and `onState(state, sentence)` when the connection
 * changes: "live", "lost", "ended" (the server said goodbye) or "refused", with the sentence of the server.
 */
export class Live {
  #stop = new AbortController();

  constructor(path, onEvent, onState) {
    this.#run(path, onEvent, onState);
  }

  close() {
    this.#stop.abort();
  }

  async #run(path, onEvent, onState) {
    const stopped = this.#stop.signal;
    while (!stopped.aborted) {
      let said = ["lost", ""];
      const attempt = new AbortController();
      const abort = () => attempt.abort();
      stopped.addEventListener("abort", abort);
      let watchdog = setTimeout(abort, SILENT_MS);
      try {
        const response = await fetch(path, { cache: "no-store", headers: ALL_EVENTS, signal: attempt.signal });
        if (!response.ok) {
          const { code, message } = await errorOf(response);
          said = code === "SHUTTING_DOWN" ? ["ended", ""] : ["refused", message];
          throw new Error(message);
        }
        onState("live");
        const parser = new Parser((kind, data) => {
          if (stopped.aborted) return;
          if (kind === "bye") said = ["ended", ""];
          try {
            onEvent(kind, JSON.parse(data));
          } catch (error) {
            reportError(error); // a fault of the page, not of the connection
          }
        });
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
          clearTimeout(watchdog);
          watchdog = setTimeout(abort, SILENT_MS);
          parser.feed(part.value);
        }
      } catch {
        // `said` tells
      }
      clearTimeout(watchdog);
      stopped.removeEventListener("abort", abort);
      if (stopped.aborted) return;
      onState(...said);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

/** The lines of the event stream format of HTML, as far as servers use them. */
class Parser {
  #rest = "";
  #kind = "message";
  #data = [];

  constructor(onEvent) {
    this.onEvent = onEvent;
  }

  feed(text) {
    const lines = (this.#rest + text).split(/\r?\n/);
    this.#rest = lines.pop();
    for (const line of lines) this.#take(line);
  }

  #take(line) {
    if (line === "") {
      if (this.#data.length) this.onEvent(this.#kind, this.#data.join("\n"));
      this.#kind = "message";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const [field, value] = colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
    if (field === "event") this.#kind = value;
    if (field === "data") this.#data.push(value);
  }
}
