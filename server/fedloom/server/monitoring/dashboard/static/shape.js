// Elements and texts. Everything that comes from outside becomes a text node: no markup of it is ever read.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

export function pill([label, look], more = "") {
  return el("span", { class: `pill ${look}` }, more ? `${label}: ${more}` : label);
}

// heads: [label, look]; rows: cells of [content, look]. On a phone each row of `cards` is a card of its own.
export function table(heads, rows, cards) {
  const head = el("tr", {}, ...heads.map(([label, look]) => el("th", { scope: "col", class: look }, label)));
  const body = rows.map((cells) => el("tr", {}, ...cells.map(([content, look], index) => el("td", { class: [look, heads[index][1] === "num" ? "num" : ""].join(" ").trim() || null, "data-label": heads[index][0] }, content))));
  return el("div", { class: cards ? "cards" : null }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);
export const percent = (value) => `${(100 * value).toFixed(1)} %`;
export const plural = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1e3) return `${value} B`;
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${(value / size).toFixed(value / size < 100 ? 1 : 0)}\u00a0${unit}`;
  }
}

export function duration(seconds) {
  if (seconds < 1) return "less than 1 s";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export const ago = (seconds) => (seconds < 2 ? "now" : `${duration(seconds)} ago`);

export function clock(text) {
  const at = new Date(text);
  const day = at.toDateString() === new Date().toDateString() ? "" : `${at.toLocaleDateString("en", { day: "numeric", month: "short" })} `;
  return day + at.toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

export function figure(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

// A number of a run file: 0.02, 1e-5, 0.666667.
export function small(value) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential().replace("e-", " × 10⁻").replace(/\d+$/, superscript).replace(/^1 × /, "");
  return String(Number(value.toPrecision(6)));
}

const superscript = (digits) => [...digits].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
