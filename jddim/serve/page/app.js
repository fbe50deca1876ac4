// The page's state is its URL's hash: a reload keeps it, and a link says it. The server judges every value.
import { events, post } from "./stream.js";
import { Pad, toBase64 } from "./draw.js";
import { draw as drawPlot, mark } from "./plot.js";
import { forget, halt, look, play, present, preview, result, stale } from "./results.js";
import { compare, keep, remember } from "./gallery.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["steps", "eta", "num", "seed", "seed_to", "guidance_scale", "null_label"];
const CHOICES = ["checkpoint", "method", "spacing"];
const CHECKS = ["lock", "live", "guided"];
let FIELDS = ["steps", "eta", "num", "seed", "seed_to", "guidance_scale", "null_label", "method", "label", "spacing",
  "columns", "corners", "at", "picture", "mask", "condition", "request"];
const MODES = {
  sample: "Images of a seed. Image i depends on the seed and i alone, so that the first four of sixteen are these four.",
  strip: "One noise, sampled with eta from 0 to 1: how much the noise that the steps add decides.",
  grid: "One noise in every cell. Down: eta from 0 to 1. Across: the numbers of steps.",
  slerp: "From one seed's first noise to another's, along the sphere that noise lies on, at eta 0.",
  corners: "One image from the noise between four seeds' first noises, at eta 0. Drag the point.",
  invert: "Draw, or choose a picture. It is led back to the noise it could come from, and sampled from there again: "
    + "the first image at eta 0, which gives the picture back, the last at eta 1.",
  inpaint: "Draw, or choose a picture, and paint a mask. What lies under the mask is made anew, the rest is kept.",
};
let about, current, running, table, tableRun, timer;
let behind = false; // the point was dragged on during the run
let label = "each"; // the one chosen last, also where a mode does not offer it
let runs = 0;
const pad = new Pad($("pad"), () => changed());
const beside = new Pad($("beside-pad"), () => changed()); // what some networks are given beside the noise

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
    if (controls[0].closest(".field").hidden) continue;
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
  if (current.classes !== null) state.set("label", label);
  for (const name of ["columns", "corners", "across", "down"]) state.set(name, $(name).value);
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
  guide();
  label = state.get("label") ?? label;
  const chosen = document.querySelector(`input[name=mode][value="${CSS.escape(state.get("mode") ?? "sample")}"]`);
  if (chosen && !chosen.disabled) chosen.checked = true;
  for (const name of [...NUMBERS, ...CHOICES.slice(1)]) {
    if (!state.has(name)) continue;
    const before = $(name).value;
    $(name).value = state.get(name);
    if ($(name).value === "") $(name).value = before; // of another checkpoint
  }
  for (const name of ["columns", "corners", "across", "down"]) if (state.has(name)) $(name).value = state.get(name);
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
  $("steps-slider").max = Math.min(bounds.steps, T);
  $("num-slider").max = bounds.num;
  if (Number($("null_label").value) >= (current.classes ?? 0)) $("null_label").value = "";
  const kind = current.channels === 1 ? "grey" : "colour";
  const classes = current.classes === null ? "" : `, of ${current.classes - (current.null_label !== null)} labels`;
  $("summary").textContent = `${current.width} × ${current.height} ${kind} images${classes}`;
  $("network").textContent = `The network: ${current.summary}.`;
  const invert = document.querySelector("input[name=mode][value=invert]");
  invert.disabled = !current.invertible;
  if (invert.disabled && invert.checked) document.querySelector("input[name=mode][value=sample]").checked = true;
  pad.shape(current.height, current.width, current.channels, current.name);
  $("colour-label").hidden = current.channels === 1;
  const given = current.condition_channels;
  $("beside").hidden = given === 0;
  $("beside-colour-label").hidden = given === 1;
  if (given) beside.shape(current.height, current.width, given, `beside ${current.name}`);
}

// Guidance as is good for this checkpoint: on where it is known what meant no label in training.
function guide() {
  $("guided").checked = current.null_label !== null;
  $("guidance_scale").value = current.guidance_scale;
}

