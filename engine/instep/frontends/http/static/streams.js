// The table of streams: the server searches, sorts and cuts into pages, since there may be a hundred thousand.

import { ago, byId, count, duration, element, setText } from "./format.js";
import { getJson, query } from "./live.js";

const PAGE = 25;
const POLL_MS = 2000;
const NONE = "No streams are open. They appear here as soon as clients open them.";

const COLUMNS = [
  { label: "name", sort: "name", text: (stream) => stream.name, className: "name" },
  { label: "state", text: (stream) => stream.state },
  { label: "frames", sort: "seq", text: (stream) => count(stream.seq), className: "number minor" },
  { label: "frames/s", sort: "rate", text: (stream) => count(stream.rate), className: "number" },
  { label: "last frame", sort: "idle", text: (stream) => ago(stream.idle_s), className: "number" },
  { label: "waiting", text: (stream) => count(stream.pending), className: "number minor" },
  { label: "connection", text: ({ owner }) => (owner === null ? "–" : `#${owner}`), className: "number minor" },
  { label: "parked for", text: (stream) => duration(stream.parked_s), className: "number minor" },
];

export class StreamTable {
  #model = "";
  #sort = "name";
  #cursors = [""]; // of the pages up to this one
  #next = null;
  #asked = null;
  #timer = 0;

  /** linkTo: name of a stream → address. */
  constructor(linkTo) {
    this.linkTo = linkTo;
    for (const column of COLUMNS) byId("heads").append(this.#head(column));
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

  #head({ label, sort, className }) {
    const head = element("th", { className });
    head.scope = "col";
    if (!sort) {
      head.textContent = label;
      return head;
    }
    const button = element("button", { text: label });
    button.type = "button";
    head.dataset.sort = sort;
    head.append(button);
    head.setAttribute("aria-sort", sort === this.#sort ? "ascending" : "none");
    button.addEventListener("click", () => {
      const firstDown = sort === "seq" || sort === "rate"; // the largest first is what people look for
      const [first, second] = firstDown ? [`-${sort}`, sort] : [sort, `-${sort}`];
      this.#sort = this.#sort === first ? second : first;
      for (const other of byId("heads").children) {
        if (other.dataset.sort) other.setAttribute("aria-sort", "none");
      }
      head.setAttribute("aria-sort", this.#sort.startsWith("-") ? "descending" : "ascending");
      this.#first();
    });
    return head;
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
    const contains = byId("search").value.trim();
    const parameters = { model: this.#model, contains, state: byId("state").value, sort: this.#sort, limit: PAGE };
    return `api/streams?${query({ ...parameters, cursor: this.#cursors.at(-1) })}`;
  }

  /** Changes texts in place, so that focus and scrolling stay where they are. */
  #fill({ streams, total, matched, cursor }) {
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
    const range = streams.length ? `${count(before + 1)} to ${count(before + streams.length)} of ` : "";
    const among = matched === total ? `${count(total)} streams` : `${count(matched)} found among ${count(total)}`;
    setText("matched", range + among);
    byId("previous").disabled = this.#cursors.length === 1;
    byId("next").disabled = cursor === null;
    byId("no-streams").hidden = streams.length > 0;
    setText("no-streams", total ? "No stream matches." : NONE);
  }
}

function emptyRow() {
  const row = element("tr");
  COLUMNS.forEach(({ className }, index) => {
    row.append(index ? element("td", { className }) : element("td", { className }, element("a")));
  });
  return row;
}
