// The page's state is its URL's hash: a reload keeps it, and a link says it. The server judges every value.
import { events, post } from "./stream.js";
import { Pad, toBase64 } from "./draw.js";
import { draw as drawPlot, mark } from "./plot.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["steps", "eta", "num", "seed", "seed_to", "guidance_scale", "null_label"];
const CHOICES = ["checkpoint", "method", "label", "spacing"];
const CHECKS = ["lock", "live", "guided"];
let FIELDS = ["steps", "eta", "num", "seed", "seed_to", "guidance_scale", "null_label", "method", "label", "spacing",
  "picture", "mask", "request"];
const MODES = {
  sample: "Images of a seed: image i depends on the seed and i alone.",
  strip: "One x_T, with eta from 0 to 1: how much its noise decides.",
  slerp: "From one seed's first x_T to another's along the sphere, at eta 0.",
  invert: "A picture to the x_T it is sampled from, and back: the first at eta 0, the last at eta.",
  inpaint: "The picture made anew where the mask lies, and kept elsewhere.",
};

let about, current, running, result, table, tableRun, timer;
let runs = 0;
const pad = new Pad($("pad"), () => changed());

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

// -- controls that the server lists: fields of its request that have none of their own ----------------------------

const KINDS = {
  whole: ["number"],
  pair: ["number", "number"],
  switch: ["select"],
};

function build(fields) {
  for (const { name, kind, help } of fields) {
    const field = document.createElement("div");
    Object.assign(field, { className: "field" }).dataset.field = name;
    const label = Object.assign(document.createElement("label"), { textContent: name.replaceAll("_", " ") });
    label.htmlFor = name;
    field.append(label, Object.assign(document.createElement("small"), { textContent: help }));
    KINDS[kind].forEach((type, i) => {
      const control = document.createElement(type === "select" ? "select" : "input");
      if (type === "select") {
        control.append(...[["as the checkpoint", ""], ["yes", "true"], ["no", "false"]].map((one) => new Option(...one)));
      } else {
        Object.assign(control, { type, step: "any" });
      }
      control.id = control.name = i === 0 ? name : `${name}-${i}`;
      if (i > 0) control.ariaLabel = `${name}, second`;
      control.setAttribute("aria-describedby", `${name}-problem`);
      control.addEventListener(type === "select" ? "change" : "input", () => changed());
      field.append(control);
    });
    const problem = Object.assign(document.createElement("p"), { className: "problem", id: `${name}-problem` });
    problem.setAttribute("role", "alert");
    field.append(problem);
    $("fields").append(field);
  }
  FIELDS = [...FIELDS, ...fields.map((field) => field.name)];
  $("more").hidden = fields.length === 0;
}

function controlsOf({ name, kind }) {
  return KINDS[kind].map((_, i) => $(i === 0 ? name : `${name}-${i}`));
}

// Their values, those of the checkpoint left out.
function listed() {
  const data = {};
  for (const field of about.fields) {
    const controls = controlsOf(field);
    if (controls.every((control) => control.value === "" && !control.validity.badInput)) continue;
    if (field.kind === "switch") data[field.name] = controls[0].value === "true";
    else data[field.name] = controls.length === 1 ? typed(controls[0].id) : controls.map((control) => typed(control.id));
  }
  return data;
}

// -- state <-> hash ----------------------------------------------------------------------------------------------

function save() {
  const state = new URLSearchParams({ mode: mode() });
  for (const name of [...NUMBERS, ...CHOICES]) if ($(name).value !== "") state.set(name, $(name).value);
  for (const name of CHECKS) state.set(name, $(name).checked ? "1" : "0");
  for (const control of about.fields.flatMap(controlsOf)) if (control.value !== "") state.set(control.id, control.value);
  history.replaceState(null, "", `#${state}`);
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  const wanted = state.get("checkpoint");
  current = about.checkpoints.find((one) => one.name === wanted) ?? about.checkpoints[0];
  $("checkpoint").value = current.name;
  offer();
  const chosen = document.querySelector(`input[name=mode][value="${CSS.escape(state.get("mode") ?? "sample")}"]`);
  if (chosen && !chosen.disabled) chosen.checked = true;
  for (const name of [...NUMBERS, ...CHOICES.slice(1)]) {
    if (!state.has(name)) continue;
    const before = $(name).value;
    $(name).value = state.get(name);
    if ($(name).value === "") $(name).value = before; // of another checkpoint
  }
  for (const name of CHECKS) if (state.has(name)) $(name).checked = state.get(name) === "1";
  for (const control of about.fields.flatMap(controlsOf)) control.value = state.get(control.id) ?? "";
}

