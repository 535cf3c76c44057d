// The numbers and badges of one model, and its charts.

import { Chart } from "./charts.js";
import { ago, byId, bytes, count, duration, float32, micros, microsShort, percent, quoted, short } from "./format.js";
import { setPairs, setText } from "./format.js";

const CHARTS = [
  {
    title: "Throughput", axis: short, value: count, room: "wide", idle: 100,
    series: [{ label: "frames/s", key: "blue", column: "frames_per_s" }],
  },
  {
    title: "Latency", idle: 1000, room: "wide", axis: microsShort, value: micros, log: true,
    series: [
      { label: "median", key: "blue", column: "latency_us_p50" },
      { label: "99th percentile", key: "orange", column: "latency_us_p99" },
    ],
  },
  {
    title: "Mean latency, split", idle: 1000, axis: microsShort, value: micros, stacked: true,
    series: ["queue", "compute", "send"].map((part) => ({ label: part, key: part, column: `${part}_us_mean` })),
  },
  {
    title: "Time busy", room: "narrow", axis: percent, value: percent, top: 1,
    series: [
      { label: "step", key: "orange", column: "executor_busy" },
      { label: "event loop", key: "violet", column: "loop_busy" },
    ],
  },
  {
    title: "Streams", axis: short, value: count, log: true, top: 4,
    series: [
      { label: "open", key: "blue", column: "streams_open" },
      { label: "parked", key: "orange", column: "streams_parked" },
      { label: "on disk", key: "violet", column: "streams_hibernated" },
    ],
  },
];

export class Overview {
  #charts;

  constructor() {
    const shared = { sync: "overview", window_s: [60, 600] };
    this.#charts = CHARTS.map((spec) => new Chart(byId("charts"), { ...spec, ...shared }));
  }

  drawCharts(history, now_s) {
    for (const chart of this.#charts) {
      chart.draw(history.rows(chart.spec.series.map((series) => series.column)), now_s);
    }
  }

  show(model) {
    const { numbers } = model;
    const recent = (name) => numbers[`recent_${name}`];
    setText("streams-open", count(numbers.streams_open));
    setText("streams-parked", count(numbers.streams_parked));
    setText("streams-hibernated", count(numbers.streams_hibernated));
    setText("streams-max", count(model.max_streams));
    meter("streams-meter", numbers.streams_open / model.max_streams);

    setText("frames-rate", count(recent("frames_per_s")));
    setText("executor-busy", percent(recent("executor_busy")));
    setText("loop-busy", percent(recent("loop_busy")));
    setText("frames-total", count(numbers.frames_total));
    meter("executor-meter", recent("executor_busy"));

    const isAnswering = recent("latency_us_p50") > 0;
    const answered = (name) => micros(isAnswering ? recent(name) : null);
    for (const quantile of ["p50", "p99"]) setText(quantile, answered(`latency_us_${quantile}`));
    for (const part of ["latency", "queue", "compute", "send"]) setText(`${part}-mean`, answered(`${part}_us_mean`));
    const mean = recent("latency_us_mean") || 1;
    const words = ["queue", "compute", "send"].map((part, index) => {
      byId("split").children[index].style.width = `${(100 * (recent(`${part}_us_mean`) || 0)) / mean}%`;
      return `${part} ${answered(`${part}_us_mean`)}`;
    });
    byId("split").setAttribute("aria-label", words.join(", "));

    const size = recent("batch_size_mean");
    setText("batch", size > 0 ? count(Math.round(size)) : "–");
    setText("batches-rate", count(recent("batches_per_s")));
    setText("pending", count(numbers.frames_pending));

    this.#showTrust(model);
  }

  #showTrust({ exactness, arithmetic, verification, numbers, recording, durability }) {
    const exact = { exact: ["good", "Exact"], tolerance: ["fair", "Within tolerance"] };
    badge("exactness", ...(exact[exactness] ?? ["off", exactness]));
    setText("exactness-detail", arithmetic);

    badge("verification", ...verificationBadge(verification));
    setText("verification-detail", verificationDetail(verification, recording));

