// Photo -> aligned 112 x 112 crop, as `vitface align` does it: YuNet's faces, the central one, five landmarks, a warp.
// Pictures are {width, height, data}: three bytes a pixel, R G B. Landmarks are [x, y] in pixels, image's left first.

export const CROP = 112;
const TEMPLATE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];
const MAX_SIDE = 1280, MIN_SIDE = 256, MIN_SCORE = 0.6, NMS_IOU = 0.3, MAX_FACES = 100, MIN_FACE = 32;
const UPRIGHT = 0.88, SURE = 0.85, LEAD = 0.03, MAX_OUTSIDE = 0.25, FARTHEST = 20;
const STRIDES = [8, 16, 32];

const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (points) => [0, 1].map((axis) => sum(points.map((point) => point[axis])) / points.length);
const side = (face) => Math.min(face.box[2], face.box[3]);
const best = (faces) => Math.max(0, ...faces.map((face) => face.score));
const half = (value) => (value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value)); // to even, as Python rounds

/** The crop of the face that is large and near the middle, with remarks; Error says why there is none. */
export async function align(picture, run) {
  const faces = await find(picture, run);
  const { width, height } = picture;
  if (!faces.length) {
    const advice = Math.min(width, height) < 3 * MIN_FACE ? 'take a larger photo'
      : 'take one that shows it whole, upright and from the front';
    throw new Error(`No face found in ${width} × ${height} pixels; ${advice}.`);
  }
  const face = central(faces, width, height);
  if (side(face) < MIN_FACE) {
    throw new Error(`The face is ${Math.round(side(face))} pixels wide, less than ${MIN_FACE}; take a larger photo.`);
  }
  const { crop, outside } = cropAt(picture, face.landmarks);
  const remarks = [];
  if (faces.length > 1) remarks.push(`${faces.length} faces; the large one near the middle was taken`);
  if (face.turns) remarks.push('it lies on a side or upside down; the face was turned upright');
  if (outside > MAX_OUTSIDE) remarks.push('the photo ends close to the face; a part of its crop is black');
  return { crop, landmarks: face.landmarks, remarks };
}

/** The crop that five landmarks ask for, and the part of it, from 0 to 1, that is outside the photo and so black. */
export function cropAt(picture, landmarks) {
  const matrix = similarity(landmarks, TEMPLATE);
  const off = Math.hypot(...landmarks.flatMap((point, i) => apply(matrix, point).map((v, k) => v - TEMPLATE[i][k])));
  if (off / Math.sqrt(5) > FARTHEST) throw new Error('The landmarks that were found are not those of a face.');
  return warp(picture, invert(matrix));
}

/** Faces {box, landmarks, score, turns}; a photo without a good one is also searched turned by quarters. */
async function find(picture, run) {
  const faces = await detect(picture, run);
  if (best(faces) >= UPRIGHT) return faces;
  let turned = picture, found = [], turns = 0;
  for (const quarter of [1, 2, 3]) {
    turned = rotateLeft(turned);
    const here = await detect(turned, run);
    if (!turns || best(here) > best(found)) [found, turns] = [here, quarter];
  }
  if (best(found) < Math.max(SURE, best(faces) + LEAD)) return faces;
  return found.map((face) => turnedBack(face, turns, picture));
}

/** At the photo's size, at most MAX_SIDE, and at halves of it down to MIN_SIDE; the highest score first. */
async function detect(picture, run) {
  const longest = Math.max(picture.width, picture.height), found = [], faces = [];
  for (let size = Math.min(longest, MAX_SIDE), first = true; first || size >= MIN_SIDE; size >>= 1, first = false) {
    found.push(...await detectAt(picture, size / longest, run));
  }
  for (const face of found.sort((a, b) => b.score - a.score)) {
    if (!faces.some((other) => overlap(face.box, other.box) > NMS_IOU)) faces.push(face);
  }
  return faces;
}