// What this checkpoint has.
function offer() {
  const fill = (id, values, shown = (value) => value) => {
    const before = $(id).value;
    $(id).replaceChildren(...values.map((value) => new Option(shown(value), value)));
    if (values.map(String).includes(before)) $(id).value = before;
  };
  const bounds = about.bounds, T = current.train_timesteps;
  fill("method", current.methods);
  fill("spacing", current.spacings);
  const classes = current.classes ?? 0;
  fill("label", ["each", ...Array(classes).keys()], (value) => (value === "each" ? "each in turn" : value));
  $("steps-slider").max = Math.min(100, bounds.steps, T);
  $("num-slider").max = bounds.num;
  if ($("null_label").value === "" || Number($("null_label").value) >= classes) {
    $("null_label").value = current.null_label ?? "";
  }
  $("summary").textContent = current.summary;
  const invert = document.querySelector("input[name=mode][value=invert]");
  invert.disabled = !current.invertible;
  if (invert.disabled && invert.checked) document.querySelector("input[name=mode][value=sample]").checked = true;
  pad.shape(current.height, current.width, current.channels, current.name);
  $("colour-label").hidden = current.channels === 1;
}

// What this mode has.
function arrange() {
  const now = mode();
  for (const field of document.querySelectorAll(".field")) {
    const modes = field.dataset.modes?.split(" ") ?? [now];
    field.hidden = !modes.includes(now) || ("classes" in field.dataset && current.classes === null);
  }
  $("null_label").closest(".field").hidden ||= !$("guided").checked;
  const ddim = now !== "sample" || $("method").value === "ddim";
  for (const id of ["eta", "eta-slider"]) $(id).disabled = !ddim;
  for (const id of ["guidance_scale", "guidance_scale-slider"]) $(id).disabled = !$("guided").checked;
  $("drawing").hidden = now !== "invert" && now !== "inpaint";
  pad.showMask = now === "inpaint";
  for (const element of document.querySelectorAll("[data-mask]")) element.hidden = now !== "inpaint";
  if (now !== "inpaint" && pad.tool.endsWith("mask")) chooseTool("ink");
  $("pad-hint").textContent = now === "inpaint"
    ? "Draw, then mask what is to be made anew. Keys: arrows, space, Shift and arrows."
    : "Draw something. Keys: arrows move, space paints, Shift and arrows draw.";
  $("about-mode").textContent = MODES[now];
  pad.draw();
  for (const name of ["steps", "eta", "num", "guidance_scale"]) $(`${name}-slider`).value = $(name).value;
}

// -- requests ----------------------------------------------------------------------------------------------------

// A number, or what was typed, for the server to refuse in words.
function typed(id) {
  const input = $(id);
  if (input.value === "") return input.validity.badInput ? "what is no number" : null;
  const value = Number(input.value);
  return Number.isFinite(value) ? value : input.value;
}

function asked() {
  const now = mode();
  const visible = (id) => !$(id).closest(".field").hidden;
  const data = { checkpoint: current.name, mode: now, spacing: $("spacing").value, ...listed() };
  data.method = now === "sample" ? $("method").value : "ddim";
  for (const id of ["steps", "num", "seed"]) data[id] = typed(id);
  if (visible("eta") && !$("eta").disabled) data.eta = typed("eta");
  if (now === "slerp") data.seed_to = typed("seed_to");
  if (current.classes !== null) {
    data.label = $("label").value === "each" ? "each" : Number($("label").value);
    if (visible("guidance_scale") && $("guided").checked) {
      data.guidance_scale = typed("guidance_scale");
      data.null_label = typed("null_label");
    }
  }
  return data;
}

function withPicture(data) {
  if (data.mode === "invert" || data.mode === "inpaint") data.picture = toBase64(pad.picture);
  if (data.mode === "inpaint") data.mask = toBase64(pad.mask);
  return data;
}

function complain(fields = {}) {
  const elsewhere = [];
  for (const name of FIELDS) {
    const place = $(`${name}-problem`);
    const hidden = place.closest(".field")?.hidden;
    place.textContent = fields[name] && !hidden ? `${name} ${fields[name]}` : "";
    $(name)?.setAttribute?.("aria-invalid", fields[name] ? "true" : "false");
  }
  for (const [name, problem] of Object.entries(fields)) {
    if (!FIELDS.includes(name) || $(`${name}-problem`).closest(".field")?.hidden) elsewhere.push(`${name} ${problem}`);
  }
  if (elsewhere.length) $("request-problem").textContent = elsewhere.join("; ");
}

