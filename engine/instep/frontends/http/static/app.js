// The page: which model and stream the address names, one connection for it, and who shows what arrives.

import { byId, duration, element, setText } from "./format.js";
import { History } from "./history.js";
import { Live, getJson, query } from "./live.js";
import { Overview, showAlarm } from "./overview.js";
import { showLog, showRecord } from "./stream.js";
import { StreamTable } from "./streams.js";

const REMEMBERED = 4096; // as many as the server

/** #model=NAME&stream=NAME, without the form encoding in which "+" is a space. */
function readAddress() {
  const parts = location.hash.slice(1).split("&").map((part) => part.split("="));
  const decode = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  const wanted = Object.fromEntries(parts.map(([key, value = ""]) => [key, decode(value)]));
  return { model: wanted.model ?? "", stream: wanted.stream ?? null };
}

function address({ model, stream }) {
  const parts = [];
  if (model && model !== page.stats?.models[0]?.name) parts.push(`model=${encodeURIComponent(model)}`);
  if (stream !== null && stream !== undefined) parts.push(`stream=${encodeURIComponent(stream)}`);
  return `#${parts.join("&")}`;
}

const page = {
  ...readAddress(),
  stats: null,
  events: [],
  connection: "connecting",
  sentence: "", // what the server says to a refusal
  heard_ms: 0, // when statistics came, by the clock of the browser
  ahead_s: 0, // how far the clock of the server is ahead of it
};
const linkTo = (stream) => address({ model: page.model, stream });
const overview = new Overview();
const streams = new StreamTable(linkTo);
let history = new History(page.model);
let live = null;

const model = () => page.stats?.models.find((each) => each.name === page.model) ?? page.stats?.models[0];
const serverNow = () => Date.now() / 1000 + page.ahead_s;

function connect() {
  live?.close();
  if (history.model !== page.model) history = new History(page.model);
  page.events = [];
  showEvents();
  streams.show("");
  live = new Live(`api/events?${query({ model: page.model, stream: page.stream })}`, onEvent, onConnection);
}

function onConnection(connection, sentence = "") {
  Object.assign(page, { connection, sentence });
  if (connection === "live") {
    page.events = [];
    showEvents();
    loadHistory(history);
  }
  showConnection();
}

async function loadHistory(target) {
  try {
    target.load((await getJson(`api/history?${query({ model: target.model })}`)).columns);
    draw();
  } catch {
    // the connection tells what is wrong, and the charts begin now
  }
}

function onEvent(kind, data) {
  if (kind === "stats") {
    page.heard_ms = Date.now();
    page.ahead_s = data.time_s - page.heard_ms / 1000;
    page.stats = data;
    const { numbers } = model() ?? {};
    if (numbers) history.append(numbers.recent_time_s ?? data.time_s, numbers);
    showStats();
  } else if (kind === "stream" && data.name === page.stream) {
    showRecord(data.state === "closed" ? null : data, page.stream, model()?.recording?.file);
  } else if (kind === "log") {
    page.events.push(data);
    if (page.events.length > REMEMBERED) page.events.shift();
    showEvents();
  }
}

function showStats() {
  const { stats } = page;
  const present = model();
  showConnection();
  showModels();
  if (!present) return;
  overview.show(present);
  showAlarm(stats.models, (name, stream) => address({ model: name, stream }));
  const about = [present.kind, `${present.features} → ${present.outputs}`, present.device];
  if (stats.models.length === 1) about.unshift(present.name);
  setText("about", about.join(" · "));
  const serving = `serving ${stats.endpoint} for ${duration(stats.uptime_s)}`;
  const fingerprint = `fingerprint ${present.fingerprint.slice(0, 12)}`;
  setText("end", [`instep ${stats.version}`, `process ${stats.pid}`, serving, fingerprint].join(" · "));
  if (page.stream === null) streams.show(present.name);
  draw();
}

function showModels() {
  const names = page.stats.models.map((each) => each.name);
  const select = byId("model");
  byId("models").hidden = names.length < 2;
  if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
    select.replaceChildren(...names.map((name) => element("option", { text: name })));
  }
  const name = model()?.name ?? "";
  if (select.value !== name) select.value = name;
}

let drawing = 0;
function showEvents() {
  drawing ||= requestAnimationFrame(() => { // many come at once when the page connects
    drawing = 0;
    if (page.stream === null) showLog(byId("log"), byId("no-events"), page.events, linkTo);
    else { // also of a stream that is gone
      const its = page.events.filter((event) => event.stream === page.stream);
      showLog(byId("stream-log"), byId("no-stream-events"), its);
    }
  });
}

function draw() {
  if (page.stream === null) overview.drawCharts(history, serverNow());
}

const LINK = { connecting: "Connecting", live: "Live", lost: "No answer", ended: "Stopped", refused: "Refused" };
const PROBLEM = {
  lost: "The server does not answer.",
  ended: "The server is shutting down, or has ended.",
  refused: "The server refuses:",
};

function showConnection() {
  const { connection, sentence, stats } = page;
  byId("link").dataset.state = connection;
  setText("link-text", LINK[connection]);
  const isStale = connection !== "live" && connection !== "connecting";
  document.body.classList.toggle("stale", isStale);
  let text = "";
  if (isStale) {
    const since = page.heard_ms ? ` These numbers are ${duration((Date.now() - page.heard_ms) / 1000)} old.` : "";
    const reason = sentence ? ` ${sentence}.` : "";
    text = `${PROBLEM[connection]}${reason}${since} Trying again every second.`;
  } else if (stats?.draining) text = "The server is draining: it answers the frames that it has admitted, and ends.";
  else if (stats && !stats.ready) text = "The server is not ready yet.";
  else if (stats?.outdated) text = `The server does not run the current configuration: ${stats.outdated}.`;
  byId("banner").hidden = text === "";
  byId("banner").dataset.level = isStale ? "bad" : "fair";
  setText("banner", text);
  document.title = `${isStale ? "✕ " : ""}${page.stream ?? model()?.name ?? "instep"} – instep`;
}

function route({ isFirst = false } = {}) {
  Object.assign(page, readAddress());
  const isStream = page.stream !== null;
  byId("overview").hidden = isStream;
  byId("stream").hidden = !isStream;
  byId("back").href = address({ model: page.model });
  connect();
  if (isStream) {
    showRecord(null, page.stream);
    setText("no-stream", "Asking the server about it …");
  }
  if (!isFirst) {
    scrollTo(0, 0);
    byId(isStream ? "stream-name" : "main").focus({ preventScroll: true });
  }
}

byId("model").addEventListener("change", (event) => {
  location.hash = address({ model: event.target.value });
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which stream is shown
  byId("main").focus();
});
addEventListener("hashchange", () => route());
setInterval(() => {
  if (page.connection === "live") return;
  showConnection(); // counts how old the numbers are
  draw();
}, 1000);
route({ isFirst: true });
