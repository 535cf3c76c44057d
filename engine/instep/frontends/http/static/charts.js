// Charts over time, drawn by uPlot (a global of static/vendor/uPlot.iife.min.js). Colours come from the style sheet.

import { clock, element, setText } from "./format.js";

const { uPlot } = window;

/** A colour of the style sheet in the present theme: a canvas cannot resolve `var()` and `light-dark()` itself. */
function colour(name) {
  const probe = document.getElementById("end");
  probe.style.color = `var(${name})`;
  const resolved = getComputedStyle(probe).color;
  probe.style.color = "";
  return resolved;
}

const faded = (resolved, alpha) => resolved.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

const clockTexts = (_plot, splits, _axis, _space, step_s) =>
  splits.map((time_s) => (step_s < 60 ? clock(time_s) : clock(time_s).slice(0, 5)));
const powersOfTen = (_plot, splits) => splits.map((value) => (Number.isInteger(Math.log10(value)) ? value : null));
const TIME_AXIS = { size: 32, gap: 10, space: 80, incrs: [5, 10, 15, 30, 60, 120, 300], grid: { show: false } };

/**
 * One chart with a heading and a legend that shows the newest values, or those under the pointer.
 *
 * spec:
 *   title
 *   series: [{label, key: a colour of the style sheet, column: of the history}]
 *   value, axis: number → text, for the legend and for the axis
 *   sync: charts with the same key share their cursor
 *   window_s: the shortest and the longest time that is shown
 *   room: "wide" or "narrow", where values in the legend are long or short
 *   top: what the axis reaches at least
 *   idle: what the axis reaches while there is nothing
 *   stacked: whether sums are drawn
 *   log: whether to offer a logarithmic axis
 */
export class Chart {
  #plot;
  #rows = [[]];
  #now_s = 0;
  #isLog = false;

  constructor(host, spec) {
    this.spec = spec;
    this.values = spec.series.map(() => element("span", { className: `value ${spec.room ?? ""}`, text: "–" }));
    const entries = spec.series.map(({ key, label }, index) => {
      const swatch = element("i", { className: `key ${key}` });
      return element("span", {}, swatch, element("span", { text: label }), this.values[index]);
    });
    const legend = element("div", { className: "legend" }, ...entries);
    const head = element("div", { className: "head" }, element("h2", { text: spec.title }));
    this.when = head.appendChild(element("span", { className: "when" }));
    if (spec.log) head.append(this.#logSwitch());
    this.canvas = element("div", { className: "plot" });
    this.canvas.setAttribute("role", "img");
    host.append(element("section", { className: "panel chart" }, head, legend, this.canvas));
    this.#make();
    new ResizeObserver(() => this.#plot.setSize(this.#size())).observe(this.canvas);
    addEventListener("themechange", () => this.#plot.redraw(false));
  }

  /** rows: [times, values of the first series, …]; now_s: the right end of the time axis in Unix seconds. */
  draw(rows, now_s) {
    this.#rows = rows;
    this.#now_s = now_s;
    const [shortest, longest] = this.spec.window_s;
    const first = Math.min(rows[0][0] ?? now_s, now_s - shortest);
    this.#plot.setData(this.#drawn(), false);
    this.#plot.setScale("x", { min: Math.max(first, now_s - longest), max: now_s });
    this.#label(this.#plot.cursor.left >= 0 ? this.#plot.posToIdx(this.#plot.cursor.left) : null);
  }

  #logSwitch() {
    const button = element("button", { className: "plain small", text: "log" });
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.title = "Logarithmic axis";
    button.addEventListener("click", () => {
      this.#isLog = !this.#isLog;
      button.setAttribute("aria-pressed", String(this.#isLog));
      this.#plot.destroy();
      this.#make();
      this.draw(this.#rows, this.#now_s);
    });
    return button;
  }

  #size() {
    return { width: Math.max(120, this.canvas.clientWidth), height: this.canvas.clientHeight };
  }

  #make() {
    const { spec } = this;
    const valueText = (value) => (value === null ? "" : spec.axis(value));
    const filled = spec.stacked ? 1 : spec.series.length === 1 ? 0.12 : 0;
    const axis = {
      stroke: () => colour("--quiet"),
      grid: { stroke: () => colour("--line"), width: 1, ...(this.#isLog && { filter: powersOfTen }) },
      ticks: { show: false },
      font: `12px ${getComputedStyle(document.body).fontFamily}`,
      gap: 6,
    };
    const series = spec.series.map(({ label, key }) => ({
      label,
      stroke: () => colour(`--${key}`),
      fill: filled ? () => faded(colour(`--${key}`), filled) : undefined,
      width: spec.stacked ? 0 : 1.75,
      points: { show: false },
    }));
    if (spec.stacked) series.reverse(); // the sum of all is drawn first, beneath the others
    this.#plot = new uPlot(
      {
        ...this.#size(),
        padding: [8, 20, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { setScale: false, x: false }, points: { size: 6 }, sync: { key: spec.sync } },
        scales: {
          x: { time: true },
          y: this.#isLog
            ? { distr: 3, log: 10, range: (_, low, high) => (high ? uPlot.rangeLog(low, high, 10, true) : [1, 1000]) }
            : { range: (_, low, high) => this.#range(low, high) },
        },
        axes: [
          { ...axis, ...TIME_AXIS, values: clockTexts },
          { ...axis, size: 62, space: 32, values: (_, splits) => splits.map(valueText) },
        ],
        series: [{}, ...series],
        hooks: { setCursor: [(plot) => this.#label(plot.cursor.idx ?? null)] },
      },
      this.#drawn(),
      this.canvas,
    );
  }

  #range(low, high) {
    const { top = 0, idle = 1 } = this.spec;
    if (low === null || (low === 0 && high === 0)) return [0, top || idle];
    if (low >= 0) return [0, high <= top ? top : high * 1.1];
    const room = (high - low) * 0.1 || 1;
    return [low - room, high + room];
  }

  #drawn() {
    const [times, ...columns] = this.#rows;
    if (!columns.length) return [[], ...this.spec.series.map(() => [])];
    if (this.#isLog) return [times, ...columns.map((column) => column.map((value) => (value > 0 ? value : null)))];
    if (!this.spec.stacked) return this.#rows;
    const sums = [];
    for (const column of columns) {
      const below = sums.at(-1);
      sums.push(column.map((value, index) => (value === null ? null : value + (below?.[index] ?? 0))));
    }
    return [times, ...sums.reverse()];
  }

  /** Shows the values of one row, or the newest. */
  #label(index) {
    const [times, ...columns] = this.#rows;
    const row = index ?? times.length - 1;
    const texts = columns.map((column) => this.spec.value(column[row]));
    texts.forEach((text, each) => setText(this.values[each], text));
    setText(this.when, index === null || !times.length ? "" : clock(times[index]));
    if (index === null) {
      const parts = texts.map((text, each) => `${this.spec.series[each].label} ${text}`);
      this.canvas.setAttribute("aria-label", `${this.spec.title}: ${parts.join(", ") || "nothing yet"}`);
    }
  }
}
