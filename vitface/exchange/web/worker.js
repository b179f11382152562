// Runs the two networks outside the page's own thread: pixels in; crop, embedding, domain weights and attention out.
import * as ort from './ort/ort.wasm.bundle.min.js';
import { CROP, align } from './faces.js';

const here = new URL('.', import.meta.url);
let recogniser, detector;

/** A file of this folder, with the progress of its download; Error if it is not there. */
async function read(name, size) {
  const response = await fetch(new URL(name, here));
  if (!response.ok) throw new Error(`${name} is missing (${response.status}).`);
  const data = [];
  let bytes = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    data.push(value);
    bytes += value.length;
    if (size) postMessage({ kind: 'progress', share: Math.min(bytes / size, 1) });
  }
  return new Uint8Array(await new Blob(data).arrayBuffer());
}

async function open(name, size, externalData) {
  return ort.InferenceSession.create(await read(name, size), { executionProviders: ['wasm'], externalData });
}

/** The tensors in a visitor's file; Error unless they are those that the model was made with. */
async function readBackbone(chosen, { file, bytes, sha256 }) {
  if (!crypto.subtle) throw new Error('The file can be checked only where this page is on https:// or on localhost.');
  const wrong = new Error(`${chosen.name} does not hold the weights that this model was made with; choose ${file}.`);
  const head = await chosen.slice(0, 8).arrayBuffer();
  if (head.byteLength < 8) throw wrong;
  const start = 8 + Number(new DataView(head).getBigUint64(0, true)); // after the header, which depends on vitface's version
  if (chosen.size - start !== bytes) throw wrong;
  const data = await chosen.slice(start).arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', data));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('') !== sha256) throw wrong;
  return new Uint8Array(data);
}

async function load({ size, backbone, chosen }) {
  ort.env.wasm.numThreads = 1;
  const outside = backbone && [{ path: backbone.file, data: await readBackbone(chosen, backbone) }];
  recogniser = await open('face.onnx', size, outside);
}

async function detect(data, shape) {
  detector ??= open('face_detection_yunet.onnx');
  const found = await (await detector).run({ input: new ort.Tensor('float32', data, shape) });
  return Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
}

/** A picture of exactly 112 x 112 pixels is an aligned crop; in any other, the face is found and aligned. */
async function embed({ picture }) {
  if (!recogniser) throw new Error('There is no model to look at it.');
  const isCrop = picture.width === CROP && picture.height === CROP;
  const face = isCrop ? { crop: picture, remarks: ['taken as an aligned crop, as it has 112 × 112 pixels'] } : await align(picture, detect);
  const pixels = new ort.Tensor('uint8', new Uint8Array(face.crop.data), [1, CROP, CROP, 3]);
  const found = await recogniser.run({ images: pixels });
  const embedding = found.embeddings.data, norm = Math.hypot(...embedding);
  if (!(Math.abs(norm - 1) < 0.01)) throw new Error('The model gives no embedding for this picture: it is damaged.');
  return { ...face, embedding, weights: found.domain_weights?.data ?? [], attention: found.attention.data };
}

let queue = Promise.resolve(); // a session runs one picture after the other
self.onmessage = ({ data: { id, kind, ...given } }) => {
  queue = queue.then(async () => {
    try {
      postMessage({ id, result: await { load, embed }[kind](given) });
    } catch (error) {
      postMessage({ id, error: error.message ?? String(error) });
    }
  });
};
