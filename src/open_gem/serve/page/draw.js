// An image with heat, masks, boxes and points on a canvas, as open_gem.images.draw draws them. Colours are [red, green, blue].
import { boxesOf, maskOf, peakOf, stretch, upsample } from "./maps.js";
import { ABSENT_OPACITY, HEAT, MIN_AREA, OPACITY } from "./constants.js";

const READABLE = 320; // pixels of the shorter side up to which a small image is enlarged, by a whole factor
const LIVE = 700_000; // pixels that are painted again at every letter and every move of a slider
const SAVED = 16_000_000; // pixels of an image that is saved
const BOXES = 3; // drawn of a prompt: more hide the image
const DARK = [16, 16, 20], LIGHT = [255, 255, 255];

/** What is drawn on for a bitmap of an image: its size in pixels, and the pixels. A whole multiple of the image, or itself,
 *  where that is small enough to be painted live. */
export function viewOf(bitmap, image, live = true) {
  const size = live ? liveSize(image) : shrunk(image, SAVED);
  const canvas = new OffscreenCanvas(size.width, size.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // what lies behind a transparent image
  context.fillRect(0, 0, size.width, size.height);
  context.drawImage(bitmap, 0, 0, size.width, size.height);
  return { ...size, image, pixels: context.getImageData(0, 0, size.width, size.height).data, maps: new Map() };
}

function liveSize(image) {
  const whole = Math.max(1, Math.ceil(READABLE / Math.min(image.height, image.width)));
  return shrunk({ height: image.height * whole, width: image.width * whole }, LIVE);
}

function shrunk({ height, width }, most) {
  const factor = Math.min(1, Math.sqrt(most / (height * width)));
  return { height: Math.max(1, Math.round(height * factor)), width: Math.max(1, Math.round(width * factor)) };
}

const KEPT = 32_000_000; // pixels of the maps that a view keeps

const CROP = 48; // pixels of the longer side of a crop

/** The address of a small image of a box, whose sides are shares of a bitmap's width and height. */
export function cropOf(bitmap, [left, top, right, bottom]) {
  const width = (right - left) * bitmap.width, height = (bottom - top) * bitmap.height;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height].map((side) => Math.max(1, Math.round((CROP * side) / Math.max(width, height))));
  canvas.getContext("2d").drawImage(bitmap, left * bitmap.width, top * bitmap.height, width, height, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL();
}

/** The map of an answer at the size of a view; made once, as long as it is among the last that were asked for. */
export function mapOf(view, answer) {
  const map = view.maps.get(answer) ?? upsample(answer.grid, view);
  view.maps.delete(answer);
  view.maps.set(answer, map);
  if (view.maps.size * map.values.length > KEPT) view.maps.delete(view.maps.keys().next().value);
  return map;
}

/** The mask, boxes and point of a map at a threshold, in pixels of the view. */
export function marksOf(map, threshold) {
  if (map.marks?.threshold !== threshold) {
    const mask = maskOf(map, threshold);
    map.marks = { threshold, mask, boxes: boxesOf(mask, map, MIN_AREA), point: peakOf(map) };
  }
  return map.marks;
}

/** A box of a view in pixels of its image, right and bottom exclusive. */
export function boxInImage([left, top, right, bottom], view) {
  const [across, down] = scaleOf(view);
  return [Math.floor(left * across), Math.floor(top * down), Math.ceil(right * across), Math.ceil(bottom * down)];
}

/** A point likewise: the pixel of the image in which the view's pixel has its middle. */
export function pointInImage([x, y], view) {
  const [across, down] = scaleOf(view);
  return [Math.floor((x + 0.5) * across), Math.floor((y + 0.5) * down)];
}

const scaleOf = ({ image, width, height }) => [image.width / width, image.height / height];

/** Paint a view on a canvas of its size.
 *
 *  heat    {map, absent} of the prompt that is looked at, or null; what is absent is faded and crossed out
 *  marks   [{map, color}] of the prompts whose masks, boxes and points are wanted
 *  show    {heat, mask, boxes, point}: which layers
 */
export function paint(canvas, view, { heat, marks, show, threshold, opacity }) {
  if (canvas.width !== view.width) canvas.width = view.width;
  if (canvas.height !== view.height) canvas.height = view.height;
  const context = canvas.getContext("2d");
  const image = new ImageData(new Uint8ClampedArray(view.pixels), view.width, view.height);
  const hot = heat && show.heat;
  if (hot) paintHeat(image.data, heat, opacity);
  const shorter = Math.min(view.width, view.height);
  const line = Math.max(2, Math.round(shorter / 180)), dot = Math.max(4, Math.floor(shorter / 90));
  const drawn = marks.map(({ map, color }) => ({ color, ...marksOf(map, threshold) }));
  if (show.mask) for (const { mask, color } of drawn) paintMask(image, mask, color, hot ? 0 : opacity, line);
  context.putImageData(image, 0, 0);
  if (hot && heat.absent) crossOut(context, view, line);
  if (show.boxes) for (const { boxes, color } of drawn) boxes.slice(0, BOXES).forEach(({ box }, rank) => strokeBox(context, box, color, line, rank > 0));
  if (show.point) for (const { point, color } of drawn) drawPoint(context, point, color, dot, line);
}

function paintHeat(pixels, { map, absent }, opacity) {
  if (absent) fade(pixels);
  const { low, gain } = stretch(map), strength = absent ? (opacity / OPACITY) * ABSENT_OPACITY : opacity;
  const left = new Float32Array(256), added = new Float32Array(768); // by level of heat
  for (let level = 0; level < 256; level++) {
    const alpha = strength * (level / 255);
    left[level] = 1 - alpha;
    for (let channel = 0; channel < 3; channel++) added[3 * level + channel] = alpha * (absent ? 255 : HEAT[3 * level + channel]);
  }
  for (let at = 0, pixel = 0; at < map.values.length; at++, pixel += 4) {
    const level = Math.round((map.values[at] - low) * gain * 255), color = 3 * level;
    for (let channel = 0; channel < 3; channel++) {
      pixels[pixel + channel] = pixels[pixel + channel] * left[level] + added[color + channel];
    }
  }
}

/** Almost grey and lighter: what an image looks like below the heat of an absent label. */
function fade(pixels) {
  for (let pixel = 0; pixel < pixels.length; pixel += 4) {
    const grey = 50 + (0.55 * (pixels[pixel] + pixels[pixel + 1] + pixels[pixel + 2])) / 3;
    for (let channel = 0; channel < 3; channel++) pixels[pixel + channel] = 0.25 * pixels[pixel + channel] + grey;
  }
}

/** Two diagonals from corner to corner. */
function crossOut(context, { width, height }, line) {
  context.setLineDash([]);
  for (const [style, stroke] of [[DARK, line + 2], [LIGHT, line]]) {
    context.strokeStyle = css(style);
    context.lineWidth = stroke;
    context.beginPath();
    for (const [from, to] of [[0, height], [height, 0]]) {
      context.moveTo(0, from);
      context.lineTo(width, to);
    }
    context.stroke();
  }
}

/** A line just inside the mask with a dark one inside that, and a tint of the rest. */
function paintMask({ data, width, height }, mask, color, tint, line) {
  const pad = 2 * line, stride = width + 2 * pad;
  const padded = new Uint8Array(stride * (height + 2 * pad)).fill(1); // a mask goes on where the image ends
  for (let y = 0; y < height; y++) padded.set(mask.subarray(y * width, (y + 1) * width), (y + pad) * stride + pad);
  const within = (at, by) => padded[at - by] & padded[at + by] & padded[at - by * stride] & padded[at + by * stride];
  for (let y = 0, pixel = 0; y < height; y++) {
    for (let x = 0, at = (y + pad) * stride + pad; x < width; x++, at++, pixel += 4) {
      if (!padded[at]) continue;
      const edge = !within(at, line), second = !edge && !within(at, pad);
      const alpha = edge || second ? 1 : tint;
      if (alpha) blend(data, pixel, second ? DARK : color, alpha);
    }
  }
}

function blend(data, pixel, color, alpha) {
  for (let channel = 0; channel < 3; channel++) {
    data[pixel + channel] = data[pixel + channel] * (1 - alpha) + color[channel] * alpha;
  }
}

const css = (color) => `rgb(${color.join(" ")})`;

/** The best box of a prompt is drawn in full, others dashed. */
function strokeBox(context, [left, top, right, bottom], color, line, dashed) {
  for (const [style, width] of [[DARK, line + 2], [color, line]]) {
    context.strokeStyle = css(style);
    context.lineWidth = dashed ? width / 2 : width;
    context.setLineDash(dashed ? [2 * line, 2 * line] : []);
    context.strokeRect(left + line / 2, top + line / 2, Math.max(0, right - left - line), Math.max(0, bottom - top - line));
  }
}

function drawPoint(context, [x, y], color, dot, line) {
  for (const [radius, style] of [[dot + line, DARK], [dot, LIGHT], [dot / 2, color]]) {
    context.fillStyle = css(style);
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, radius, 0, 2 * Math.PI);
    context.fill();
  }
}

/** Several painted images side by side, each with a line of words below: a PNG. */
export async function toPng(canvases, captions) {
  const [{ width, height }] = canvases;
  const text = Math.max(13, Math.round(Math.min(width, height) / 26)), gap = canvases.length > 1 ? Math.ceil(text / 2) : 0;
  const sheet = new OffscreenCanvas(canvases.length * (width + gap) - gap, height + 2 * text);
  const context = sheet.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.font = `${text}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  canvases.forEach((canvas, index) => {
    const left = index * (width + gap);
    context.drawImage(canvas, left, 0);
    context.fillStyle = "#000";
    context.fillText(captions[index], left + text / 2, height + text, width - text);
  });
  return sheet.convertToBlob({ type: "image/png" });
}