async function plot() {
  tableRun?.abort();
  tableRun = new AbortController();
  const data = asked();
  const { checkpoint, steps, spacing } = data;
  const wanted = { checkpoint, steps, spacing, eta: data.eta ?? 0, ...listed() };
  if (data.label !== undefined) wanted.label = data.label;
  try {
    table = await post("/api/table", wanted, tableRun.signal);
    drawPlot($("plot"), table);
    $("notes").textContent = table.notes.join("; ");
  } catch {
    // what is wrong is said where the run is asked for
  }
}

async function run() {
  clearTimeout(timer);
  save();
  running?.abort();
  const mine = (running = new AbortController());
  $("stop").disabled = false;
  $("images").classList.add("old");
  const pressed = performance.now();
  let first = null, finished = false;
  const since = () => `${((performance.now() - pressed) / 1000).toFixed(2)} s`;
  plot();
  try {
    for await (const { name, data } of events("/api/run", withPicture(asked()), mine.signal)) {
      complain();
      if (name === "failed") throw new Error(data.error);
      if (name === "done") {
        finished = true;
        await done(data, first, since());
      } else if (data.state !== "running") {
        $("said").textContent = data.state === "compiling"
          ? "Waiting for its program to be compiled."
          : `Waiting: ${data.before} before this.`;
      } else if (data.images) {
        first ??= since();
        $("progress").value = data.done / data.total;
        mark($("plot"), data.done / data.total);
        $("said").ariaLive = "off"; // not read out: the end is
        $("said").textContent = `evaluation ${data.done} of ${data.total}`;
        await show(data.images);
      }
    }
    if (!finished) throw new Error("the server broke off");
  } catch (error) {
    $("said").ariaLive = "polite";
    if (mine.signal.aborted) {
      if (running === mine) $("said").textContent = "Stopped.";
    } else {
      complain(error.fields ?? { request: "" });
      const silent = error instanceof TypeError ? "the server does not answer" : error.message;
      if (!error.fields) $("request-problem").textContent = silent;
      $("said").textContent = "Not run.";
      $("progress").value = 0;
    }
  } finally {
    if (running === mine) {
      $("stop").disabled = true;
      running = null;
    }
  }
}

// -- results -----------------------------------------------------------------------------------------------------

async function pixels(base64) {
  const image = new Image();
  image.src = `data:image/png;base64,${base64}`;
  await image.decode();
  return image;
}

async function show(base64, captions = []) {
  const image = await pixels(base64);
  const width = current.width, height = current.height, num = Math.round(image.width / width);
  const place = $("images");
  while (place.children.length > num) place.lastChild.remove();
  while (place.children.length < num) place.append(tile(place.children.length));
  [...place.children].forEach((figure, i) => {
    const canvas = figure.querySelector("canvas");
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").drawImage(image, i * width, 0, width, height, 0, 0, width, height);
    const caption = captions[i] ?? "";
    figure.querySelector("span").textContent = caption;
    const label = `image ${i + 1} of ${num}${caption ? `, ${caption}` : ""}: draw on it`;
    figure.setAttribute("aria-label", label);
  });
  place.classList.remove("old");
}

function tile(i) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(document.createElement("canvas"), document.createElement("span"));
  button.addEventListener("click", () => take(i));
  return button;
}

// Image i becomes the picture.
function take(i) {
  const canvas = $("images").children[i].querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, current.width, current.height);
  const picture = new Uint8ClampedArray(pad.picture.length);
  for (let p = 0; p < current.width * current.height; p++) {
    for (let c = 0; c < current.channels; c++) picture[p * current.channels + c] = data[4 * p + c];
  }
  if (mode() !== "invert") document.querySelector("input[name=mode][value=inpaint]").checked = true;
  if (mode() === "inpaint") chooseTool("mask");
  arrange();
  pad.set(picture);
  $("pad").focus();
}

async function done(data, first, all) {
  result = data;
  runs += 1;
  const now = mode();
  const captions = data.etas.map((eta, i) => {
    const said = [];
    if (now === "strip" || (now === "invert" && data.etas.length > 1)) said.push(`η ${Number(eta.toFixed(2))}`);
    if (data.labels) said.push(`label ${data.labels[i]}`);
    if (now === "slerp") said.push(i === 0 ? `seed ${$("seed").value}` : "");
    if (now === "slerp" && i === data.etas.length - 1) said.push(`seed ${$("seed_to").value}`);
    return said.filter(Boolean).join(", ");
  });
  result.captions = captions;
  await show($("noise").checked ? data.x_T : data.images, captions);
  $("progress").value = 1;
  mark($("plot"), 1);
  $("said").ariaLive = "polite";
  const error = data.error === undefined ? "" : `; mean squared error of the first ${data.error.toExponential(1)}`;
  $("said").textContent = `${data.etas.length} images in ${all}, the first to be seen after ${first ?? all}${error}`;
  $("below").hidden = false;
  $("downloads").replaceChildren("download ", ...data.files.flatMap((file) => {
    const link = Object.assign(document.createElement("a"), { href: `/api/results/${data.id}/${file}`, textContent: file });
    link.download = file;
    return [link, " "];
  }));
  $("python").textContent = data.python;
  $("command").textContent = data.command ?? `None: ${data.no_command}.`;
  document.querySelector("[data-copy=command]").disabled = !data.command;
  $("results").dataset.runs = runs;
}

