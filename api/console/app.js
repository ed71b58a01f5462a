"use strict";

const TEXTS = JSON.parse(document.getElementById("texts").textContent);
const LANGUAGE = document.documentElement.lang;
const REFRESH_MS = 2000;
const state = { at: 0, speed: 1, asked: 0, heard: 0, listings: [] };

function t(key, facts = {}) {
  return TEXTS[key].replace(/\{(\w+)\}/g, (_, name) => facts[name]);
}

// A code whose text is missing (an older page, a newer desk) is shown as it is.
function code(family, value) {
  return TEXTS[`${family}.${value}`] ?? value;
}

function both(text) {
  return text[LANGUAGE] || text.zh;
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== "" && child !== null));
  return made;
}

function pair(key, value) {
  return value ? [element("dt", "", t(key)), element("dd", "", value)] : [];
}

function platformNow() {
  return state.at + (performance.now() - state.asked) * state.speed;
}

function clock(ms) {
  const moment = new Date(ms);
  const sameDay = moment.toDateString() === new Date(platformNow()).toDateString();
  const time = moment.toLocaleTimeString("sv", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return sameDay ? time : `${moment.toLocaleDateString("sv")} ${time}`;
}

function duration(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  const days = Math.floor(seconds / 86400);
  const hours = Math.floor(seconds / 3600);
  const two = (number) => String(number).padStart(2, "0");
  if (days) return t("time.days", { days, hours: hours % 24 });
  const rest = `${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}`;
  return hours ? `${hours}:${rest}` : rest;
}

function deadline(item) {
  const left = item.deadline - platformNow();
  const words = left >= 0 ? t("field.left", { time: duration(left) }) : t("field.overdue", { time: duration(-left) });
  return element("span", left < 0 && item.open ? "overdue" : "", `${clock(item.deadline)} · ${words}`);
}

function rescue(item) {
  const done = item.rescued_at !== null;
  const until = done ? item.rescued_at : platformNow();
  return element("article", done ? "rescue done" : "rescue",
    element("p", "soft", t(done ? "field.rescued_after" : "field.elapsed")),
    element("p", "elapsed", duration(until - item.observed_at)),
    element("h3", "", item.place.address || t("field.no_place")),
    element("p", "", both(item.title)),
    element("dl", "",
      ...pair("field.unit", both(item.unit)),
      ...pair("field.area_owner", both(item.area_owner)),
      ...pair("field.stage", code("case.stage", item.stage)),
      ...pair("field.deadline", done ? "" : deadline(item)),
      ...pair("field.reported_at", clock(item.observed_at)),
      ...pair("field.rescued_at", done ? clock(item.rescued_at) : ""),
      ...pair("field.device", item.subject),
      ...pair("field.number", item.number)));
}

function workOrder(item) {
  const finished = item.verdict ? code("verdict", item.verdict) : "";
  const chip = element("span", "chip", item.open ? code("case.stage", item.stage) : finished || code("case.stage", item.stage));
  return element("article", `row ${item.urgency}`,
    element("div", "head", element("strong", "", both(item.title)), chip),
    element("p", "", item.place.address || t("field.no_place"), item.place.grid ? ` · ${item.place.grid}` : ""),
    element("p", "", both(item.unit), item.area_owner.code ? ` / ${both(item.area_owner)}` : ""),
    item.open ? element("p", "", `${t("field.deadline")} `, deadline(item)) : "",
    element("p", "soft", [item.number, item.code, item.subject].filter(Boolean).join(" · ")));
}

function incident(item) {
  return element("article", `row ${item.urgency}`,
    element("div", "head", element("strong", "", both(item.title)), element("span", "chip", code("incident.state", item.state))),
    element("p", "", `${code("scope", item.by)} ${item.key} · ${t("field.members", { count: item.members })}`),
    element("p", "soft", t("field.since", { time: clock(item.opened_at) }),
      item.cases.length ? ` · ${t("field.case")} ${item.cases.join(", ")}` : ""));
}

// A lift's name is its address already.
function where(item) {
  const bare = (text) => text.replace(/\s/g, "");
  return bare(item.name) === bare(item.address) ? item.address : [item.name, item.address].filter(Boolean).join(" · ");
}

function alarm(item) {
  const who = item.acknowledged_by ? t("field.acknowledged_by", { actor: item.acknowledged_by }) : "";
  const times = item.count > 1 ? t("field.times", { count: item.count }) : "";
  return element("article", `row ${item.urgency}${item.active ? "" : " over"}`,
    element("div", "head", element("strong", "", both(item.title)), element("span", "chip", code("alarm.state", item.state))),
    element("p", "", where(item)),
    element("p", "", both(item.explanation)),
    element("p", "soft", [t("field.since", { time: clock(item.raised_at) }), times, both(item.why_text), who].filter(Boolean).join(" · ")));
}

// Lengths of time as a person says them; the API says them the same way in its reasons.
function span(seconds) {
  const units = [[90, 1, "span.s"], [5400, 60, "span.min"], [129600, 3600, "span.h"], [Infinity, 86400, "span.d"]];
  const [, unit, key] = units.find(([limit]) => seconds < limit);
  return t(key, { amount: (seconds / unit).toFixed(seconds < 1 ? 2 : seconds < 10 ? 1 : 0) });
}

function size(bytes) {
  let amount = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(amount) < 1000) return `${amount.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    amount /= 1000;
  }
  return `${amount.toFixed(1)} TB`;
}

function amounts(drops) {
  return Object.entries(drops).map(([reason, count]) => `${code("drop", reason)} ${count}`).join(", ") || "0";
}

// Behind by more than this is worth a colour; what it means in words stands above, decided by the API.
const SLOW_S = 2;
const slow = (seconds) => (seconds > SLOW_S ? "soso" : "");

function stages(lag) {
  const head = element("tr", "", element("th", "", t("stage.name")), element("th", "", t("stage.now")), element("th", "", t("stage.p99")));
  const rows = Object.entries(lag).map(([name, stage]) => element("tr", "",
    element("th", "", code("stage", name)),
    element("td", slow(stage.now_s), `${stage.now_s.toFixed(2)} s`),
    element("td", slow(stage.p99_s), `${stage.p99_s.toFixed(2)} s`)));
  return element("table", "", head, ...rows);
}

function late(gateway) {
  const time = gateway.late_s === null ? t("status.never") : span(gateway.late_s);
  return t("status.late", { gateway: gateway.id, late: time, spooled: gateway.spooled ?? 0 });
}

function disk(found) {
  if (!found) return "?";
  const used = t("status.disk_used", { percent: Math.round(found.used_share * 100), free: size(found.free_bytes), data: size(found.data_bytes) });
  return found.grows_bytes_per_day === null ? used : `${used} · ${t("status.grows", { amount: size(found.grows_bytes_per_day) })}`;
}

function pipeline(status) {
  const { gateways, quarantine, outbox } = status;
  const held = Object.entries(quarantine.devices).slice(0, 5).map(([device, count]) => `${device} ${count}`).join(", ");
  const oldest = outbox.waiting ? span(outbox.oldest_s) : "0";
  const online = [t("status.of_online", gateways), t("status.spooled", { amount: gateways.spooled })];
  const list = element("dl", "",
    ...pair("status.gateways", [...online, ...gateways.late.slice(0, 5).map(late)].join(" · ")),
    ...pair("status.readings", t("status.per_s", { amount: status.readings_per_s, total: status.readings.toLocaleString("en") })),
    ...pair("status.dropped", t("status.dropped_of", { recent: amounts(status.dropped_per_min), total: amounts(status.dropped) })),
    ...pair("status.quarantine", held ? `${quarantine.messages} (${held})` : `${quarantine.messages}`),
    ...pair("status.disk", disk(status.disk)),
    ...pair("status.delivered", t("status.delivered_of", { total: status.delivered, waiting: outbox.waiting, oldest })
      + (outbox.dead ? ` · ${t("status.dead", { count: outbox.dead })}` : "")));
  const processes = element("dl");
  for (const [name, process] of Object.entries(status.processes)) {
    const words = element("dd", "", element("span", process.ready || (process.live && process.standby) ? "good" : "bad", how(process)),
      ` · ${t("process.age", { seconds: process.age_s })}`,
      process.restarts ? ` · ${t("status.restarts", { count: process.restarts })}` : "");
    processes.append(element("dt", "", name), words);
  }
  return [stages(status.lag), list, processes];
}

function how(process) {
  if (process.live && process.standby) return t("process.standby");
  return t(process.ready ? "process.ready" : process.live ? "process.live" : "process.silent");
}

const SIGNS = { well: "●", degraded: "▲", down: "■" };

// Where not all is well the details open by themselves, once; after that they are as their reader leaves them.
let opened = false;

function health(status) {
  const { level, text, reasons } = status.health;
  const words = reasons.map((reason) => both(reason.text));
  const calm = t("health.calm", {
    readings: status.readings_per_s, online: status.gateways.online, total: status.gateways.total,
    lag: Math.max(...Object.values(status.lag).map((stage) => stage.now_s)).toFixed(2),
  });
  document.getElementById("health").className = level;
  document.getElementById("level").textContent = `${SIGNS[level]} ${both(text)}`;
  document.getElementById("reasons").textContent = words.slice(0, 2).join(" · ") || calm;
  if (level !== "well" && !opened) document.getElementById("inside").open = opened = true;
  document.getElementById("further").textContent = words.slice(2).join(" · ");
}

function header(status) {
  document.getElementById("speed").textContent = status.speed === 1 ? "" : t("page.speed", { speed: status.speed });
  const title = t("page.title");
  const front = status.rescues_open ? `(${status.rescues_open}) ` : "";
  document.title = status.health.level === "down" ? `${front}■ ${title}` : front + title;
}

// The most pressing first (alarms: what still holds before what is over); within that, what waits longest for its rescue, or came last.
const RANK = { life: 0, urgent: 1, normal: 2, watch: 3 };
const byUrgency = (one, other) => RANK[one.urgency] - RANK[other.urgency];
const byDeadline = (one, other) => one.deadline - other.deadline;
const byAlarm = (one, other) =>
  other.active - one.active || byUrgency(one, other) || (one.state !== "unack") - (other.state !== "unack");
const byWaiting = (one, other) => (one.rescued_at !== null) - (other.rescued_at !== null) || one.observed_at - other.observed_at;

const LISTS = [
  ["rescues", "v1/cases?kind=rescue&state=open&limit=100", rescue, byWaiting],
  ["cases", "v1/cases?kind=case&state=open&limit=50", workOrder, byUrgency],
  ["incidents", "v1/incidents?state=open&limit=50", incident, byUrgency],
  ["alarms", "v1/alarms?state=open&limit=100", alarm, byAlarm],
  ["maintenance", "v1/cases?kind=maintenance&state=open&limit=20", workOrder, byDeadline],
  ["closed", "v1/cases?state=closed&limit=8", workOrder, () => 0],
];

function show() {
  document.getElementById("now").textContent = clock(platformNow());
  for (const [name, page, draw, order] of state.listings) {
    const items = page.items.slice().sort(order).map(draw);
    if (!items.length) items.push(element("p", "none", t(`none.${name}`)));
    else if (page.next_cursor && name !== "closed") items.push(element("p", "more", t("page.more")));
    document.getElementById(name).replaceChildren(...items);
    const count = document.getElementById(`${name}-count`);
    if (count) count.textContent = page.items.length ? `${page.items.length}${page.next_cursor ? "+" : ""}` : "";
  }
}

async function get(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

async function refresh() {
  try {
    const [status, ...pages] = await Promise.all([get("v1/status"), ...LISTS.map(([, path]) => get(path))]);
    Object.assign(state, { at: status.at, speed: status.speed, asked: performance.now(), heard: performance.now() });
    state.listings = LISTS.map(([name, , draw, order], index) => [name, pages[index], draw, order]);
    header(status);
    health(status);
    document.getElementById("pipeline").replaceChildren(...pipeline(status));
    show();
    document.getElementById("contact").hidden = true;
  } catch (error) {
    console.warn(error);
    document.getElementById("health").className = "connecting";
    const contact = document.getElementById("contact");
    contact.textContent = t("page.no_contact", { seconds: Math.round((performance.now() - state.heard) / 1000) });
    contact.hidden = false;
  }
  setTimeout(refresh, REFRESH_MS);
}

// Elapsed times go on every second, also while nobody answers.
setInterval(() => state.at && show(), 1000);
refresh();
