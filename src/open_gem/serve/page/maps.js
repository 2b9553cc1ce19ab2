// From the similarity grid to maps, masks, boxes and points: open_gem.readout's rules, in the browser. Pure functions.
// A grid is {rows, cols, values: Float32Array}; a map is {height, width, values, low, high}. Rows before columns.

/** Little-endian float16 in base64 → Float32Array. */
export function decodeHalf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, index) => half(view.getUint16(2 * index, true)));
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** Between which two cells each pixel lies along one side, and how far towards the second; corners not aligned. */
function taps(cells, pixels) {
  const low = new Int32Array(pixels), high = new Int32Array(pixels), part = new Float32Array(pixels);
  for (let pixel = 0; pixel < pixels; pixel++) {
    const at = Math.max(0, (pixel + 0.5) * (cells / pixels) - 0.5);
    low[pixel] = Math.min(Math.floor(at), cells - 1);
    high[pixel] = Math.min(low[pixel] + 1, cells - 1);
    part[pixel] = at - low[pixel];
  }
  return { low, high, part };
}

/** The grid, bilinear, at a size in pixels. */
export function upsample(grid, { height, width }) {
  const down = taps(grid.rows, height), along = taps(grid.cols, width);
  const values = new Float32Array(height * width), row = new Float32Array(grid.cols);
  let low = Infinity, high = -Infinity;
  for (let y = 0, at = 0; y < height; y++) {
    const above = down.low[y] * grid.cols, below = down.high[y] * grid.cols;
    for (let col = 0; col < grid.cols; col++) {
      row[col] = grid.values[above + col] + (grid.values[below + col] - grid.values[above + col]) * down.part[y];
    }
    for (let x = 0; x < width; x++, at++) {
      const left = row[along.low[x]];
      const value = Math.fround(left + (row[along.high[x]] - left) * along.part[x]);
      values[at] = value;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return { height, width, values, low, high };
}

const EPSILON = 2 ** -23; // of float32, in which the library computes

/** What stretches a map's values to [0, 1]: value → (value − low) · gain; a constant map, in which nothing stands out, → 0. */
export function stretch({ low, high }) {
  const noise = 8 * EPSILON * Math.max(Math.abs(low), Math.abs(high));
  return { low, gain: high - low <= noise ? 0 : 1 / (high - low) };
}

/** Where the stretched map is above the threshold: Uint8Array of 0 and 1. */
export function maskOf(map, threshold) {
  const { low, gain } = stretch(map);
  const limit = gain ? low + threshold / gain : Infinity;
  const mask = new Uint8Array(map.values.length);
  for (let at = 0; at < mask.length; at++) if (map.values[at] > limit) mask[at] = 1; // a loop: `from` takes 30 times as long
  return mask;
}

/** A box around each 8-connected component of a mask, best first: [{box: [left, top, right, bottom], score, area}], right
 *  and bottom exclusive; the score is the highest value of the map in it. Components of less than a share `minArea` of the
 *  map are left out. */
export function boxesOf(mask, map, minArea) {
  const parts = []; // what each label has seen; `same` leads to the label that it was joined with
  const same = [];
  const root = (label) => {
    while (same[label] !== label) label = same[label] = same[same[label]];
    return label;
  };
  let above = [];
  for (let y = 0; y < map.height; y++) {
    const runs = runsOf(mask, map, y);
    let from = 0;
    for (const run of runs) {
      run.label = parts.push({ box: [run.start, y, run.end, y + 1], score: run.score, area: run.end - run.start }) - 1;
      same.push(run.label);
      while (from < above.length && above[from].end < run.start) from++;
      for (let next = from; next < above.length && above[next].start <= run.end; next++) {
        join(parts, same, root(above[next].label), root(run.label));
      }
    }
    above = runs;
  }
  const least = minArea * mask.length;
  return parts.filter(({ area }, label) => same[label] === label && area >= least).sort((first, second) => second.score - first.score);
}

/** The stretches of a mask's row, with the highest value in each. */
function runsOf(mask, map, y) {
  const runs = [], first = y * map.width;
  for (let x = 0; x < map.width; x++) {
    if (!mask[first + x]) continue;
    const start = x;
    let score = -Infinity;
    for (; x < map.width && mask[first + x]; x++) score = Math.max(score, map.values[first + x]);
    runs.push({ start, end: x, score });
  }
  return runs;
}

function join(parts, same, first, second) {
  if (first === second) return;
  const [kept, gone] = first < second ? [first, second] : [second, first]; // the first in reading order stays
  same[gone] = kept;
  const into = parts[kept], part = parts[gone];
  into.score = Math.max(into.score, part.score);
  into.area += part.area;
  into.box = into.box.map((side, index) => (index < 2 ? Math.min : Math.max)(side, part.box[index]));
}

/** Where a map is highest: [x, y], the first in reading order among equals. */
export function peakOf(map) {
  const at = map.values.indexOf(map.high);
  return [at % map.width, Math.floor(at / map.width)];
}

/** The grid's value at a place of the image, [x, y] as shares of its width and height. */
export function valueAt(grid, [x, y]) {
  const [row, col] = [[y, grid.rows], [x, grid.cols]].map(([share, cells]) => {
    const at = Math.min(Math.max(share * cells - 0.5, 0), cells - 1), low = Math.floor(at);
    return { low, high: Math.min(low + 1, cells - 1), part: at - low };
  });
  const mix = (from, to, part) => from + (to - from) * part;
  const along = (at) => mix(grid.values[at * grid.cols + col.low], grid.values[at * grid.cols + col.high], col.part);
  return mix(along(row.low), along(row.high), row.part);
}
