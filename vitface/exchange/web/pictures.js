// Between the browser's images and pixels. Pictures are {width, height, data}: three bytes a pixel, R G B.
const MAX_PIXELS = 4096 * 4096;

/** The pixels of an image, upright by its EXIF, without its colour profile, transparent parts on grey. */
export async function decode(image) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(image, { colorSpaceConversion: 'none' });
  } catch {
    throw new Error('This file is no image that the browser can show; save it as JPEG or PNG.');
  }
  const shrink = Math.ceil(Math.sqrt(bitmap.width * bitmap.height / MAX_PIXELS));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.ceil(side / shrink));
  if (Math.min(width, height) < 16) throw new Error(`${width} × ${height} pixels are too few for a face.`);
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  pen.fillStyle = 'rgb(128 128 128)';
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0, width, height);
  const given = pen.getImageData(0, 0, width, height).data, data = new Uint8ClampedArray(3 * width * height);
  for (let i = 0, o = 0; i < given.length; i += 4) data[o++] = given[i], data[o++] = given[i + 1], data[o++] = given[i + 2];
  return { width, height, data };
}

export function toCanvas({ width, height, data }) {
  const canvas = Object.assign(document.createElement('canvas'), { width, height }), pixels = new ImageData(width, height);
  for (let i = 0, o = 0; i < data.length; o++) pixels.data[o] = o % 4 === 3 ? 255 : data[i++];
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

/** Attention over the patches as a picture: clear where it is small, through orange to pale yellow where it is largest. */
export function heat(attention) {
  const side = Math.sqrt(attention.length), most = Math.max(...attention), pixels = new ImageData(side, side);
  attention.forEach((value, i) => {
    const share = value / most;
    pixels.data.set([255, 90 + 150 * share, 30 + 110 * share * share, 255 * Math.min(.85, 1.1 * share)], 4 * i);
  });
  const canvas = Object.assign(document.createElement('canvas'), { width: side, height: side });
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

export function whereMost(attention) {
  const side = Math.sqrt(attention.length), at = attention.indexOf(Math.max(...attention));
  const third = (value, names) => names[Math.min(Math.floor(3 * (value + .5) / side), 2)];
  return `${third(Math.floor(at / side), ['upper', 'middle', 'lower'])} ${third(at % side, ['left', 'centre', 'right'])}`;
}
