// The page of the simulated hub: asks once a second, and redraws what changed.
import { drawDevices, refreshTwin, startTwins } from "./twins.js";

const POLL_MS = 1000;
const MESSAGES = 200;
export const byId = (id) => document.getElementById(id);

let token = sessionStorage.getItem("token") ?? "";
let view = "devices";
let lastMessage = 0;
let unseen = 0;
let timer = 0;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export async function ask(method, path, body, headers = {}) {
  // Relative to the page, which may be mounted below another path.
  const answer = await fetch("." + path, {
    method,
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json", ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  if (answer.ok) return text ? JSON.parse(text) : null;
  let message = text;
  try {
    message = JSON.parse(text).Message.replace(/^ErrorCode:[^;]*;/, "");
  } catch { /* not from the hub: shown as it came */ }
  throw new Refused(answer.status, message || answer.statusText);
}

export function tell(text) {
  byId("message").hidden = !text;
  setText(byId("message"), text);
}

export async function attempt(work) {
  try {
    await work();
    tell("");
  } catch (error) {
    tell(error.message);
  }
}

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    token = given;
    sessionStorage.setItem("token", token);
    history.replaceState(null, "", location.pathname);
    forgetMessages();
  }
}

function forgetMessages() {
  // Another token may be that of another hub, or of this one started anew: it counts from 1.
  lastMessage = 0;
  byId("messages").replaceChildren();
}

function show(name) {
  view = name;
  for (const button of document.querySelectorAll("nav button")) {
    const current = button.dataset.view === name;
    byId(button.dataset.view).hidden = !current;
    if (current) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if (name === "telemetry") {
    unseen = 0;
    setText(byId("telemetry-count"), "");
  }
}

function askForToken() {
  clearTimeout(timer);
  setText(byId("state"), "Not signed in");
  document.querySelector("nav").hidden = true;
  for (const section of document.querySelectorAll("main > section")) section.hidden = true;
  byId("login").hidden = false;
  byId("token").focus();
}

async function poll() {
  clearTimeout(timer);
  try {
    const [overview, messages] = await Promise.all([
      ask("GET", "/sim/overview"),
      ask("GET", `/telemetry?after=${lastMessage}&limit=500`),
    ]);
    if (!byId("login").hidden) {
      byId("login").hidden = true;
      document.querySelector("nav").hidden = false;
      show(view);
      tell("");
    }
    drawState(overview);
    drawDevices(overview.devices);
    if (!byId("hold").checked) drawMessages(messages);
    drawConfigurations(overview.configurations);
    drawFaults(overview);
    await refreshTwin();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      if (token) tell("This token is not the hub's: a hub has a new one at each start.");
      askForToken();
      return;
    }
    setText(byId("state"), `No answer from the hub (${error.message})`);
  }
  timer = setTimeout(poll, POLL_MS);
}

function drawState(overview) {
  setText(byId("host"), overview.hostName);
  const online = overview.devices.filter((d) => d.connected || d.modules.some((m) => m.connected)).length;
  const total = overview.devices.length;
  const paused = overview.paused ? " · hub unreachable for devices" : "";
  setText(byId("state"), `${online} of ${total} ${total === 1 ? "device" : "devices"} online${paused}`);
}

function shortTime(iso) {
  return iso.slice(11, 23);
}

function drawMessages(messages) {
  const rows = byId("messages");
  for (const message of messages) {
    lastMessage = message.sequenceNumber;
    const from = message.moduleId ? `${message.deviceId} / ${message.moduleId}` : message.deviceId;
    const body = message.body === null ? message.bodyBase64 : JSON.stringify(message.body);
    const shown = body.length > 600 ? `${body.slice(0, 600)} …` : body;
    const properties = Object.entries({ ...message.systemProperties, ...message.properties });
    rows.prepend(
      element("tr", {},
        element("td", {}, shortTime(message.enqueuedTimeUtc)),
        element("td", {}, from),
        element("td", {}, element("code", {}, shown)),
        element("td", {}, properties.map(([name, value]) => `${name}=${value}`).join(" · "))),
    );
  }
  while (rows.childElementCount > MESSAGES) rows.lastElementChild.remove();
  byId("no-messages").hidden = rows.childElementCount > 0;
  if (view !== "telemetry" && messages.length) {
    unseen += messages.length;
    setText(byId("telemetry-count"), String(unseen));
  }
}

