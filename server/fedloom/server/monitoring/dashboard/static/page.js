// The page: asks for the figures of one run once a second, and shows what has changed.

import { Chart } from "./chart.js";
import { listenActs, sure } from "./acts.js";
import { happened, timeline } from "./history.js";
import { ago, bytes, clock, count, duration, el, figure, percent, pill, plural, small, table } from "./shape.js";

const $ = (id) => document.getElementById(id);
const PAUSE_MS = 1000;
const PATIENCE_MS = 15000;
const ACTION = { "x-fedloom-action": "1" };
const PHASES = {
  over: ["Finished", "good"],
  open: ["Running", "busy"],
  waiting: ["Waiting for clients", "warn"],
  stopped: ["Stopped", ""],
  elsewhere: ["Run by another coordinator", "busy"],
};
const STATES = {
  training: ["training", "busy"],
  sent: ["update sent", "good"],
  waiting: ["waiting", ""],
  lost: ["lost", "bad"],
  gone: ["not here", "warn"],
};
const LOST = { left: "left", lease: "no sign of life", rejected: "update rejected" };
const charts = {};
let role = "nobody";
let own = "";
let chosen = new URLSearchParams(location.search).get("run");
let answeredAt = null;
let failures = 0;
let timer = 0;
let overlaid = [];
const others = new Map(); // the other runs that are compared with: when they were asked for, and their figures

// One part of the page, made anew only when what it shows has changed.
const shown = new Map();
function part(id, content, make) {
  const text = JSON.stringify(content);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  $(id).replaceChildren(...[make(content)].flat().filter(Boolean));
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, credentials: "same-origin", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.status === 401) {
    role = "nobody";
    gate();
  }
  return answer;
}

async function signIn(token) {
  const answer = await ask("/api/session", {
    method: "POST",
    headers: { ...ACTION, "content-type": "application/json" },
    body: JSON.stringify({ token }),
  });
  if (!answer.ok) return (await answer.json()).error;
  await session();
  return "";
}

async function session() {
  const now = await (await ask("/api/session")).json();
  role = now.role;
  $("role").textContent = role === "nobody" ? "" : role === "operator" ? "Operator" : "Observer, read only";
  $("session").hidden = role === "nobody";
  $("session").textContent = role === "operator" || !now.open ? "Sign out" : "Sign in";
  gate();
}

function gate() {
  const closed = role === "nobody";
  if (closed && $("gate").hidden) setTimeout(() => $("gate-token").focus());
  $("gate").hidden = !closed;
  if (closed) $("run").hidden = true;
}

function banner(text) {
  $("banner").hidden = !text;
  if ($("banner").textContent !== text) $("banner").textContent = text;
}

async function refresh() {
  clearTimeout(timer);
  try {
    if (role !== "nobody") await look();
    failures = 0;
  } catch (error) {
    failures += 1;
    if (failures > 1) {
      const since = answeredAt ? ` What you see is from ${clock(answeredAt)}.` : "";
      banner(`No answer from the coordinator: it has ended, or cannot be reached.${since}`);
    }
  }
  timer = setTimeout(refresh, document.hidden ? 10 * PAUSE_MS : Math.min(10, 1 + failures) * PAUSE_MS);
}

async function look() {
  const listing = await ask("/api/runs");
  if (!listing.ok) return;
  const all = await listing.json();
  own = all.own;
  if (!all.runs.some((each) => each.name === chosen)) chosen = own;
  part("runs", [chosen, all.runs], () => all.runs.map((each) => {
    const total = each.rounds === null ? "" : `/${each.rounds}`;
    const option = el("option", { value: each.name }, `${each.name} · ${each.round}${total} · ${each.phase}`);
    option.selected = each.name === chosen;
    return option;
  }));
  $("runs-label").hidden = all.runs.length < 2;
  const answer = await ask(`/api/runs/${encodeURIComponent(chosen)}`);
  if (!answer.ok) return;
  const run = await answer.json();
  answeredAt = new Date(1000 * run.at).toISOString();
  overlaid = overlaid.filter((name) => name !== chosen && all.runs.some((each) => each.name === name));
  await Promise.all(overlaid.map(fetchOther));
  overlay(all.runs);
  banner(run.error ? `The log of this run is in trouble: ${run.error}` : "");
  show(run);
}