// The labels of this mode, that which means none at the end; of a picture to invert, whose label nobody knows, first.
function offerLabels(now) {
  const none = current.null_label;
  const classes = [...Array(current.classes ?? 0).keys()].filter((value) => value !== none);
  const unlabelled = none === null ? [] : [[`${none}: no label`, none]];
  const offered = [...(about.many_labels.includes(now) ? [["each in turn", "each"]] : []),
    ...(now === "invert" ? unlabelled : []), ...classes.map((value) => [value, value]),
    ...(now === "invert" ? [] : unlabelled)];
  $("label").replaceChildren(...offered.map(([text, value]) => new Option(text, value)));
  if (offered.some(([, value]) => String(value) === label)) $("label").value = label;
}

// What this mode has.
function arrange() {
  const now = mode();
  offerLabels(now);
  for (const field of document.querySelectorAll(".field")) {
    const modes = field.dataset.modes?.split(" ") ?? [now];
    field.hidden = !modes.includes(now) || ("classes" in field.dataset && current.classes === null);
  }
  $("null_label").closest(".field").hidden ||= !$("guided").checked || current.null_label !== null;
  $("paste").closest(".field").hidden = now !== "inpaint" || !current.latent;
  $("num-name").textContent = now === "grid" ? "etas, a row each" : "images";
  const ddim = now !== "sample" || $("method").value === "ddim";
  for (const id of ["eta", "eta-slider"]) $(id).disabled = !ddim;
  for (const id of ["guidance_scale", "guidance_scale-slider"]) $(id).disabled = !$("guided").checked;
  $("drawing").hidden = now !== "invert" && now !== "inpaint";
  pad.showMask = now === "inpaint";
  for (const element of document.querySelectorAll("[data-mask]")) element.hidden = now !== "inpaint";
  if (now !== "inpaint" && pad.tool.endsWith("mask")) chooseTool("ink");
  $("pad-hint").textContent = now === "inpaint"
    ? "Draw, paste or choose a picture, then mask what is to be made anew. Keys: arrows, space, Shift and arrows."
    : "Draw, paste or choose a picture. Keys: arrows move, space paints, Shift and arrows draw.";
  $("about-mode").textContent = MODES[now];
  pad.draw();
  for (const name of ["steps", "eta", "num", "guidance_scale"]) $(`${name}-slider`).value = $(name).value;
  place();
}

function place() {
  $("point").style.left = `${100 * $("across").value}%`;
  $("point").style.top = `${100 * $("down").value}%`;
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
  for (const id of ["steps", "num", "seed"]) if (visible(id)) data[id] = typed(id);
  if (now === "grid") data.columns = listOf("columns");
  if (now === "corners") {
    data.corners = listOf("corners");
    data.at = [Number($("down").value), Number($("across").value)];
  }
  if (visible("eta") && !$("eta").disabled) data.eta = typed("eta");
  if (now === "slerp") data.seed_to = typed("seed_to");
  if (current.classes !== null) {
    data.label = $("label").value === "each" ? "each" : Number($("label").value);
    if ($("guided").checked) {
      data.guidance_scale = typed("guidance_scale");
      if (visible("null_label")) data.null_label = typed("null_label");
    }
  }
  return data;
}

// The whole numbers of a field, or what was typed.
function listOf(id) {
  const parts = $(id).value.split(",").map((part) => part.trim()).filter(Boolean);
  return parts.every((part) => /^[0-9]+$/.test(part)) ? parts.map(Number) : $(id).value;
}

function withPicture(data) {
  if (data.mode === "invert" || data.mode === "inpaint") data.picture = toBase64(pad.picture);
  if (data.mode === "inpaint") data.mask = toBase64(pad.mask);
  if (current.condition_channels) data.condition = toBase64(beside.picture);
  return data;
}

// A field as the page calls it.
const called = (name) => $(`${name}-name`)?.textContent ?? name.replaceAll("_", " ");

function complain(fields = {}) {
  const elsewhere = [];
  for (const name of FIELDS) {
    const place = $(`${name}-problem`);
    const hidden = place.closest(".field")?.hidden;
    place.textContent = fields[name] && !hidden ? `${called(name)} ${fields[name]}` : "";
    $(name)?.setAttribute?.("aria-invalid", fields[name] ? "true" : "false");
  }
  for (const [name, problem] of Object.entries(fields)) {
    if (!FIELDS.includes(name) || $(`${name}-problem`).closest(".field")?.hidden) {
      elsewhere.push(`${called(name)} ${problem}`);
    }
  }
  if (elsewhere.length) $("request-problem").textContent = elsewhere.join("; ");
}

