// A picture of the network's own size, painted pixel by pixel, and a mask over it. Both are kept for a reload.
const MOST = 32 * 2 ** 20; // bytes of a file

export class Pad {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.tool = "ink";
    this.radius = 1.4;
    this.colour = [255, 255, 255];
    this.showMask = false;
    this.cursor = null;
    let last = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [
        ((event.clientX - box.left) / box.width) * this.width - 0.5,
        ((event.clientY - box.top) / box.height) * this.height - 0.5,
      ];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      last = at(event);
      this.line(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const here = at(event);
      this.line(last, here);
      last = here;
    });
    const up = () => {
      if (last) this.finished();
      last = null;
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => {
      this.cursor = null;
      this.draw();
    });
  }

  shape(height, width, channels, name) {
    Object.assign(this, { height, width, channels });
    this.name = `${name} ${height}x${width}x${channels}`;
    this.picture = new Uint8ClampedArray(height * width * channels);
    this.mask = new Uint8ClampedArray(height * width);
    const kept = JSON.parse(sessionStorage.getItem(this.name) ?? "{}");
    for (const layer of ["picture", "mask"]) {
      const bytes = fromBase64(kept[layer] ?? "");
      if (bytes.length === this[layer].length) this[layer].set(bytes);
    }
    this.canvas.width = width;
    this.canvas.height = height;
    this.draw();
  }

  get empty() {
    return !this.picture.some((value) => value);
  }

  // RGBA, row by row; grey as ITU-R BT.601 weighs the colours.
  take(data) {
    for (let p = 0; p < this.width * this.height; p++) {
      const [r, g, b] = data.subarray(4 * p, 4 * p + 3);
      const levels = this.channels === 1 ? [0.299 * r + 0.587 * g + 0.114 * b] : [r, g, b];
      this.picture.set(levels, p * this.channels);
    }
    this.finished();
  }

  // A file's picture, its middle in the pad's proportions. Only its pixels are ever sent.
  async load(file) {
    if (file.size > MOST) throw new Error("is larger than 32 MiB");
    const whole = await createImageBitmap(file).catch(() => {
      throw new Error("is no picture that this browser reads");
    });
    const scale = Math.min(whole.width / this.width, whole.height / this.height);
    const [w, h] = [this.width * scale, this.height * scale].map((side) => Math.max(1, Math.round(side)));
    const [x, y] = [(whole.width - w) / 2, (whole.height - h) / 2].map(Math.floor);
    const size = { resizeWidth: this.width, resizeHeight: this.height, resizeQuality: "high" };
    const small = await createImageBitmap(whole, x, y, w, h, size);
    const canvas = Object.assign(document.createElement("canvas"), { width: this.width, height: this.height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, this.width, this.height); // under what is transparent
    context.drawImage(small, 0, 0);
    this.take(context.getImageData(0, 0, this.width, this.height).data);
  }

  // What was sent before, in base64.
  put(picture, mask) {
    this.picture.set(fromBase64(picture));
    if (mask) this.mask.set(fromBase64(mask));
    this.keep();
  }

  negative() {
    this.picture.forEach((value, i) => (this.picture[i] = 255 - value));
    this.finished();
  }

  clear() {
    this.picture.fill(0);
    this.mask.fill(0);
    this.finished();
  }

  maskHalf() {
    this.mask.fill(0).fill(255, Math.floor(this.height / 2) * this.width);
    this.finished();
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    this.cursor ??= [Math.floor(this.width / 2), Math.floor(this.height / 2)];
    const [x, y] = this.cursor;
    if (move) {
      this.cursor = [clamp(x + move[0], this.width), clamp(y + move[1], this.height)];
      if (event.shiftKey) this.line([x, y], this.cursor);
    } else this.line(this.cursor, this.cursor);
    if (!move || event.shiftKey) this.finished();
    this.draw();
  }

  // A soft disc along a line: full to within half a pixel of the radius, nothing half a pixel beyond.
  line([x0, y0], [x1, y1]) {
    const n = Math.max(1, Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)));
    for (let k = 0; k <= n; k++) this.dab(x0 + ((x1 - x0) * k) / n, y0 + ((y1 - y0) * k) / n);
    this.draw();
  }

  dab(cx, cy) {
    const r = this.radius + 0.5;
    for (let y = Math.max(0, Math.ceil(cy - r)); y <= Math.min(this.height - 1, cy + r); y++) {
      for (let x = Math.max(0, Math.ceil(cx - r)); x <= Math.min(this.width - 1, cx + r); x++) {
        const strength = Math.min(1, Math.max(0, r - Math.hypot(x - cx, y - cy)));
        const i = y * this.width + x;
        if (this.tool === "mask" && strength >= 0.5) this.mask[i] = 255;
        else if (this.tool === "unmask" && strength >= 0.5) this.mask[i] = 0;
        else if (this.tool === "erase" && strength >= 0.5) {
          this.picture.fill(0, i * this.channels, (i + 1) * this.channels);
        } else if (this.tool === "ink") {
          for (let c = 0; c < this.channels; c++) {
            const j = i * this.channels + c;
            const wanted = this.colour[c];
            const mixed = this.picture[j] + strength * (wanted - this.picture[j]);
            this.picture[j] = this.channels === 1 ? Math.max(this.picture[j], strength * wanted) : mixed;
          }
        }
      }
    }
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    for (let i = 0; i < this.width * this.height; i++) {
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = this.picture[i * this.channels + (c % this.channels)];
      if (this.showMask && this.mask[i]) {
        const hatch = ((i % this.width) + Math.floor(i / this.width)) % 2 ? 0.75 : 0.55;
        [232, 93, 47].forEach((value, c) => {
          pixels.data[4 * i + c] = hatch * value + (1 - hatch) * pixels.data[4 * i + c];
        });
      }
      pixels.data[4 * i + 3] = 255;
    }
    if (this.cursor) {
      const i = this.cursor[1] * this.width + this.cursor[0];
      pixels.data.set([64, 160, 255, 255], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
  }

  finished() {
    this.keep();
    this.changed();
  }

  keep() {
    this.draw();
    try {
      const layers = { picture: toBase64(this.picture), mask: toBase64(this.mask) };
      sessionStorage.setItem(this.name, JSON.stringify(layers));
    } catch {
      // full: then a reload begins with an empty pad
    }
  }
}

const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));

export function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return btoa(text);
}

function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
