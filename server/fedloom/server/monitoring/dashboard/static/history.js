// What happened in a run, and who took how long in its newest rounds.

import { clock, count, duration, el, pill } from "./shape.js";

const ROUNDS = 12;
const SLOW = 2;
const LOST = { left: "left", lease: "no sign of life", rejected: "update rejected" };
const BAD = new Set(["refused", "rejected", "revoked", "declined", "doubled", "lost"]);
const GOOD = new Set(["joined", "enrolled", "invited"]);

const middle = (values) => values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) / 2)];

// A row for each client, the slowest first; a column for each of the newest rounds, the oldest first.
export function timeline(answers) {
  const rounds = answers.slice(0, ROUNDS).reverse();
  const names = [...new Set(rounds.flatMap((each) => [...Object.keys(each.took_s), ...Object.keys(each.lost), ...each.pending]))];
  const all = names.map((name) => {
    const known = rounds.map((each) => each.took_s[name]).filter((value) => typeof value === "number");
    return { name, usual: known.length ? middle(known) : null, lost: rounds.filter((each) => name in each.lost).length };
  });
  const usual = all.filter((each) => each.usual !== null);
  const typical = usual.length ? middle(usual.map((each) => each.usual)) : null;
  const longest = Math.max(1e-9, ...rounds.flatMap((each) => Object.values(each.took_s).filter((value) => value !== null)));
  all.sort((a, b) => (b.usual ?? -1) - (a.usual ?? -1) || a.name.localeCompare(b.name));
  const head = el("tr", {}, el("th", { scope: "col" }, "Client"), ...rounds.map((each) => el("th", { scope: "col", class: "num" }, count(each.round))), el("th", { scope: "col", class: "num" }, "Usually"));
  const rows = all.map(({ name, usual: mine, lost }) => {
    const slow = usual.length > 1 && mine !== null && mine > 1 && mine >= SLOW * typical;
    const note = slow ? pill(["slow", "warn"]) : lost ? pill([`lost ${count(lost)}×`, ""]) : null;
    return el("tr", {}, el("th", { scope: "row", class: "who", title: name }, name), ...rounds.map((each) => cell(each, name, longest)), el("td", { class: "num" }, note, " ", mine === null ? "–" : duration(mine)));
  });
  return el("div", { class: "across", tabindex: "0", role: "group", "aria-label": "Who took how long, by round" }, el("table", { class: "timeline" }, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function cell(answers, name, longest) {
  if (name in answers.took_s) {
    const took = answers.took_s[name];
    const shade = took === null ? 0 : Math.min(4, Math.ceil((4 * took) / longest));
    return el("td", { class: `num shade-${shade}`, title: `round ${answers.round}` }, took === null ? "sent" : took < 1 ? "<1 s" : duration(took));
  }
  if (name in answers.lost) return el("td", { class: "num lost", title: LOST[answers.lost[name]] }, "lost");
  return el("td", { class: "num faint" }, answers.pending.includes(name) ? "…" : "–");
}

// Names and details are a peer's words, and shown as text.
export function happened(lines) {
  if (!lines.length) return el("p", { class: "quietly" }, "Nothing yet.");
  return el("ul", { class: "list", tabindex: "0", "aria-label": "What happened, newest first" }, ...lines.map((each) => el("li", {},
    el("div", { class: "top" }, pill([each.kind, BAD.has(each.kind) ? "bad" : GOOD.has(each.kind) ? "good" : ""]), el("span", { class: "who", title: each.client }, each.client || who(each.kind)), el("time", { datetime: each.at }, each.at ? clock(each.at) : "–")),
    each.detail ? el("p", { class: "what" }, each.detail) : null)));
}

const who = (kind) => (["started", "restarted", "stopped", "reopened", "ended"].includes(kind) ? "coordinator" : "somebody");