// Draws the timetable, and returns the t that it visits; nothing if it is refused, or was changed meanwhile.
async function plot() {
  tableRun?.abort();
  tableRun = new AbortController();
  const data = asked();
  const { checkpoint, spacing } = data;
  const steps = data.steps ?? Math.max(...[data.columns].flat().map(Number).filter(Number.isFinite));
  const wanted = { checkpoint, steps, spacing, eta: data.eta ?? (["strip", "grid", "invert"].includes(data.mode) ? 1 : 0) };
  Object.assign(wanted, listed());
  if (data.label !== undefined) wanted.label = data.label;
  try {
    table = await post("/api/table", wanted, tableRun.signal);
    drawPlot($("plot"), table);
    $("notes").replaceChildren(...table.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
    $("notes-details").hidden = table.notes.length === 0;
    return table.visited;
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
  stale(true);
  const pressed = performance.now();
  let first = null, finished = false;
  const since = () => `${((performance.now() - pressed) / 1000).toFixed(2)} s`;
  const data = withPicture(asked());
  const made = { mode: mode(), asked: data, width: current.width, height: current.height, state: location.hash };
  const visited = plot();
  try {
    for await (const { name, data: told } of events("/api/run", data, mine.signal)) {
      complain();
      if (name === "failed") throw new Error(told.error);
      $("said").ariaLive = told.done || told.waited ? "off" : "polite"; // steps and seconds are not read out
      if (name === "done") {
        finished = true;
        const all = since();
        await done(Object.assign(made, told, { visited: await visited }), first, all);
      } else if (told.state !== "running") {
        $("said").textContent = waiting(told);
      } else if (told.done) {
        $("progress").value = told.done / told.total;
        mark($("plot"), told.done / told.total);
        $("said").textContent = going(made.mode, told);
        if (!told.images) continue;
        first ??= since();
        await preview(told.images, { ...made, columns: data.columns?.length ?? 0 }, take);
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
      stale(true);
    }
  } finally {
    if (running === mine) {
      $("stop").disabled = true;
      running = null;
      if (behind) changed(0);
      behind = false;
    }
  }
}

// Why a run has not begun.
function waiting({ state, before, now, needs, waited }) {
  if (state === "waiting") return before === 0 ? "Next in line." : `Waiting for its turn: ${before} before this one.`;
  const what = !now ? "about to compile" : needs.includes(now) ? `compiling ${now}`
    : `another program, ${now}, is being compiled first; then ${needs[0]}`;
  return `The first run of a kind waits for its program: ${what}. ${waited} s so far; kept for the next start.`;
}

function going(now, { done, total, row, rows }) {
  if (row === rows && done < total) return "decoding the images";
  if (!rows) return `evaluation ${done} of ${total}`;
  if (now !== "invert") return `step ${row} of ${rows}`;
  return row <= rows / 2 ? `to the noise: step ${row} of ${rows / 2}` : `and back: step ${row - rows / 2} of ${rows / 2}`;
}

// Ends the run that is being made, without a word.
function leave() {
  running?.abort();
  running = null;
  $("stop").disabled = true;
}

// -- results -----------------------------------------------------------------------------------------------------

// Image i, as it is shown, becomes the picture.
function take(i) {
  const canvas = $("images").children[i].querySelector("canvas");
  const left = canvas.width - current.width; // of a pair, the x0_hat
  const { data } = canvas.getContext("2d").getImageData(left, 0, current.width, current.height);
  if (mode() !== "invert") document.querySelector("input[name=mode][value=inpaint]").checked = true;
  if (mode() === "inpaint") chooseTool("mask");
  arrange();
  pad.take(data);
  $("pad").focus();
}

async function done(made, first, all) {
  runs += 1;
  made.captions = captions(made);
  await show(made);
  stale(JSON.stringify(withPicture(asked())) !== JSON.stringify(made.asked)); // changed without a run on change
  if (!behind) remember(made, open);
  $("progress").value = 1;
  mark($("plot"), 1);
  const error = made.error === undefined ? "" : `; the first is ${made.error.toExponential(1)} from the picture (mean squared)`;
  const num = made.etas.length * (made.columns.length || 1);
  $("said").textContent = `${num} image${num > 1 ? "s" : ""} in ${all}, the first preview after ${first ?? all}${error}`;
  $("results").dataset.runs = runs;
}

const show = (made) => present(made, take);

// A run of before: its settings, its pictures, and what it made.
async function open(made) {
  leave();
  clearTimeout(timer);
  history.replaceState(null, "", made.state);
  restore();
  arrange();
  if (made.asked.picture) pad.put(made.asked.picture, made.asked.mask);
  if (made.asked.condition) beside.put(made.asked.condition);
  complain();
  await show(made);
  compare(made);
  plot();
  save();
  $("progress").value = 1;
  $("said").textContent = "A run of before, with its settings.";
}

function captions({ mode: now, asked: data, etas, labels, columns: across }) {
  const rows = etas.map((eta, i) => {
    const said = [];
    if (["strip", "grid", "invert"].includes(now) && etas.length > 1) said.push(`η ${Number(eta.toFixed(2))}`);
    if (labels && now !== "grid") said.push(labels[i] === current.null_label ? "no label" : `label ${labels[i]}`);
    if (now === "slerp" && i === 0) said.push(`seed ${data.seed}`);
    if (now === "slerp" && i === etas.length - 1) said.push(`seed ${data.seed_to}`);
    return said.join(", ");
  });
  if (now === "corners") return [data.label === undefined ? "" : `label ${data.label}`];
  if (!across.length) return rows;
  return rows.flatMap((row) => across.map((steps) => `${row}, ${steps} step${steps > 1 ? "s" : ""}`));
}

// -- controls ----------------------------------------------------------------------------------------------------

function changed(wait = 200) {
  save();
  stale(true);
  halt();
  clearTimeout(timer);
  const blank = (current.condition_channels > 0 && beside.empty && "Choose or draw the picture beside the noise first.")
    || (mode() === "invert" && pad.empty && "Draw a picture first.")
    || (mode() === "inpaint" && !pad.mask.some((value) => value) && "Paint a mask first.");
  if (!$("live").checked || blank) {
    plot();
    if (blank) leave();
    $("said").textContent = blank || "Changed: press Run.";
    return;
  }
  timer = setTimeout(run, wait);
}

// While one drags, what is between is run as often as runs get done.
function drag(event) {
  const box = $("square").getBoundingClientRect();
  $("across").value = (event.clientX - box.left) / box.width;
  $("down").value = (event.clientY - box.top) / box.height;
  place();
  if (running) behind = true;
  else changed(0);
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
  for (const name of [...NUMBERS, "columns", "corners", "method", "label", "spacing", "guided"]) {
    $(name).addEventListener([...NUMBERS, "columns", "corners"].includes(name) ? "input" : "change", () => {
      if (name === "label") label = $("label").value;
      arrange();
      changed();
    });
  }
  for (const name of ["across", "down"]) {
    $(name).addEventListener("input", () => {
      place();
      changed(60);
    });
  }
  $("square").addEventListener("pointerdown", (event) => {
    $("square").setPointerCapture(event.pointerId);
    drag(event);
  });
  $("square").addEventListener("pointermove", (event) => {
    if ($("square").hasPointerCapture(event.pointerId)) drag(event);
  });
  $("checkpoint").addEventListener("change", () => {
    current = about.checkpoints.find((one) => one.name === $("checkpoint").value);
    leave();
    forget(); // of another network
    offer();
    guide();
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
  const moved = async () => {
    const part = await look(take);
    if (part !== null && !running) mark($("plot"), part);
  };
  $("noise").addEventListener("change", () => {
    $("way").value = $("way").max;
    moved();
  });
  $("way").addEventListener("input", () => {
    halt();
    moved();
  });
  $("play").addEventListener("click", () => play(moved));
  $("keep").addEventListener("click", () => keep(result()));
  $("drop").addEventListener("click", () => keep(null));
  $("tools").addEventListener("change", (event) => (pad.tool = event.target.value));
  $("brush").addEventListener("input", () => (pad.radius = Number($("brush").value)));
  for (const [id, one] of [["colour", pad], ["beside-colour", beside]]) {
    $(id).addEventListener("input", () => (one.colour = [1, 3, 5].map((i) => parseInt($(id).value.slice(i, i + 2), 16))));
  }
  $("clear").addEventListener("click", () => pad.clear());
  $("negative").addEventListener("click", () => pad.negative());
  $("beside-clear").addEventListener("click", () => beside.clear());
  for (const [place, input, one] of [["drawing", "file", pad], ["beside", "beside-file", beside]]) {
    $(input).addEventListener("change", async () => {
      await picture($(input).files[0], one);
      $(input).value = "";
    });
    $(place).addEventListener("dragover", (event) => event.preventDefault());
    $(place).addEventListener("drop", (event) => {
      event.preventDefault();
      picture(event.dataTransfer.files[0], one);
    });
  }
  addEventListener("paste", (event) => {
    const one = [pad, beside].find(({ canvas }) => canvas.checkVisibility());
    if (one) picture(event.clipboardData.files[0], one);
  });
  keys(moved);
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

// A picture of one's own, cut to the pad's shape and drawn there.
async function picture(file, one) {
  if (!file) return;
  const place = $(one === pad ? "picture-problem" : "condition-problem");
  try {
    await one.load(file);
    place.textContent = "";
  } catch (error) {
    place.textContent = `${file.name}: ${error.message}`;
  }
}

// Letters and digits act unless something is being typed or drawn; a switch turns them off.
function keys(moved) {
  const modes = [...document.querySelectorAll("input[name=mode]")];
  const step = (by) => {
    if (!result()) return;
    halt();
    $("way").value = Number($("way").value) + by;
    moved();
  };
  const list = {
    r: ["run", () => $("run").click()],
    s: ["stop", () => $("stop").click()],
    l: ["lock the seed, or not", () => $("lock").click()],
    k: ["keep this run to compare", () => !$("below").hidden && $("keep").click()],
    p: ["play the way, or pause", () => !$("below").hidden && play(moved)],
    ",": ["a step back", () => step(-1)],
    ".": ["a step on", () => step(1)],
    "?": ["these keys", () => $("keys").showModal()],
  };
  modes.forEach((one, i) => (list[i + 1] = [one.nextSibling.textContent, () => one.click()]));
  $("keys-list").replaceChildren(...Object.entries(list).flatMap(([key, [what]]) => [
    Object.assign(document.createElement("dt"), { textContent: key }),
    Object.assign(document.createElement("dd"), { textContent: what }),
  ]));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("keys-close").addEventListener("click", () => $("keys").close());
  addEventListener("keydown", (event) => {
    document.documentElement.dataset.by = event.key === "Escape" ? "" : "keys"; // which shows the tips
    const typing = event.target.matches("input:not([type=checkbox], [type=radio], [type=range]), select, canvas");
    if (typing || event.ctrlKey || event.altKey || event.metaKey || $("keys").open || !$("shortcuts").checked) return;
    const [, act] = list[event.key] ?? [];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  addEventListener("pointerdown", () => (document.documentElement.dataset.by = "pointer"));
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
    $("server").textContent = done >= total ? "" : now ? `compiling ${done + 1} of ${total}: ${now}`
      : `${total - done} of ${total} solvers and modes are still to be prepared, while nothing runs`;
    if (done >= total) break;
    await new Promise((resolve) => setTimeout(resolve, 700));
    const last = about;
    about = await (await fetch("/api/about")).json();
    const methods = (one) => JSON.stringify(one.checkpoints.map((checkpoint) => checkpoint.methods));
    if (methods(last) !== methods(about)) {
      current = about.checkpoints.find((one) => one.name === current.name);
      offer(); // the methods that are left
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
  Object.assign($("columns"), { value: "5, 10, 20, 50" });
  Object.assign($("corners"), { value: "0, 1, 2, 3" });
  $("null_label").value = "";
  restore();
  arrange();
  listen();
  changed(0);
  await watch();
}

start().catch((error) => ($("said").textContent = `The page could not start: ${error.message}`));