async function fetchOther(name) {
  if (Date.now() - (others.get(name)?.at ?? 0) < 10 * PAUSE_MS) return;
  const answer = await ask(`/api/runs/${encodeURIComponent(name)}`);
  if (answer.ok) others.set(name, { at: Date.now(), run: await answer.json() });
}

// One box for each other run of the folder; its curves are then drawn beside this one's.
function overlay(runs) {
  const names = runs.map((each) => each.name).filter((name) => name !== chosen).slice(0, 12);
  $("overlay").hidden = !names.length;
  part("overlay", [names, overlaid], () => [el("legend", {}, "Compare with"), ...names.map((name) => {
    const box = el("input", { type: "checkbox", value: name });
    box.checked = overlaid.includes(name);
    box.disabled = !box.checked && overlaid.length === 3;
    box.addEventListener("change", () => {
      overlaid = box.checked ? [...overlaid, name] : overlaid.filter((each) => each !== name);
      refresh();
    });
    const index = overlaid.indexOf(name);
    return el("label", {}, box, index < 0 ? null : el("i", { class: `swatch other-${index}` }), name);
  })]);
}

function alarm(run) {
  const more = role === "operator" && run.round && run.phase !== "over" ? " Bring clients back, or finish with what is committed." : "";
  const text = run.alarm ? `This run stands still: ${run.alarm}${run.open?.waiting ? ` (for ${duration(run.open.waiting_s)})` : ""}.${more}` : "";
  $("alarm").hidden = !text;
  if ($("alarm").textContent !== text) $("alarm").textContent = text;
  return Boolean(text);
}

function show(run) {
  $("run").hidden = false;
  document.title = `${alarm(run) ? "⚠ stands still: " : ""}${run.name} · fedloom`;
  head(run);
  tiles(run);
  curves(run);
  part("timeline", run.answers, () => timeline(run.answers));
  $("timeline-panel").hidden = !run.answers.length;
  clients(run);
  past(run);
  $("happened-note").textContent = refusals(run.totals.noted);
  part("happened", run.happened, () => happened(run.happened));
  certificates(run);
  config(run);
  $("foot").textContent = `Run ${run.run ?? "not begun"} · coordinator started ${run.starts === 1 ? "once" : plural(run.starts, "time")} · figures of ${clock(answeredAt)}`;
}

function head(run) {
  const file = run.config;
  $("name").textContent = run.name;
  $("eyebrow").textContent = file ? `${file.strategy.name} on ${file.model.base.split("/").pop()} · ${file.model.task.replaceAll("-", " ")}` : "No run file is kept for this run";
  const [label, look] = run.alarm ? ["Stands still", "bad"] : PHASES[run.phase];
  $("phase").textContent = label;
  $("phase").className = `pill ${look}`;
  $("standing").textContent = standing(run);
  const total = run.rounds ?? Math.max(1, run.round);
  const open = run.open;
  const part = open?.asked && run.phase === "open" ? open.accepted / open.asked : 0;
  $("done").style.width = `${(100 * run.round) / total}%`;
  $("now").style.width = `${(100 * part) / total}%`;
  $("track").setAttribute("aria-valuemax", total);
  $("track").setAttribute("aria-valuenow", run.round);
  $("rounds").textContent = run.rounds === null ? `${plural(run.round, "round")} committed` : `${count(run.round)} of ${plural(run.rounds, "round")} committed`;
  $("eta").textContent = eta(run);
  const adapter = $("adapter");
  adapter.hidden = run.adapter === null;
  const final = { peft: ["Download adapter", "The adapter's folder, zipped"], merged: ["Download model", "A merged model, zipped"] };
  const [text, title] = final[run.adapter] ?? ["Download adapter so far", "Tensors and run file, zipped"];
  adapter.textContent = text;
  adapter.className = run.adapter in final ? "button primary" : "button";
  adapter.title = title;
  adapter.setAttribute("href", `/api/runs/${encodeURIComponent(run.name)}/adapter`);
  $("stop").hidden = !(role === "operator" && run.stoppable);
  $("finish").hidden = !(role === "operator" && run.stoppable && run.phase !== "over" && run.round);
}