async function detectAt(picture, scale, run) {
  const width = Math.max(half(picture.width * scale), 1), height = Math.max(half(picture.height * scale), 1);
  const small = scale === 1 ? picture : shrink(picture, width, height);
  const columns = Math.ceil(width / 32) * 32, rows = Math.ceil(height / 32) * 32;
  const blue = new Float32Array(3 * rows * columns); // planes of B, G, R, with black to the right and below
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) blue[((2 - c) * rows + y) * columns + x] = small.data[3 * (y * width + x) + c];
    }
  }
  return decode(await run(blue, [1, 3, rows, columns]), columns).map(({ box, landmarks, score }) => ({
    box: box.map((value) => value / scale), landmarks: landmarks.map((p) => p.map((value) => value / scale)), score, turns: 0,
  }));
}

/** YuNet's twelve outputs -> faces, by non-maximum suppression of whole-pixel boxes, as OpenCV has it. */
function decode(outputs, columns) {
  const found = [];
  for (const stride of STRIDES) {
    const [cls, obj, bbox, kps] = ['cls', 'obj', 'bbox', 'kps'].map((name) => outputs[`${name}_${stride}`]);
    const wide = columns / stride;
    for (let i = 0; i < cls.length; i++) {
      const score = Math.sqrt(Math.min(Math.max(cls[i], 0), 1) * Math.min(Math.max(obj[i], 0), 1));
      if (score < MIN_SCORE) continue;
      const column = i % wide, row = Math.floor(i / wide), at = (k) => bbox[4 * i + k];
      const w = Math.exp(at(2)) * stride, h = Math.exp(at(3)) * stride;
      const landmarks = [0, 1, 2, 3, 4].map((n) => [(kps[10 * i + 2 * n] + column) * stride, (kps[10 * i + 2 * n + 1] + row) * stride]);
      found.push({ box: [(column + at(0)) * stride - w / 2, (row + at(1)) * stride - h / 2, w, h], landmarks, score });
    }
  }
  const kept = [];
  for (const face of found.sort((a, b) => b.score - a.score).slice(0, MAX_FACES)) {
    if (kept.every((other) => overlap(face.box.map(Math.trunc), other.box.map(Math.trunc)) <= NMS_IOU)) kept.push(face);
  }
  return kept;
}

/** The common part of two boxes x, y, width, height as a share of all that they cover. */
function overlap(a, b) {
  const common = [0, 1].map((k) => Math.max(Math.min(a[k] + a[k + 2], b[k] + b[k + 2]) - Math.max(a[k], b[k]), 0));
  const shared = common[0] * common[1];
  return shared / (a[2] * a[3] + b[2] * b[3] - shared);
}

function central(faces, width, height) {
  const largest = Math.max(...faces.map(side)), least = Math.max(largest / 2, Math.min(MIN_FACE, largest));
  const weight = ({ box: [x, y, w, h] }) => w * h - 2 * ((x + w / 2 - width / 2) ** 2 + (y + h / 2 - height / 2) ** 2);
  return faces.filter((face) => side(face) >= least).reduce((a, b) => (weight(b) > weight(a) ? b : a));
}

/** Smaller by areas, as OpenCV's INTER_AREA: each new pixel is the mean of what it covers. */
function shrink({ width, height, data }, toWidth, toHeight) {
  const across = shares(width, toWidth), down = shares(height, toHeight);
  const out = new Uint8ClampedArray(3 * toWidth * toHeight), line = new Float32Array(3 * width);
  for (let y = 0; y < toHeight; y++) {
    line.fill(0);
    for (const [row, part] of down[y]) {
      for (let i = 0, at = 3 * width * row; i < line.length; i++) line[i] += part * data[at + i];
    }
    for (let x = 0; x < toWidth; x++) {
      for (let c = 0; c < 3; c++) {
        let total = 0;
        for (const [column, part] of across[x]) total += part * line[3 * column + c];
        out[3 * (y * toWidth + x) + c] = total;
      }
    }
  }
  return { width: toWidth, height: toHeight, data: out };
}

