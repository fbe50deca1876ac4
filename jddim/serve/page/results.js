// The images of a run: its previews, what it made, and the steps of its way, x_t and x0_hat side by side.
const $ = (id) => document.getElementById(id);
const pictures = new Map(); // of the result shown: the way's pictures by their number
let shown = null; // {id, images, x_T, way, rows, columns, captions, width, height, visited}
let playing;

export const result = () => shown;

// What is seen no longer is what the controls say.
export function stale(yes) {
  for (const id of ["results", "copy"]) $(id).classList.toggle("stale", yes && shown !== null);
}

export async function decoded(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

export const png = (base64) => `data:image/png;base64,${base64}`;

// Draws pictures that stand side by side into a place's tiles. below: whether each has a partner in a second row, which
// is drawn at its right.
export function spread(place, image, width, height, { captions = [], columns = 0, below = false, press = null } = {}) {
  const num = Math.round(image.width / width), gap = below ? Math.max(1, Math.round(width / 14)) : 0;
  const kind = press ? "button" : "div";
  if (place.firstChild && place.firstChild.localName !== kind) place.replaceChildren();
  while (place.children.length > num) place.lastChild.remove();
  while (place.children.length < num) place.append(tile(kind, place.children.length, press));
  place.dataset.columns = columns || "";
  [...place.children].forEach((figure, i) => {
    const canvas = figure.querySelector("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
    Object.assign(canvas, { width: below ? 2 * width + gap : width, height });
    context.drawImage(image, i * width, 0, width, height, 0, 0, width, height);
    if (below) context.drawImage(image, i * width, height, width, height, width + gap, 0, width, height);
    const caption = captions[i] ?? "";
    figure.querySelector("span").textContent = caption;
    const name = `image ${i + 1} of ${num}${caption ? `, ${caption}` : ""}`;
    if (press) figure.setAttribute("aria-label", `${name}: draw on it`);
    else Object.assign(canvas, { role: "img", ariaLabel: name });
  });
  place.classList.toggle("pairs", below);
}

function tile(kind, i, press) {
  const figure = document.createElement(kind);
  figure.append(document.createElement("canvas"), document.createElement("span"));
  if (press) {
    figure.type = "button";
    figure.addEventListener("click", () => press(i));
  }
  return figure;
}

// A preview: the x0_hat of all images.
export async function preview(base64, { width, height, columns }, press) {
  const image = await decoded(png(base64));
  $("below").hidden = true;
  halt();
  spread($("images"), image, width, height, { columns, press });
  $("results").classList.remove("stale");
}

export async function present(made, press) {
  shown = made;
  pictures.clear();
  halt();
  Object.assign($("way"), { max: made.way.length, value: made.way.length });
  $("way-field").hidden = made.way.length === 0;
  await look(press);
  stale(false);
  $("below").hidden = false;
  $("downloads").replaceChildren("download ", ...made.files.flatMap((file) => {
    const link = Object.assign(document.createElement("a"), { href: `/api/results/${made.id}/${file}`, textContent: file });
    link.download = file;
    return [link, " "];
  }));
  $("python").textContent = made.python;
  $("command").textContent = made.command ?? `None: ${made.no_command}.`;
  document.querySelector("[data-copy=command]").disabled = !made.command;
}

export function forget() {
  shown = null;
  halt();
  $("images").replaceChildren();
  $("below").hidden = true;
  stale(false);
}

// What the scrubber and the switch for x_T say.
export async function look(press) {
  const { way, rows, width, height, columns, captions } = shown, k = Number($("way").value);
  const how = { captions, columns: columns.length, press };
  if (k === way.length) {
    const image = await decoded(png($("noise").checked ? shown.x_T : shown.images));
    spread($("images"), image, width, height, how);
    $("way-said").textContent = way.length ? "The end. Further to the left: the steps that led here." : "";
    return 1;
  }
  const made = shown;
  if (!pictures.has(k)) {
    try {
      pictures.set(k, await decoded(`/api/results/${shown.id}/way-${k}.png`));
    } catch {
      $("way-said").textContent = "The server does not keep this run any more: run it again.";
      return k / way.length;
    }
  }
  if (shown !== made || Number($("way").value) !== k) return null; // moved on meanwhile
  spread($("images"), pictures.get(k), width, height, { ...how, below: true });
  const steps = shown.mode === "invert" ? rows / 2 : rows, up = shown.mode === "invert" && way[k] < steps;
  const t = shown.mode === "invert" ? undefined : shown.visited?.[way[k]];
  const where = `${up ? "Up, step" : shown.mode === "invert" ? "Down, step" : "Step"} ${(way[k] % steps) + 1} of ${steps}`;
  $("way-said").textContent = `${where}${t === undefined ? "" : `, t = ${+t.toPrecision(4)}`}. Left: x_t, before it. Right: `
    + (up ? "x_t after it." : "x0_hat, the clean image that the network predicts of it.");
  return way[k] / rows;
}

export function play(moved) {
  if (playing) return halt();
  const way = $("way");
  if (Number(way.value) === Number(way.max)) way.value = 0;
  else way.value = Number(way.value) + 1;
  $("play").textContent = "Pause";
  playing = setInterval(() => {
    if (Number(way.value) >= Number(way.max)) return halt();
    way.value = Number(way.value) + 1;
    moved();
  }, 160);
  moved();
}

export function halt() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Play";
}