function standing(run) {
  const open = run.open;
  if (run.phase === "over" && run.round < (run.rounds ?? 0)) return "It was ended with what is committed.";
  if (run.phase === "over") {
    if (run.adapter === "merged") return "The model is ready.";
    return run.adapter === "peft" ? "The adapter is ready." : "Every round is committed.";
  }
  if (run.phase === "stopped") return "No coordinator works on it.";
  if (!open) return "";
  const refusing = open.refusing.length && !open.waiting ? ` ${open.refusing.join(", ")} refused to take part.` : "";
  const waiting = open.waiting && !run.alarm ? `${open.waiting[0].toUpperCase()}${open.waiting.slice(1)}.` : "";
  if (run.phase === "waiting") return (waiting || `${count(run.totals.live)} of ${count(open.needed)} needed to open round ${open.round + 1}.`) + refusing;
  const again = open.attempt ? `, opened ${plural(open.attempt + 1, "time")}` : "";
  const lost = open.lost ? `, ${count(open.lost)} lost` : "";
  return `Round ${count(open.round + 1)} has ${count(open.accepted)} of ${plural(open.asked, "update")}${lost}${again}; open for ${duration(open.elapsed_s)}. ${waiting}${refusing}`;
}

function eta(run) {
  if (run.phase === "over") return run.took_s === null ? "" : `took ${duration(run.took_s)}`;
  return run.left_s === null || run.alarm ? "" : `about ${duration(Math.max(1, run.left_s))} left`;
}

function whose(run, figure) {
  const name = figure[0].toUpperCase() + figure.slice(1);
  return run.curves.scored_by === "clients" ? `${name} at the clients` : `Held-out ${figure}`;
}

function tiles(run) {
  const { totals, privacy } = run;
  const accuracy = run.curves.accuracy.at(-1);
  const found = [];
  if (accuracy) {
    const first = run.curves.accuracy[0];
    const error = run.curves.standard_error;
    found.push({ label: whose(run, "accuracy"), value: percent(accuracy[1]), unit: error ? ` ± ${percent(error)}` : "", more: first === accuracy ? `after round ${accuracy[0]}` : `from ${percent(first[1])} at round ${first[0]}` });
  }
  if (run.curves.personalised !== null) {
    found.push({ label: "Accuracy after local steps", value: percent(run.curves.personalised), more: "personalised, on clients' own held-out rows" });
  }
  if (privacy?.enabled) {
    found.push({ label: "Privacy spent (ε)", value: figure(privacy.most), unit: ` of ${privacy.epsilon} planned`, meter: privacy.most === null ? 0 : privacy.most / privacy.epsilon, more: `worst client, δ\u00a0=\u00a0${small(privacy.delta)}${privacy.most > privacy.epsilon ? "; a round that was asked again is charged again" : ""}` });
  } else if (privacy) {
    found.push({ label: "Privacy", value: "None", more: "updates leave clients without noise" });
  }
  if (privacy?.user_level) {
    found.push({ label: "User-level ε", value: figure(privacy.user_level.spent), unit: ` of ${privacy.user_level.epsilon}`, meter: privacy.user_level.spent / privacy.user_level.epsilon, more: `whole client, δ\u00a0=\u00a0${small(privacy.user_level.delta)}` });
  }
  found.push(
    totals.live === null
      ? { label: "Clients", value: count(run.clients_total), more: "took part" }
      : { label: "Clients live", value: count(totals.live), unit: run.clients_total ? ` of ${count(run.clients_total)}` : "", more: `${count(run.states.training ?? 0)} training, ${count(run.states.waiting ?? 0)} waiting` },
  );
  const lost = Object.values(totals.lost).reduce((sum, each) => sum + each, 0);
  found.push({ label: "Updates", value: count(totals.accepted), more: lost ? `${plural(lost, "time")} a client was lost` : "none lost" });
  found.push({ label: "Traffic", value: bytes(totals.up + totals.down), more: `${bytes(totals.up)} up${coded(run, 0)}, ${bytes(totals.down)} down${coded(run, 1)}` });
  part("tiles", found, () => found.map((each) => {
    const meter = each.meter === undefined ? null : el("div", { class: "meter", "aria-hidden": "true" }, el("div"));
    if (meter) meter.firstChild.style.width = `${Math.min(100, 100 * each.meter)}%`;
    return el("div", { class: "tile" }, el("p", { class: "label" }, each.label), el("p", { class: "value" }, each.value, each.unit ? el("small", {}, each.unit) : null), meter, el("p", { class: "more" }, each.more));
  }));
}

const coded = (run, way) => (run.codecs ? ` in ${run.codecs[way]}` : "");

