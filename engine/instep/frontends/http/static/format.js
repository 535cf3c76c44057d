// Numbers in plain words. Everything returns text; a missing number is a dash.

const GROUPED = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const NONE = "–";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** 12,345,678; one decimal below ten unless it is whole. */
export function count(value) {
  if (!isNumber(value)) return NONE;
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return value.toFixed(1);
  return GROUPED.format(value);
}

/** 12.3k, 4.5M: for axes. */
export function short(value) {
  if (!isNumber(value)) return NONE;
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}${unit}`;
  }
  return `${+value.toPrecision(3)}`;
}

/** 212 µs, 1.24 ms, 3.1 s, of microseconds. */
export function micros(value) {
  if (!isNumber(value)) return NONE;
  if (value < 999.5) return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} µs`;
  if (value < 999_500) return `${digits(value / 1e3)} ms`;
  return `${digits(value / 1e6)} s`;
}

/** 500 µs, 1.5 ms, 2 s: for axes. */
export function microsShort(value) {
  if (!isNumber(value)) return NONE;
  const [unit, size] = value < 1e3 ? ["µs", 1] : value < 1e6 ? ["ms", 1e3] : ["s", 1e6];
  return `${+(value / size).toPrecision(3)} ${unit}`;
}

const digits = (value) => value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);

/** 0.4 s, 12 s, 3 min, 2 h 5 min, 3 d 4 h, of seconds. */
export function duration(value) {
  if (!isNumber(value)) return NONE;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 100) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

/** An age: one that is negligible reads better as "now" than as 0.0 s ago. */
export const ago = (value) => (!isNumber(value) ? NONE : value < 0.95 ? "now" : `${duration(value)} ago`);

/** 512 B, 1.2 MB, 3.4 GB: decimal units, as disks are sold. */
export function bytes(value) {
  if (!isNumber(value)) return NONE;
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${digits(value / size)} ${unit}`;
  }
  return `${value} B`;
}

export const percent = (value) => (isNumber(value) ? `${Math.round(value * 100)} %` : NONE);

/** 14:05:09 in the browser's time zone, of Unix seconds. */
export const clock = (time_s) => new Date(time_s * 1000).toLocaleTimeString("en-GB");

/** Enough digits to tell any two float32 apart. */
export function float32(value) {
  if (!isNumber(value)) return "a value that is not finite";
  return Object.is(value, -0) ? "-0" : String(+value.toPrecision(9));
}

/** A word for a shell, which people paste into: names of streams come from strangers. */
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** An element with text; never with markup, because names of streams come from strangers. */
export function element(tag, { text, className, title } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (title) made.title = title;
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets text where it differs, so that nothing is laid out again for a number that did not change. */
export function setText(target, text) {
  const node = typeof target === "string" ? byId(target) : target;
  if (node.textContent !== text) node.textContent = text;
}

/** Replaces the pairs of a definition list by [term, text] pairs. */
export function setPairs(list, pairs) {
  while (list.children.length > pairs.length) list.lastElementChild.remove();
  pairs.forEach(([term, text], index) => {
    const pair = list.children[index] ?? list.appendChild(element("div", {}, element("dt"), element("dd")));
    setText(pair.children[0], term);
    setText(pair.children[1], text);
    pair.children[0].title = term;
  });
}