/** For each of `to` new pixels, which of `from` old ones it covers, and how much of it each is. */
function shares(from, to) {
  const scale = from / to;
  return Array.from({ length: to }, (_, i) => {
    const start = i * scale, stop = Math.min(start + scale, from), covered = [];
    for (let k = Math.floor(start + 1e-3); k < stop - 1e-3; k++) {
      covered.push([k, (Math.min(k + 1, stop) - Math.max(k, start)) / (stop - start)]);
    }
    return covered;
  });
}

function rotateLeft({ width, height, data }) {
  const out = new Uint8ClampedArray(data.length);
  for (let y = 0; y < width; y++) {
    for (let x = 0; x < height; x++) {
      for (let c = 0; c < 3; c++) out[3 * (y * height + x) + c] = data[3 * (x * width + width - 1 - y) + c];
    }
  }
  return { width: height, height: width, data: out };
}

/** A face in the photo turned left by so many quarters, in the photo itself. */
function turnedBack(face, turns, { width, height }) {
  const [x, y, w, h] = face.box;
  let points = [...face.landmarks, [x, y], [x + w, y + h]];
  for (let turn = turns - 1; turn >= 0; turn--) points = points.map(([u, v]) => [[width, height][turn % 2] - 1 - v, u]);
  const [a, b] = points.splice(5);
  const box = [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.abs(a[0] - b[0]), Math.abs(a[1] - b[1])];
  return { ...face, box, landmarks: points, turns };
}

/** Rotation, scale and shift [a, b, x, y] that take points nearest to others: (u, v) -> (a u - b v + x, b u + a v + y). */
function similarity(source, target) {
  const [cx, cy] = mean(source), [tx, ty] = mean(target);
  let dot = 0, cross = 0, spread = 0;
  source.forEach(([px, py], i) => {
    const [u, v, s, t] = [px - cx, py - cy, target[i][0] - tx, target[i][1] - ty];
    dot += u * s + v * t, cross += u * t - v * s, spread += u * u + v * v;
  });
  const a = dot / spread, b = cross / spread;
  return [a, b, tx - a * cx + b * cy, ty - b * cx - a * cy];
}

const apply = ([a, b, x, y], [u, v]) => [a * u - b * v + x, b * u + a * v + y];

function invert([a, b, x, y]) {
  const n = a * a + b * b;
  return [a / n, -b / n, -(a * x + b * y) / n, (b * x - a * y) / n];
}

/** `cropAt` of a matrix from the crop to the photo, bilinear as Pillow's transform. */
function warp({ width, height, data }, inverse) {
  const crop = new Uint8ClampedArray(3 * CROP * CROP);
  let inside = 0;
  for (let y = 0; y < CROP; y++) {
    for (let x = 0; x < CROP; x++) {
      const [u, v] = apply(inverse, [x, y]);
      inside += u > -1 && u < width && v > -1 && v < height;
      if (u < -0.5 || u >= width - 0.5 || v < -0.5 || v >= height - 0.5) continue;
      const left = Math.floor(u), top = Math.floor(v), dx = u - left, dy = v - top;
      const pixel = (i, j, c) => data[3 * (Math.min(Math.max(top + j, 0), height - 1) * width + Math.min(Math.max(left + i, 0), width - 1)) + c];
      for (let c = 0; c < 3; c++) {
        const upper = pixel(0, 0, c) * (1 - dx) + pixel(1, 0, c) * dx, lower = pixel(0, 1, c) * (1 - dx) + pixel(1, 1, c) * dx;
        crop[3 * (y * CROP + x) + c] = Math.floor(upper * (1 - dy) + lower * dy);
      }
    }
  }
  return { crop: { width: CROP, height: CROP, data: crop }, outside: 1 - inside / CROP ** 2 };
}