function chart(name, spec, wanted = true) {
  charts[name] ??= new Chart($("charts"));
  charts[name].figure.hidden = !wanted;
  charts[name].show({ name, ...spec });
}

function curves(run) {
  const { curves: all, privacy, rounds } = run;
  const beside = (name) => overlaid.flatMap((other, index) => (others.has(other) ? [{ index, name: other, points: others.get(other).run.curves[name] }] : []));
  const scored = all.accuracy.length + all.loss.length + beside("accuracy").reduce((sum, each) => sum + each.points.length, 0) > 0;
  chart("accuracy", { title: whose(run, "accuracy"), kind: "line", unit: "%", points: all.accuracy, others: beside("accuracy"), until: rounds, empty: "Not scored yet." }, scored);
  chart("loss", { title: whose(run, "loss"), kind: "line", points: all.loss, others: beside("loss"), until: rounds, empty: "Not scored yet." }, scored);
  $("unscored").hidden = scored;
  const priv = privacy?.enabled;
  chart("epsilon", { title: "Privacy spent (ε)", kind: "step", zero: true, points: priv ? all.epsilon : [], others: beside("epsilon"), until: rounds, limit: priv ? privacy.epsilon : null, limitText: "planned for the whole run", empty: priv ? (run.round ? "Being worked out." : "Nothing is spent before the first round is committed.") : "This run has no example-level privacy." });
  chart("traffic", { title: "Bytes by round", kind: "bars", unit: "B", points: all.traffic, empty: "Nothing has been sent yet." });
}

function clients(run) {
  const kept = run.clients;
  const priv = run.privacy?.enabled;
  const more = run.clients_total > kept.length ? `${count(kept.length)} of ${count(run.clients_total)} are listed. ` : "";
  $("clients-note").textContent = kept.length ? `${more}${priv ? "ε is what a client has spent if it trained whenever it was asked." : ""}` : "";
  const ours = run.totals.live !== null;
  // Whole steps, so that the table is not made anew every second.
  const rows = kept.map((each) => ({ ...each, seen_s: null, seen: each.seen_s === null ? (each.joined ? clock(each.joined) : "–") : ago(each.seen_s < 15 ? 0 : each.seen_s - (each.seen_s % 5)) }));
  part("clients", [rows, priv, ours], () => {
    if (!rows.length) return el("p", { class: "quietly" }, "No client has joined yet. They need the address of this coordinator and an invite: fedloom certs invite NAME.");
    const heads = [["Client", "who"], ...(ours ? [["State", "plain"]] : []), [ours ? "Last seen" : "Joined", ""], ["Rounds asked", "num"], ["Accepted", "num"], ...(priv ? [["ε so far", "num"]] : []), ...(ours ? [["Up", "num"], ["Down", "num"]] : [])];
    return table(heads, rows.map((each) => [
      [el("span", { title: each.name }, each.name), "who"],
      ...(ours ? [[pill(STATES[each.state], LOST[each.why] ?? ""), "plain"]] : []),
      [each.seen, "faint"],
      [count(each.asked), ""],
      [count(each.accepted), ""],
      ...(priv ? [[figure(each.epsilon), ""]] : []),
      ...(ours ? [[bytes(each.up), ""], [bytes(each.down), ""]] : []),
    ]), true);
  });
}

function past(run) {
  $("csv").setAttribute("href", `/api/runs/${encodeURIComponent(run.name)}/rounds.csv`);
  part("past", run.past, () => {
    if (!run.past.length) return el("p", { class: "quietly" }, "No round is committed yet.");
    const heads = [["Round", ""], ["Closed by", "wide-only"], ["Updates", "num"], ["Lost", "num"], ["Traffic", "num"], ["Took", "num"]];
    return el("div", { class: "list", tabindex: "0", role: "group", "aria-label": "Recent rounds" }, table(heads, run.past.map((each) => [
      [count(each.round), ""],
      [each.reason === "complete" ? "all answered" : "deadline", "faint wide-only"],
      [count(each.clients), ""],
      [count(each.lost), each.lost ? "" : "faint"],
      [each.up === null ? "–" : bytes(each.up + each.down), ""],
      [each.took_s === null ? "–" : duration(each.took_s), "faint"],
    ]), false));
  });
}

function refusals(noted) {
  const total = (noted.refused ?? 0) + (noted.rejected ?? 0) + (noted.declined ?? 0);
  return total ? `${plural(total, "refusal")} in all` : "";
}