// -- controls ----------------------------------------------------------------------------------------------------

function changed(wait = 200) {
  save();
  clearTimeout(timer);
  const blank = (mode() === "invert" && pad.empty) || (mode() === "inpaint" && !pad.mask.some((value) => value));
  if (!$("live").checked || blank) {
    plot();
    if (blank) $("said").textContent = mode() === "invert" ? "Draw a picture first." : "Paint a mask first.";
    return;
  }
  timer = setTimeout(run, wait);
}

function chooseTool(name) {
  pad.tool = name;
  document.querySelector(`input[name=tool][value=${name}]`).checked = true;
}

function listen() {
  for (const name of ["steps", "eta", "num", "guidance_scale"]) {
    $(`${name}-slider`).addEventListener("input", () => {
      $(name).value = $(`${name}-slider`).value;
      changed(120);
    });
    $(name).addEventListener("input", () => ($(`${name}-slider`).value = $(name).value));
  }
  for (const name of [...NUMBERS, "method", "label", "spacing", "guided"]) {
    $(name).addEventListener(NUMBERS.includes(name) ? "input" : "change", () => {
      arrange();
      changed();
    });
  }
  $("checkpoint").addEventListener("change", () => {
    current = about.checkpoints.find((one) => one.name === $("checkpoint").value);
    offer();
    arrange();
    changed(0);
  });
  $("modes").addEventListener("change", () => {
    complain();
    arrange();
    changed(0);
  });
  for (const name of ["lock", "live"]) $(name).addEventListener("change", save);
  $("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!$("lock").checked) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
    run();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("noise").addEventListener("change", () => {
    if (result) show($("noise").checked ? result.x_T : result.images, result.captions);
  });
  $("tools").addEventListener("change", (event) => (pad.tool = event.target.value));
  $("brush").addEventListener("input", () => (pad.radius = Number($("brush").value)));
  $("colour").addEventListener("input", () => {
    pad.colour = [1, 3, 5].map((i) => parseInt($("colour").value.slice(i, i + 2), 16));
  });
  $("clear").addEventListener("click", () => pad.clear());
  $("half").addEventListener("click", () => pad.maskHalf());
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(button, $(button.dataset.copy)));
  }
  new ResizeObserver(() => {
    if (table) drawPlot($("plot"), table);
    if (table && !running) mark($("plot"), 1);
  }).observe($("plot"));
  addEventListener("hashchange", () => {
    restore();
    arrange();
    changed(0);
  });
}

async function copy(button, from) {
  try {
    await navigator.clipboard.writeText(from.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(from); // no clipboard without https: then by hand
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// How far compiling is, until it is done.
async function watch() {
  for (;;) {
    const { done, total, now } = about.compiling;
    $("server").textContent = now ? `compiling ${done + 1} of ${total}: ${now}` : "";
    if (done >= total) break;
    await new Promise((resolve) => setTimeout(resolve, 500));
    const last = about;
    about = await (await fetch("/api/about")).json();
    const methods = (one) => JSON.stringify(one.checkpoints.map((checkpoint) => checkpoint.methods));
    if (methods(last) !== methods(about)) {
      current = about.checkpoints.find((one) => one.name === current.name);
      offer();
    }
  }
}

async function start() {
  about = await (await fetch("/api/about")).json();
  build(about.fields);
  $("checkpoint").replaceChildren(...about.checkpoints.map((one) => new Option(one.name, one.name)));
  Object.assign($("steps"), { value: 20 });
  Object.assign($("eta"), { value: 0 });
  Object.assign($("num"), { value: Math.min(4, about.bounds.num) });
  Object.assign($("seed"), { value: 0 });
  Object.assign($("seed_to"), { value: 1 });
  Object.assign($("guidance_scale"), { value: 2 });
  $("null_label").value = "";
  restore();
  arrange();
  listen();
  changed(0);
  await watch();
}

start().catch((error) => ($("said").textContent = `The page could not start: ${error.message}`));
