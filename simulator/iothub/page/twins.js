// Devices, their modules, and one twin at a time: desired and reported side by side.
import { ask, attempt, byId, element, Refused, setText } from "./hub.js";

let selected = null;
let twin = null;
let editing = "";
let devices = [];
let drawn = "";

const STATUS_TONES = { running: "good", backoff: "bad", failed: "bad", unhealthy: "bad", stopped: "warn" };

export function drawDevices(all) {
  devices = all;
  const text = JSON.stringify([all, byId("filter").value, selected]);
  if (text === drawn) return;
  drawn = text;
  const wanted = byId("filter").value.trim().toLowerCase();
  const shown = all.filter((device) => JSON.stringify([device.deviceId, device.tags]).toLowerCase().includes(wanted));
  const focused = document.activeElement?.dataset?.path;
  byId("device-list").replaceChildren(...shown.map(deviceItem));
  byId("no-devices").hidden = all.length > 0;
  if (focused) [...document.querySelectorAll("#device-list button")].find((b) => b.dataset.path === focused)?.focus();
}

function deviceItem(device) {
  const status = device.deployment ? deploymentTag(device.deployment) : device.enabled ? "" : tag("disabled", "warn");
  const modules = device.modules.map((module) => {
    const tone = STATUS_TONES[module.runtimeStatus] ?? "";
    return element("li", {}, entry(device.deviceId, module.moduleId, module.connected, tag(module.runtimeStatus ?? "", tone)));
  });
  const item = element("li", {}, entry(device.deviceId, "", device.connected, status));
  if (modules.length) item.append(element("ul", {}, ...modules));
  return item;
}

function deploymentTag(status) {
  return tag(String(status.code ?? "?"), status.code === 200 ? "good" : "bad");
}

function tag(text, tone) {
  return element("span", { class: `tag ${tone}` }, text);
}

function entry(device, module, connected, status) {
  const path = twinPath(device, module);
  const button = element("button", { type: "button", "data-path": path, "aria-current": selected?.path === path ? "true" : undefined },
    element("span", { class: connected ? "dot on" : "dot", role: "img", "aria-label": connected ? "connected" : "not connected" }),
    element("span", { class: "name" }, module || device), status);
  button.addEventListener("click", () => select(device, module));
  return button;
}

function twinPath(device, module) {
  const base = `/twins/${encodeURIComponent(device)}`;
  return module ? `${base}/modules/${encodeURIComponent(module)}` : base;
}

function select(device, module) {
  selected = { device, module, path: twinPath(device, module) };
  twin = null;
  stopEditing();
  drawDevices(devices);
  attempt(refreshTwin);
}

export async function refreshTwin() {
  if (!selected) return;
  const { device, module, path } = selected;
  let fresh;
  try {
    fresh = await ask("GET", path);
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error;
    selected = twin = null;
    stopEditing();
    byId("twin-body").hidden = true;
    setText(byId("twin-title"), "No twin selected");
    setText(byId("twin-facts"), "The one shown was deleted.");
    return;
  }
  if (selected?.path !== path) return;
  if (!editing) twin = fresh;
  setText(byId("twin-title"), module ? `${device} / ${module}` : device);
  const applied = Object.entries(fresh.configurations ?? {}).map(([id, one]) => `${id} ${one.status.toLowerCase()}`);
  const state = fresh.connectionState === "Connected" ? "connected" : "not connected";
  setText(byId("twin-facts"), [state, fresh.status, ...applied].join(" · "));
  byId("twin-body").hidden = Boolean(editing);
  for (const side of ["desired", "reported"]) {
    const { $version, $metadata, ...properties } = fresh.properties[side];
    setText(byId(side), JSON.stringify(properties, null, 2));
    setText(byId(`${side}-version`), `version ${$version}`);
  }
  setText(byId("tags"), JSON.stringify(fresh.tags, null, 2));
}

function edit(part) {
  if (!twin) return;
  editing = part;
  const { $version, $metadata, ...desired } = twin.properties.desired;
  setText(byId("editor-label"), part === "tags" ? "Tags (JSON)" : "Desired properties (JSON)");
  byId("editor-text").value = JSON.stringify(part === "tags" ? twin.tags : desired, null, 2);
  setText(byId("editor-problem"), "");
  byId("editor").hidden = false;
  byId("twin-body").hidden = true;
  byId("editor-text").focus();
}

function stopEditing() {
  editing = "";
  byId("editor").hidden = true;
  byId("twin-body").hidden = !twin;
}

// A patch that leads from one object to another: what is gone is null.
function patchBetween(before, after) {
  const plain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const patch = {};
  for (const key of Object.keys(before)) if (!(key in after)) patch[key] = null;
  for (const [key, value] of Object.entries(after)) {
    if (plain(value) && plain(before[key])) {
      const inner = patchBetween(before[key], value);
      if (Object.keys(inner).length) patch[key] = inner;
    } else if (JSON.stringify(value) !== JSON.stringify(before[key])) patch[key] = value;
  }
  return patch;
}

async function save(event) {
  event.preventDefault();
  const problem = byId("editor-problem");
  let value;
  try {
    value = JSON.parse(byId("editor-text").value);
    if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error("an object in braces is needed");
  } catch (error) {
    setText(problem, `Not saved: ${error.message}`);
    return;
  }
  const { $version, $metadata, ...desired } = twin.properties.desired;
  const patch = editing === "tags" ? { tags: patchBetween(twin.tags, value) }
    : { properties: { desired: patchBetween(desired, value) } };
  try {
    twin = await ask("PATCH", selected.path, patch, { "If-Match": `"${twin.etag}"` });
  } catch (error) {
    setText(problem, error.status === 412 ? "Not saved: somebody else changed this twin meanwhile. Copy your text, cancel and edit again."
      : `Not saved: ${error.message}`);
    return;
  }
  const button = byId(`edit-${editing}`);
  stopEditing();
  await refreshTwin();
  button.focus();
}

export function startTwins() {
  byId("filter").addEventListener("input", () => drawDevices(devices));
  byId("edit-desired").addEventListener("click", () => edit("desired"));
  byId("edit-tags").addEventListener("click", () => edit("tags"));
  byId("editor-cancel").addEventListener("click", stopEditing);
  byId("editor").addEventListener("submit", save);
}
