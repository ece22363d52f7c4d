// Charts in SVG, drawn for the width they have, so that their text is as large as the page's.

import { bytes, el, figure, percent, svg } from "./shape.js";

const HEIGHT = 210;
const MARGIN = { top: 10, right: 10, bottom: 24 };

function nice(span, most) {
  const rough = span / most;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * size >= rough);
  return step * size;
}

function ticks(low, high, most) {
  const step = nice(high - low || 1, most);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at <= Math.floor(high / step + 1e-9); at += 1) found.push(at * step);
  return found;
}

// A spec: title, name, kind ("line", "step" or "bars"), points ([[round, value, ...], ...]), unit ("%", "B" or none),
// others ([{index, name, points}, ...]: runs to compare with), limit and limitText, zero (the axis begins there), until (last round of the axis), empty (what to say without points).
export class Chart {
  constructor(parent) {
    this.reading = el("span", { class: "reading" });
    this.title = el("span", { class: "title" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img" });
    this.figure = el("figure", { class: "chart" }, el("figcaption", {}, this.title, this.reading), this.plot);
    parent.append(this.figure);
    this.at = null;
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  show(spec) {
    const text = JSON.stringify(spec);
    if (text === this.text) return;
    this.text = text;
    this.spec = spec;
    this.draw();
  }

  // Those that can be read: this run's, or, where it has none, those of the first run that it is compared with.
  points() {
    if (!this.spec || this.spec.points.length) return this.spec?.points ?? [];
    return this.spec.others?.find((each) => each.points.length)?.points ?? [];
  }

  key(event) {
    const last = this.points().length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (last < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const from = this.at ?? (event.key === "ArrowLeft" ? last + 1 : -1);
    this.move(Math.max(0, Math.min(last, from + steps[event.key])));
  }

  point(event) {
    const points = this.points();
    if (!this.x || !points.length) return;
    const where = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    points.forEach(([round], index) => {
      if (Math.abs(this.x(round) - where) < Math.abs(this.x(points[best][0]) - where)) best = index;
    });
    this.move(best);
  }

  move(index) {
    if (index === this.at) return;
    this.at = index;
    this.draw();
  }

  draw() {
    const { spec } = this;
    if (!spec) return;
    this.title.textContent = spec.title;
    const width = this.plot.clientWidth;
    const beside = (spec.others ?? []).filter((each) => each.points.length);
    if (!spec.points.length && !beside.length) {
      this.reading.replaceChildren();
      this.plot.setAttribute("aria-label", `${spec.title}: ${spec.empty}`);
      this.plot.replaceChildren(el("p", { class: "empty" }, spec.empty));
      return;
    }
    if (width < 50) return;
    const points = this.points();
    const drawn = [points, ...beside.map((each) => each.points)].flat();
    const stacks = spec.kind === "bars";
    const values = drawn.map((point) => (stacks ? point[1] + point[2] : point[1]));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (spec.limit !== null && spec.limit !== undefined) high = Math.max(high, spec.limit * 1.1);
    if (spec.zero || stacks) low = 0;
    if (high === low) [low, high] = [spec.zero || stacks ? 0 : low - Math.abs(low) * 0.1 - 0.05, high + Math.abs(high) * 0.1 + 0.05];
    const step = nice(high - low, 4);
    low = Math.floor(low / step + 1e-9) * step;
    high = Math.ceil(high / step - 1e-9) * step;
    const labels = ticks(low, high, 4).map((value) => [value, tick(spec.unit, value, step)]);
    const left = 12 + 7 * Math.max(...labels.map(([, label]) => label.length));
    const inner = { width: width - left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const where = drawn.map(([round]) => round);
    const ends = [Math.min(...where) - (stacks ? 0.5 : 0), Math.max(...where) + (stacks ? 0.5 : 0)];
    if (spec.until && !stacks) ends[1] = Math.max(ends[1], spec.until);
    if (ends[0] === ends[1]) { ends[0] -= 0.5; ends[1] += 0.5; }
    const x = (round) => left + ((round - ends[0]) / (ends[1] - ends[0])) * inner.width;
    const y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * inner.height;
    this.x = x;

    const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
    for (const [value, label] of labels) {
      root.append(svg("line", { class: "grid", x1: left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      root.append(svg("text", { class: "axis", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, label));
    }
    root.append(svg("line", { class: "base", x1: left, x2: width - MARGIN.right, y1: y(low), y2: y(low) }));
    const rounds = ticks(Math.ceil(ends[0]), Math.floor(ends[1]), Math.max(2, Math.floor(inner.width / 55))).filter(Number.isInteger);
    for (const round of rounds) {
      root.append(svg("text", { class: "axis", x: x(round), y: HEIGHT - 6, "text-anchor": "middle" }, String(round)));
    }
    if (spec.limit !== null && spec.limit !== undefined) {
      root.append(svg("line", { class: "limit", x1: left, x2: width - MARGIN.right, y1: y(spec.limit), y2: y(spec.limit) }));
      root.append(svg("text", { class: "limit-text", x: left + 4, y: y(spec.limit) - 6 }, spec.limitText));
    }
    if (stacks) this.bars(root, points, x, y, inner.width / (ends[1] - ends[0]));
    else {
      for (const each of beside) this.line(root, each.points, x, y, `other-${each.index}`);
      if (spec.points.length) this.line(root, points, x, y, spec.name);
    }
    const chosen = this.at === null ? null : points[Math.min(this.at, points.length - 1)];
    if (chosen) {
      root.append(svg("line", { class: "cursor", x1: x(chosen[0]), x2: x(chosen[0]), y1: MARGIN.top, y2: y(low) }));
      if (!stacks) root.append(svg("circle", { class: `${spec.points.length ? spec.name : `other-${beside[0].index}`}-dot`, cx: x(chosen[0]), cy: y(chosen[1]), r: 5 }));
    }
    const last = points[points.length - 1];
    const told = `${spec.points.length ? "" : `${beside[0].name}, `}${reading(spec, chosen ?? last)}`;
    this.reading.replaceChildren(...(stacks ? keyed(chosen ?? last) : [told]));
    this.plot.setAttribute("aria-label", `${spec.title}, ${points.length} points; ${told}. Left and right arrow keys read other rounds.`);
    this.plot.replaceChildren(root);
  }

  line(root, points, x, y, look) {
    let path = "";
    points.forEach(([round, value], index) => {
      if (index && this.spec.kind === "step") path += `H${x(round)}V${y(value)}`;
      else path += `${index ? "L" : "M"}${x(round)} ${y(value)}`;
    });
    root.append(svg("path", { class: `line ${look}`, d: path }));
    if (points.length > 40) return;
    for (const [round, value] of points) root.append(svg("circle", { class: `${look}-dot`, cx: x(round), cy: y(value), r: 2.5 }));
  }

  bars(root, points, x, y, room) {
    const width = Math.max(1, Math.min(28, room * 0.7));
    for (const [round, up, down] of points) {
      const left = x(round) - width / 2;
      root.append(svg("rect", { class: "up", x: left, y: y(up), width, height: Math.max(0, y(0) - y(up)) }));
      root.append(svg("rect", { class: "down", x: left, y: y(up + down), width, height: Math.max(0, y(up) - y(up + down)) }));
    }
  }
}

function tick(unit, value, step) {
  if (unit === "%") return `${(100 * value).toFixed(step * 100 < 1 ? 1 : 0)} %`;
  if (unit === "B") {
    const [size, name] = value >= 1e9 || step >= 1e9 ? [1e9, "GB"] : step >= 1e6 ? [1e6, "MB"] : step >= 1e3 ? [1e3, "kB"] : [1, "B"];
    return value === 0 ? "0" : `${Number((value / size).toFixed(2))} ${name}`;
  }
  const digits = Math.max(0, Math.min(4, -Math.floor(Math.log10(step) + 1e-9) + (String(step).includes("25") ? 1 : 0)));
  return value.toFixed(digits);
}

function reading(spec, point) {
  const value = spec.kind === "bars" ? `${bytes(point[1])} up, ${bytes(point[2])} down` : spec.unit === "%" ? percent(point[1]) : figure(point[1], 3);
  return `round ${point[0]}: ${value}`;
}

function keyed([round, up, down]) {
  const key = (look, size) => el("span", { class: "key" }, el("i", { class: look }), `${bytes(size)} ${look}`);
  return [`round ${round}`, key("up", up), key("down", down)];
}
