// log SNR over t with the timesteps visited, in the order of sampling: noise at the left, the image at the right.
const H = 240, LEFT = 44, RIGHT = 12, TOP = 12, BOTTOM = 58, BARS = 26;

export function draw(place, table) {
  const W = Math.max(place.clientWidth, 240); // so that letters have their size
  const finite = table.log_snr.filter((value) => value !== null);
  const low = Math.floor(Math.min(...finite)), high = Math.ceil(Math.max(...finite));
  const last = table.last_t;
  const x = (t) => LEFT + ((last - t) / (last || 1)) * (W - LEFT - RIGHT);
  const y = (value) => TOP + ((high - (value ?? low)) / (high - low || 1)) * (H - TOP - BOTTOM);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  const n = table.visited.length;
  svg.setAttribute("aria-label", `log SNR over t; ${n} steps, from t = ${+table.visited[0].toPrecision(4)} to ${+table.visited[n - 1].toPrecision(4)}`);
  const step = niceStep((high - low) / 4);
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) {
    svg.append(make("line", { x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v), class: "grid" }));
    svg.append(text(LEFT - 8, y(v) + 4, `${v}`, "end"));
  }
  const bottom = H - BOTTOM + BARS;
  for (const t of ticks(last, W < 420 ? 4 : 6)) {
    svg.append(make("line", { x1: x(t), x2: x(t), y1: TOP, y2: bottom, class: "grid" }));
    svg.append(text(x(t), bottom + 16, t === last ? `t = ${t}` : `${+t.toFixed(2)}`, t === last ? "start" : "middle"));
  }
  const points = table.t.map((t, i) => `${x(t)},${y(table.log_snr[i])}`).join(" ");
  svg.append(make("polyline", { points, class: "curve" }));
  svg.append(text(LEFT + 6, TOP + 10, "log SNR", "start"));
  const most = Math.max(...table.sigma.map((value) => value ?? 0));
  if (most > 0) svg.append(text(W - RIGHT, bottom - BARS - 2, `σ, at most ${most.toPrecision(2)}`, "end"));
  table.visited.forEach((t, i) => {
    const height = most > 0 ? ((table.sigma[i] ?? 0) / most) * (BARS - 4) : 0;
    svg.append(make("line", { x1: x(t), x2: x(t), y1: bottom, y2: bottom - height, class: "bar" }));
    const dot = make("circle", { cx: x(t), cy: y(table.visited_log_snr[i]), r: n > 80 ? 2 : 3.5, class: "dot" });
    dot.append(Object.assign(make("title", {}), { textContent: `step ${i + 1}: t = ${+t.toPrecision(4)}` }));
    svg.append(dot);
  });
  if (place.firstChild?.getAttribute("viewBox") === svg.getAttribute("viewBox")) {
    place.firstChild.replaceChildren(...svg.children);
    place.firstChild.setAttribute("aria-label", svg.getAttribute("aria-label"));
  } else place.replaceChildren(svg);
}

// Marks how much of the way has been gone: part in 0..1.
export function mark(place, part) {
  const dots = [...place.querySelectorAll(".dot")];
  dots.forEach((dot, i) => dot.classList.toggle("gone", i < Math.round(part * dots.length)));
}

function ticks(last, most) {
  const step = niceStep(last / most, last > 1 ? 1 : 0);
  const all = [];
  for (let t = 0; t < last - step / 2; t += step) all.push(t);
  return [...all, last];
}

function niceStep(rough, least = 1) {
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1e-9)));
  return Math.max(least, [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough));
}

function make(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function text(x, y, content, anchor) {
  return Object.assign(make("text", { x, y, "text-anchor": anchor }), { textContent: content });
}