const METRICS = {
  targetedCount: "targeted",
  appliedCount: "applied",
  reportedSuccessfulCount: "report success",
  reportedFailedCount: "report failure",
};
let drawnConfigurations = "";

function drawConfigurations(configurations) {
  byId("no-configurations").hidden = configurations.length > 0;
  const text = JSON.stringify(configurations);
  if (text === drawnConfigurations) return;
  drawnConfigurations = text;
  const open = new Set([...document.querySelectorAll("#configurations details[open]")].map((d) => d.id));
  const sorted = [...configurations].sort((a, b) => b.priority - a.priority);
  byId("configurations").replaceChildren(...sorted.map((one) => configurationCard(one, open)));
}

function configurationCard(one, open) {
  const list = element("dl", { class: "metrics" });
  const results = { ...one.systemMetrics.results, ...one.metrics.results };
  for (const [name, value] of Object.entries(results)) {
    const tone = value && name === "reportedFailedCount" ? "bad" : value && name === "reportedSuccessfulCount" ? "good" : "";
    list.append(element("div", {}, element("dt", {}, METRICS[name] ?? name), element("dd", { class: tone }, String(value))));
  }
  const id = `content-${one.id}`;
  return element("article", { class: "card" },
    element("div", { class: "bar" }, element("h3", {}, one.id), element("span", { class: "quiet" }, `priority ${one.priority}`)),
    element("code", {}, one.targetCondition || "no target condition: targets nothing"),
    list,
    element("details", { id, open: open.has(id) }, element("summary", {}, "Content"),
      element("pre", {}, JSON.stringify(one.content.modulesContent ?? one.content.deviceContent, null, 2))));
}

function words(name) {
  const text = name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

function drawFaults(overview) {
  const { faults, faultDescriptions } = overview;
  const list = byId("fault-list");
  for (const [name, value] of Object.entries(faults)) {
    let input = byId(`fault-${name}`);
    if (!input) {
      const whole = !name.endsWith("_seconds");
      input = element("input", {
        id: `fault-${name}`, type: "number", step: whole ? "1" : "any",
        min: name === "clock_skew_seconds" ? undefined : "0", "aria-describedby": `about-${name}`,
      });
      input.addEventListener("change", () =>
        attempt(() => ask("PATCH", "/sim/faults", { [name]: input.valueAsNumber || 0 })));
      list.append(element("div", { class: "fault" },
        element("div", {}, element("label", { for: input.id }, words(name)),
          element("small", { id: `about-${name}` }, faultDescriptions[name] ?? "")), input));
    }
    if (document.activeElement !== input) input.value = value;
    input.parentElement.classList.toggle("on", value !== 0);
  }
  const active = Object.values(faults).filter((value) => value !== 0).length + (overview.paused ? 1 : 0);
  setText(byId("fault-count"), active ? String(active) : "");
  byId("paused").checked = overview.paused;
}

function start() {
  takeToken();
  for (const button of document.querySelectorAll("nav button")) {
    button.addEventListener("click", () => show(button.dataset.view));
  }
  byId("login").addEventListener("submit", (event) => {
    event.preventDefault();
    token = byId("token").value.trim();
    forgetMessages();
    sessionStorage.setItem("token", token);
    poll();
  });
  byId("drop").addEventListener("click", () => attempt(() => ask("POST", "/sim/connections/drop")));
  byId("paused").addEventListener("change", (event) =>
    attempt(() => ask("POST", `/sim/connections/${event.target.checked ? "pause" : "resume"}`)));
  byId("clear-faults").addEventListener("click", () => attempt(async () => {
    const faults = await ask("GET", "/sim/faults");
    await ask("PATCH", "/sim/faults", Object.fromEntries(Object.keys(faults).map((name) => [name, 0])));
    await poll();
  }));
  window.addEventListener("hashchange", () => { takeToken(); poll(); });
  startTwins();
  poll();
}

start();
