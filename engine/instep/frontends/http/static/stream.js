// The page of one stream: what it is, what goes in and out, and what happened to it.

import { Chart } from "./charts.js";
import { clock, count, duration, element, setPairs, setText } from "./format.js";

const byId = (id) => document.getElementById(id);
const KEYS = ["blue", "orange", "violet", "green"];

const value = (number) => (number === null || number === undefined ? "–" : (+number).toFixed(3));
const axis = (number) => `${+number.toPrecision(3)}`;

const channels = (what) => KEYS.map((key, index) => ({ label: `${what}[${index}]`, key }));

export class StreamPage {
  #charts = null;

  /** record: an answer of /api/streams/NAME, or null while it is not known; now_s: Unix seconds of the server. */
  show(record, name, now_s) {
    setText("stream-name", name);
    byId("no-stream").hidden = record !== null;
    byId("facts").hidden = byId("traces").hidden = record === null;
    setText("stream-state", record?.state ?? "");
    byId("stream-state").dataset.state = record?.state ?? "";
    if (record === null) {
      setText("no-stream", "The server holds no stream of this name: it was closed, it expired, or it was never opened.");
      showLog(byId("stream-log"), byId("no-stream-events"), []);
      return;
    }
    setPairs(byId("facts"), facts(record));
    this.#draw(record.trace, now_s);
    showLog(byId("stream-log"), byId("no-stream-events"), record.events);
  }

  #draw(trace, now_s) {
    const columns = (rows) => KEYS.map((_, index) => rows.map((row) => row[index] ?? null));
    this.#charts ??= [
      ["Inputs", channels("x"), value],
      ["Outputs", channels("y"), value],
      ["Norm of the state", [{ label: "‖h‖", key: "blue" }], value],
    ].map(([title, series, text]) => new Chart(byId("traces"), { title, series, value: text, axis, sync: "stream", seconds: true }));
    const from = now_s - 60;
    const [inputs, outputs, norm] = this.#charts;
    inputs.draw([trace.time_s, ...columns(trace.inputs)], from, now_s);
    outputs.draw([trace.time_s, ...columns(trace.outputs)], from, now_s);
    norm.draw([trace.time_s, trace.state_norm], from, now_s);
  }
}

function facts(record) {
  const pairs = [
    ["frames", count(record.seq)],
    ["frames per second", count(record.rate)],
    ["waiting", count(record.pending)],
    ["last frame", record.idle_s === null ? "none yet" : `${duration(record.idle_s)} ago`],
    ["connection", record.owner === null ? "none" : `#${record.owner}`],
  ];
  if (record.parked_s !== null) pairs.push(["parked for", duration(record.parked_s)]);
  pairs.push(["expires", record.expires_in_s === null ? "not while it is used" : `in ${duration(record.expires_in_s)}`]);
  return pairs;
}

const ALARMING = new Set(["refused", "fenced", "lost", "mismatch", "evicted"]);

/** Events, the newest first; linkTo makes the name of the stream a link. */
export function showLog(list, empty, events, linkTo) {
  const newest = events.slice(-100).reverse();
  empty.hidden = newest.length > 0;
  list.hidden = newest.length === 0;
  const shown = list.firstElementChild?.dataset.number;
  if (newest.length && shown === String(newest[0].number) && list.children.length === newest.length) return;
  list.replaceChildren(...newest.map((event) => {
    const item = element("li", { className: ALARMING.has(event.kind) ? "alarming" : "" },
      element("time", { text: clock(event.time_s) }), element("b", { text: event.kind }));
    item.dataset.number = event.number;
    if (linkTo && event.stream) {
      const link = element("a", { text: event.stream, title: event.stream });
      link.href = linkTo(event.stream);
      item.append(link);
    }
    const detail = [event.detail, event.seq === null || event.seq === undefined ? "" : `frame ${count(event.seq)}`];
    item.append(element("span", { text: detail.filter(Boolean).join(", ") }));
    return item;
  }));
}
