// The table of streams: the server searches and cuts into pages, since there may be a hundred thousand.

import { ago, byId, count, duration, element, setText } from "./format.js";
import { getJson, query } from "./live.js";

const PAGE = 25;
const POLL_MS = 2000;
const NONE = "No streams are open. They appear here as soon as clients open them.";

const COLUMNS = [
  { label: "name", text: (stream) => stream.name, className: "name" },
  { label: "state", text: (stream) => stream.state },
  { label: "frames", text: (stream) => count(stream.seq), className: "number" },
  { label: "last frame", text: (stream) => ago(stream.idle_s), className: "number" },
  { label: "waiting", text: (stream) => count(stream.pending), className: "number minor" },
  { label: "connection", text: ({ owner }) => (owner === null ? "–" : `#${owner}`), className: "number minor" },
  { label: "parked for", text: (stream) => duration(stream.parked_s), className: "number minor" },
];

export class StreamTable {
  #model = "";
  #cursors = [""]; // of the pages up to this one
  #next = null;
  #asked = null;
  #timer = 0;

  /** linkTo: name of a stream → address. */
  constructor(linkTo) {
    this.linkTo = linkTo;
    for (const column of COLUMNS) byId("heads").append(head(column));
    byId("search").addEventListener("input", () => this.#first());
    byId("state").addEventListener("change", () => this.#first());
    byId("previous").addEventListener("click", () => this.#turn(() => this.#cursors.pop()));
    byId("next").addEventListener("click", () => this.#turn(() => this.#cursors.push(this.#next)));
    addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.closest("input, select, textarea")) return;
      event.preventDefault();
      byId("search").focus();
    });
  }

  /** Shows the streams of a model and keeps them fresh; "" to rest. */
  show(model) {
    if (model === this.#model) return;
    this.#model = model;
    this.#first();
  }

  #first() {
    this.#cursors = [""];
    this.#load();
  }

  #turn(change) {
    change();
    this.#load();
  }

  async #load() {
    clearTimeout(this.#timer);
    this.#asked?.abort();
    if (!this.#model) return;
    const asked = (this.#asked = new AbortController());
    try {
      if (!document.hidden) this.#fill(await getJson(this.#path(), asked.signal));
    } catch (error) {
      if (asked.signal.aborted) return;
      if (this.#cursors.length > 1 && !(error instanceof TypeError)) this.#cursors = [""]; // the page has gone
    }
    if (!asked.signal.aborted) this.#timer = setTimeout(() => this.#load(), POLL_MS);
  }

  #path() {
    const prefix = byId("search").value.trim();
    const parameters = { model: this.#model, prefix, state: byId("state").value, limit: PAGE };
    return `api/streams?${query({ ...parameters, cursor: this.#cursors.at(-1) })}`;
  }

  /** Changes texts in place, so that focus and scrolling stay where they are. */
  #fill({ streams, total, cursor }) {
    this.#next = cursor;
    const body = byId("rows");
    while (body.children.length > streams.length) body.lastElementChild.remove();
    streams.forEach((stream, index) => {
      const row = body.children[index] ?? body.appendChild(emptyRow());
      row.dataset.state = stream.state;
      COLUMNS.forEach((column, each) => {
        const cell = row.children[each];
        const target = each ? cell : cell.firstElementChild;
        setText(target, column.text(stream));
      });
      const link = row.firstElementChild.firstElementChild;
      link.href = this.linkTo(stream.name);
      link.title = stream.name;
    });
    const before = (this.#cursors.length - 1) * PAGE;
    const range = streams.length ? `${count(before + 1)} to ${count(before + streams.length)}, ` : "";
    setText("matched", `${range}${count(total)} streams`);
    byId("previous").disabled = this.#cursors.length === 1;
    byId("next").disabled = cursor === null;
    byId("no-streams").hidden = streams.length > 0;
    setText("no-streams", total ? "No stream matches." : NONE);
  }
}

function head({ label, className }) {
  const cell = element("th", { className, text: label });
  cell.scope = "col";
  return cell;
}

function emptyRow() {
  const row = element("tr");
  COLUMNS.forEach(({ className }, index) => {
    row.append(index ? element("td", { className }) : element("td", { className }, element("a")));
  });
  return row;
}
