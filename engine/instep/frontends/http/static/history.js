// The last ten minutes of one model, as the server keeps them and as they continue here.

const ROWS = 600;
const GAP_S = 3; // seconds without a row, after which a line is broken
const OF_ANSWERS = /^(latency|queue|compute|send|batch)_(us|size)/;

export class History {
  times = [];
  #columns = new Map();

  constructor(model) {
    this.model = model;
  }

  /** Takes the server's columns, behind what was seen here before it restarted. */
  load({ time_s: times = [], ...columns }) {
    const first = times[0] ?? Infinity;
    const kept = this.times.findIndex((time) => time >= first);
    const earlier = kept < 0 ? this.times.length : kept;
    const old = Object.fromEntries(Object.keys(columns).map((name) => [name, this.column(name).slice(0, earlier)]));
    const before = this.times.slice(0, earlier);
    this.times = [];
    this.#columns.clear();
    before.forEach((time, index) => this.#push(time, (name) => old[name][index], Object.keys(columns)));
    times.forEach((time, index) => this.#push(time, (name) => columns[name][index], Object.keys(columns)));
  }

  /** Takes the `recent_` numbers of one statistics event. */
  append(time_s, numbers) {
    if (time_s <= (this.times.at(-1) ?? 0)) return;
    const names = Object.keys(numbers).filter((name) => name.startsWith("recent_") && name !== "recent_time_s");
    this.#push(time_s, (name) => numbers[`recent_${name}`], names.map((name) => name.slice("recent_".length)));
  }

  /** One value per time; null where nothing is known. */
  column(name) {
    return this.#columns.get(name) ?? this.times.map(() => null);
  }

  rows(names) {
    return [this.times, ...names.map((name) => this.column(name))];
  }

  #push(time_s, value, names) {
    const last = this.times.at(-1);
    if (last !== undefined && time_s - last > GAP_S) this.#row(last + 1, () => null, []);
    this.#row(time_s, value, names);
  }

  #row(time_s, value, names) {
    for (const name of names) if (!this.#columns.has(name)) this.#columns.set(name, this.times.map(() => null));
    this.times.push(time_s);
    const isIdle = names.includes("latency_us_p50") && !value("latency_us_p50"); // nothing was answered: no latency
    for (const [name, column] of this.#columns) {
      const isKnown = names.includes(name) && !(isIdle && OF_ANSWERS.test(name));
      column.push(isKnown ? value(name) ?? null : null);
    }
    if (this.times.length > ROWS) for (const each of [this.times, ...this.#columns.values()]) each.shift();
  }
}
