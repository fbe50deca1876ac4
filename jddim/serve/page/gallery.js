// Runs of a while ago, to be looked at again, and one that is kept beside those that follow.
import { decoded, png, spread } from "./results.js";

const $ = (id) => document.getElementById(id);
const MOST = 12;
const runs = []; // the newest first: what was presented, with `asked` and `state`
let kept = null;

export function remember(made, open) {
  runs.unshift(made);
  runs.length = Math.min(runs.length, MOST);
  $("recent").hidden = runs.length < 2;
  $("runs").replaceChildren(...runs.map((run, i) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const canvas = document.createElement("canvas"), said = document.createElement("span");
    button.type = "button";
    said.textContent = title(run);
    button.ariaLabel = `run ${i + 1} back: ${said.textContent}`;
    thumbnail(canvas, run);
    button.append(canvas, said);
    button.addEventListener("click", () => open(run));
    item.append(button);
    return item;
  }));
  compare(made);
}

function title({ asked, mode, columns }) {
  const steps = columns.length ? columns.join(", ") : asked.steps;
  return `${asked.method === "ddim" ? mode : asked.method}, ${steps} steps, ${asked.corners ? `seeds ${asked.corners.join(", ")}` : `seed ${asked.seed}`}`;
}

// Its first images, four at most.
async function thumbnail(canvas, run) {
  const image = await decoded(png(run.images)), num = Math.round(image.width / run.width);
  const across = num > 1 ? 2 : 1, { width, height } = run;
  Object.assign(canvas, { width: across * width, height: across * height });
  for (let i = 0; i < Math.min(num, across * across); i++) {
    canvas.getContext("2d").drawImage(image, i * width, 0, width, height,
      (i % across) * width, Math.floor(i / across) * height, width, height);
  }
}

export async function keep(made) {
  kept = made;
  $("kept").hidden = made === null;
  if (made === null) return;
  spread($("kept-images"), await decoded(png(made.images)), made.width, made.height,
    { captions: made.captions, columns: made.columns.length });
  compare(made);
}

// In which settings the run that is presented differs from the one kept, and how far its pixels are from it.
export async function compare(made) {
  if (kept === null) return;
  if (made.id === kept.id) {
    $("difference").textContent = "This run. The next ones are compared with it.";
    return;
  }
  const names = [...new Set([...Object.keys(kept.asked), ...Object.keys(made.asked)])];
  const said = (value) => (value === undefined ? "none" : String(value).length > 24 ? "another" : String(value));
  const changes = names.filter((name) => JSON.stringify(kept.asked[name]) !== JSON.stringify(made.asked[name]))
    .map((name) => (["picture", "mask", "condition"].includes(name) ? `another ${name}`
      : `${name.replaceAll("_", " ")} ${said(kept.asked[name])} → ${said(made.asked[name])}`));
  const [before, after] = await Promise.all([kept, made].map(async (run) => levels(await decoded(png(run.images)))));
  let far = "";
  if (before.length === after.length) {
    let sum = 0;
    for (let i = 0; i < before.length; i++) sum += Math.abs(before[i] - after[i]);
    far = ` Mean difference of the pixels: ${((sum / before.length) * 4 / 3).toFixed(1)} of 255.`; // alpha is alike
  }
  $("difference").textContent = `From these to those above: ${changes.join("; ") || "nothing was changed"}.${far}`;
}

function levels(image) {
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height).data;
}