// Who is let in, and for how long. Asked for rarely: it changes with an invite, a renewal or a revocation.
let certified = { at: 0, rows: null };
async function certificates(run) {
  if (Date.now() - certified.at > 10 * PAUSE_MS) {
    const answer = await ask("/api/certificates").catch(() => null);
    certified = { at: Date.now(), rows: answer?.ok ? (await answer.json()).certificates : null };
  }
  const rows = run.name === own ? certified.rows : null;
  const operator = role === "operator";
  $("certificates-panel").hidden = !rows;
  $("invite").hidden = !operator;
  if (!rows) return;
  part("certificates", [rows, operator], () => {
    const heads = [["Name", "who"], ["Role", "plain"], ["State", "plain"], ["Good until", ""], ...(operator ? [["", "num"]] : [])];
    return el("div", { class: "list", tabindex: "0", role: "group", "aria-label": "Certificates" }, table(heads, rows.map((each) => {
      const days = (new Date(each.ends) - Date.now()) / 864e5;
      const gone = each.role === "client" && operator ? el("button", { type: "button", class: "quiet", "aria-label": `Revoke ${each.name}` }, "Revoke") : "";
      if (gone) gone.addEventListener("click", () => sure("revoke", each.name));
      return [
        [each.name || "this coordinator", "who"],
        [each.role, "faint"],
        [pill([each.state, days < 7 && each.state === "valid" ? "warn" : ""]), "plain"],
        [`${clock(each.ends)}${days < 7 ? ` (${days < 1 ? "within a day" : plural(Math.floor(days), "day")})` : ""}`, ""],
        ...(operator ? [[gone, ""]] : []),
      ];
    }), true));
  });
}

function config(run) {
  $("config-note").textContent = run.config ? "what was chosen; other keys have their defaults" : "";
  part("config", run.config, () => {
    if (!run.config) return el("p", { class: "note" }, "No run.toml lies in this run's folder.");
    return Object.entries(run.config).filter(([, keys]) => Object.keys(keys).length).map(([name, keys]) => el("div", {}, el("h3", {}, `[${name}]`), el("dl", {}, ...Object.entries(keys).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, setting(value))]))));
  });
}

function setting(value) {
  if (Array.isArray(value)) return value.length > 8 ? `${value.slice(0, 8).join(", ")}, … (${value.length})` : value.join(", ") || "none";
  if (value !== null && typeof value === "object") return Object.entries(value).map(([key, each]) => `${key} = ${each}`).join(", ") || "none";
  const text = typeof value === "number" ? small(value) : String(value);
  return text.startsWith("sha256:") ? `${text.slice(0, 19)}…` : text;
}

function listen() {
  $("config-fold").open = window.matchMedia("(min-width: 900px)").matches;
  $("runs").addEventListener("change", (event) => {
    chosen = event.target.value;
    history.replaceState(null, "", chosen === own ? location.pathname : `?run=${encodeURIComponent(chosen)}`);
    refresh();
  });
  $("gate-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("gate-wrong").textContent = await signIn($("gate-token").value.trim());
    $("gate-token").value = "";
    refresh();
  });
  $("session").addEventListener("click", async () => {
    if ($("session").textContent === "Sign in") {
      $("ask-wrong").textContent = "";
      $("ask-token").showModal();
      return;
    }
    await ask("/api/session", { method: "DELETE", headers: ACTION });
    await session();
    refresh();
  });
  $("ask-cancel").addEventListener("click", () => $("ask-token").close());
  $("ask-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const wrong = await signIn($("ask-value").value.trim());
    $("ask-value").value = "";
    $("ask-wrong").textContent = wrong;
    if (!wrong) $("ask-token").close();
    refresh();
  });
  listenActs((path, body) => ask(path, { method: "POST", headers: { ...ACTION, "content-type": "application/json" }, body: JSON.stringify(body) }), () => {
    certified.at = 0;
    refresh();
  });
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
}

async function begin() {
  listen();
  const shownToken = new URLSearchParams(location.hash.slice(1)).get("token");
  if (shownToken) {
    history.replaceState(null, "", location.pathname + location.search); // out of the address bar and the history
    $("gate-wrong").textContent = await signIn(shownToken).catch(() => "");
  }
  await session().catch(() => banner("No answer from the coordinator."));
  refresh();
}

begin();
