// The page of one stream: its state and events; and the lists of events.

import { ago, byId, clock, count, duration, element, quoted, setPairs, setText } from "./format.js";

const GONE = "The server has no stream of this name: it was closed, it expired, or it was never opened.";

/** record: an answer of /api/streams/NAME, or null while it is not known; file: of the recording, if there is one. */
export function showRecord(record, name, file) {
  setText("stream-name", name);
  byId("no-stream").hidden = record !== null;
  byId("facts").hidden = record === null;
  setText("stream-state", record?.state ?? "");
  byId("stream-state").dataset.state = record?.state ?? "";
  if (record === null) setText("no-stream", GONE);
  else {
    const command = file ? [["its state", `instep recordings state ${quoted(file)} -- ${quoted(name)}`]] : [];
    setPairs(byId("facts"), [...facts(record), ...command]);
  }
}

function facts(record) {
  const pairs = [
    ["frames", count(record.seq)],
    ["waiting", count(record.pending)],
    ["last frame", record.idle_s === null ? "none yet" : ago(record.idle_s)],
    ["connection", record.owner === null ? "none" : `#${record.owner}`],
  ];
  if (record.parked_s !== null) pairs.push(["parked for", duration(record.parked_s)]);
  pairs.push(["expires unless used", record.expires_in_s === null ? "never" : `in ${duration(record.expires_in_s)}`]);
  return pairs;
}

const LEVELS = { lost: "bad", mismatch: "bad", refused: "warn", fenced: "warn", evicted: "warn" };
const SHOWN = 100;

/** The newest first; what happened to many streams at once is one entry, of the first of them and their number. */
function grouped(events) {
  const groups = [];
  for (let index = events.length - 1; index >= 0; index -= 1) {
    const event = events[index];
    const group = groups.at(-1);
    if (group?.time_s === event.time_s && group.kind === event.kind && group.detail === event.detail) {
      Object.assign(group, { stream: event.stream, seq: event.seq, others: group.others + 1 });
    } else if (groups.length === SHOWN) break;
    else groups.push({ ...event, others: 0 });
  }
  return groups;
}

/** Events, the newest first; linkTo makes the name of the stream a link. */
export function showLog(list, empty, events, linkTo) {
  const newest = grouped(events);
  const [first, last] = [events[0], events.at(-1)]; // another model, or a server after a restart, has their numbers too
  const shown = [first?.number, first?.time_s, last?.number, last?.time_s].join(" ");
  empty.hidden = newest.length > 0;
  list.hidden = newest.length === 0;
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...newest.map((event) => {
    const item = element("li", {},
      element("time", { text: clock(event.time_s) }), element("b", { text: event.kind }));
    item.dataset.level = LEVELS[event.kind] ?? "";
    if (linkTo && event.stream) {
      const link = element("a", { text: event.stream, title: event.stream });
      link.href = linkTo(event.stream);
      item.append(link);
    }
    const isOne = event.others === 0 && event.seq > 0;
    const others = event.others ? `and ${count(event.others)} more` : "";
    const detail = [others, event.detail, isOne ? `frame ${count(event.seq)}` : ""];
    item.append(element("span", { text: detail.filter(Boolean).join(", ") }));
    return item;
  }));
}