    const refused = refusals(numbers);
    const total = refused.reduce((sum, [, number]) => sum + number, 0);
    const rate = numbers.recent_refused_per_s;
    if (rate > 0) badge("refused", "warn", `${count(rate)} per second`);
    else if (total) badge("refused", "off", `${count(total)} since the start`);
    else badge("refused", "good", "None since the start");
    const others = refused.length > 3 ? refused.splice(2).reduce((sum, [, number]) => sum + number, 0) : 0;
    if (others) refused.push(["others", others]);
    setPairs(byId("refused-codes"), refused.map(([code, number]) => [code, count(number)]));

    if (recording) {
      badge("recording", ...(DURABILITY[durability] ?? ["off", durability]));
      setPairs(byId("recording-facts"), [
        [recording.file, `${bytes(recording.bytes)}, ${bytes(recording.free_bytes)} free`],
        ["commit, 99th percentile", micros(numbers.recent_commit_us_p99 || null)],
        ["newest checkpoint", numbers.checkpoint_age_s === undefined ? "none yet" : ago(numbers.checkpoint_age_s)],
      ]);
    } else {
      badge("recording", "off", "Off");
      setPairs(byId("recording-facts"), [["states", "in memory only"]]);
    }
  }
}

const DURABILITY = {
  memory: ["fair", "A crash may lose frames"],
  commit: ["good", "On"],
  fsync: ["good", "On, survives a power cut"],
};

function badge(id, level, text) {
  byId(id).dataset.level = level;
  setText(id, text);
}

function meter(id, fraction) {
  byId(id).firstElementChild.style.width = `${100 * Math.min(1, fraction || 0)}%`;
}

function refusals(numbers) {
  return Object.entries(numbers)
    .map(([name, number]) => [/^refused_(\w+)_total$/.exec(name)?.[1], number])
    .filter(([code, number]) => code && code !== "messages" && number > 0)
    .map(([code, number]) => [code.toUpperCase(), number])
    .sort(([, a], [, b]) => b - a);
}

const LEAST_COMPARED = 0.99; // below this, the badge does not look as if everything were

const floored = (share) => `${Math.floor(share * 100)} %`;

function verificationBadge(verification) {
  const { state, frames, skipped, mismatches } = verification ?? {};
  const compared = frames / (frames + (skipped || 0));
  switch (state) {
    case "verified":
      if (compared < LEAST_COMPARED) return ["fair", `${floored(compared)} compared, all match`];
      return ["good", `${count(frames)} frames match`];
    case "checking": return ["busy", frames ? `Behind: ${count(frames)} frames match` : "Checking"];
    case "mismatch": return ["bad", mismatches === 1 ? "1 mismatch" : `${count(mismatches)} mismatches`];
    default: return ["off", "Off"];
  }
}

function verificationDetail(verification, recording) {
  const { state, reason, lag_s, skipped } = verification ?? { state: "off" };
  if (state === "off") return reason || "Set verify.live to have the server check its outputs while it serves.";
  if (state === "mismatch") return "The newest one is described above.";
  const parts = [`${duration(lag_s)} behind the newest frames`];
  if (reason) parts.unshift(reason);
  if (skipped) parts.push(`${count(skipped)} frames not compared: instep verify ${quoted(recording.file)}`);
  return parts.join("; ");
}

/** Which values differ, in words. Zeros may differ in their signs, and JSON knows only finite numbers. */
function differences(expected, got) {
  if (!expected.length) return "its recorded frame is out of order";
  const differing = [...expected.keys()].filter((index) => !Object.is(expected[index], got[index]));
  if (!differing.length) return "values that are not finite differ in their bits";
  const shown = differing
    .slice(0, 3)
    .map((index) => `output ${index}: expected ${float32(expected[index])}, got ${float32(got[index])}`);
  if (differing.length > 3) shown.push(`and ${count(differing.length - 3)} more`);
  return shown.join("; ");
}

/** Shows the mismatch of the first model that has one, with the values that differ. */
export function showAlarm(models, linkTo) {
  const found = models.find(({ verification }) => verification?.state === "mismatch" && verification.mismatch);
  byId("alarm").hidden = !found;
  if (!found) return;
  const { stream, seq, expected, got } = found.verification.mismatch;
  setText("alarm-stream", stream);
  byId("alarm-stream").href = linkTo(found.name, stream);
  setText("alarm-frame", `frame ${count(seq)}${models.length > 1 ? ` of model ${found.name}` : ""}`);
  setText("alarm-values", differences(expected, got));
}
