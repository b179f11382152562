// The page: two photos, the answer, a gallery in memory. The networks run in worker.js.
import { decode, heat, toCanvas, whereMost } from './pictures.js';

const $ = (query, root = document) => root.querySelector(query);
const SIDES = ['A', 'B'];
const slots = SIDES.map(makeSlot), people = [];
let about, far;

// A blob's worker has the page's Content-Security-Policy; one from an address has its own, which a plain server does not send.
const source = `import ${JSON.stringify(new URL('worker.js', import.meta.url).href)}`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })), { type: 'module' });
const waiting = new Map();
worker.onmessage = ({ data }) => {
  if (data.kind === 'progress') return void ($('#progress').value = data.share);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error)); else resolve(data.result);
};
worker.onerror = (event) => say($('#status'), `This browser cannot run the model: ${event.message ?? 'no module workers'}.`, true);

function ask(kind, given) {
  return new Promise((resolve, reject) => {
    const id = crypto.getRandomValues(new Uint32Array(1))[0];
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, kind, ...given });
  });
}

function say(element, text, bad = false) {
  element.textContent = text;
  element.classList.toggle('bad', bad);
}

// ---- photos

function makeSlot(name, index) {
  const element = $('#photo').content.cloneNode(true).firstElementChild;
  $('#photos').append(element);
  const slot = { name, element, note: $('.note', element), turn: 0, face: null };
  const input = $('input', element), drop = $('.drop', element);
  $('h2', element).textContent = `Photo ${name}`;
  input.setAttribute('aria-label', `Photo ${name}: choose a file`);
  $('canvas', element).setAttribute('aria-label', `Photo ${name}: empty`);
  $('.camera', element).setAttribute('aria-label', `Photo ${name}: camera`);
  input.onchange = () => {
    if (input.files.length) take(index, input.files[0]);
    input.value = ''; // so that the same file can be chosen again
  };
  for (const type of ['dragenter', 'dragover']) drop.addEventListener(type, () => drop.classList.add('over'));
  for (const type of ['dragleave', 'drop']) drop.addEventListener(type, () => drop.classList.remove('over'));
  drop.addEventListener('drop', (event) => event.dataTransfer.files.length && take(index, event.dataTransfer.files[0]));
  $('.camera', element).onclick = () => openCamera(index);
  return slot;
}

/** A file, blob or video -> what the model makes of it; a newer photo of the same side wins. */
async function take(index, image) {
  const slot = slots[index], turn = ++slot.turn;
  slot.face = null;
  show(slot);
  answer();
  say(slot.note, 'Looking for the face …');
  const started = performance.now();
  try {
    const face = await ask('embed', { picture: await decode(image) });
    if (turn !== slot.turn) return;
    slot.face = face;
    show(slot);
    answer();
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(slot.note, [...face.remarks, nearest(face), `computed in ${seconds} s`].filter(Boolean).join('; ').replace(/^./, (c) => c.toUpperCase()) + '.');
  } catch (error) {
    if (turn === slot.turn) say(slot.note, error.message, true);
  }
}

function show({ element, name, face }) {
  const canvas = $('canvas', element), pen = canvas.getContext('2d'), { width, height } = canvas;
  pen.clearRect(0, 0, width, height);
  $('.drop', element).classList.toggle('full', Boolean(face));
  const bars = $('.bars', element);
  bars.hidden = !face?.weights.length;
  canvas.setAttribute('aria-label', face ? `Photo ${name}: the aligned face` : `Photo ${name}: empty`);
  if (!face) return;
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(toCanvas(face.crop), 0, 0, width, height);
  if ($('#look').checked) {
    pen.drawImage(heat(face.attention), 0, 0, width, height);
    canvas.setAttribute('aria-label', `Photo ${name}: the aligned face; the model looks most at its ${whereMost(face.attention)}`);
  }
  $('tbody', bars).replaceChildren(...Array.from(face.weights, (weight, k) => {
    const row = document.createElement('tr');
    row.innerHTML = '<th scope="row"></th><td><div class="bar" aria-hidden="true"><div></div></div></td><td></td>';
    row.firstChild.textContent = about.domains[k];
    row.lastChild.textContent = weight.toFixed(2);
    $('.bar div', row).style.width = `${100 * weight}%`;
    return row;
  }));
}

// ---- the answer

const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);
const number = (value) => value.toFixed(4).replace('-', '−');

function answer() {
  const [a, b] = slots.map((slot) => slot.face), card = $('#answer');
  const cosine = a && b ? dot(a.embedding, b.embedding) : null, threshold = far?.threshold;
  const same = cosine === null || threshold === undefined ? null : cosine >= threshold;
  card.className = `card ${same === null ? '' : same ? 'same' : 'different'}`;
  card.dataset.cosine = cosine ?? '';
  $('#scale').hidden = $('#ends').hidden = cosine === null;
  $('#verdict').textContent = cosine === null ? 'No answer yet' : same === null ? 'No answer: there is no threshold' : same ? 'The same person' : 'Different people';
  if (cosine === null) {
    $('#reason').textContent = 'The answer appears here when there are two faces.';
    return;
  }
  const place = (value) => `${50 + 50 * Math.max(-1, Math.min(1, value))}%`;
  $('#needle').style.left = place(cosine);
  $('#zone').hidden = $('#mark').hidden = same === null;
  if (same === null) {
    $('#reason').textContent = `Cosine ${number(cosine)}. Nothing was calibrated for this model, so the cosine alone is no answer.`;
  } else {
    $('#mark').style.left = $('#zone').style.left = place(threshold);
    const side = same ? 'reaches' : 'is below';
    $('#reason').textContent = `Cosine ${number(cosine)} ${side} the threshold ${number(threshold)}. ${far.words}, measured on ${about.thresholds_from}. A cosine is no probability.`;
  }
  $('#scale').setAttribute('aria-label', `Cosine ${number(cosine)} on a scale from −1 to 1${same === null ? '' : `; the threshold is at ${number(threshold)}`}`);
}

// ---- people in this tab

function nearest(face) {
  if (!people.length) return '';
  const [cosine, name] = people.map((person) => [dot(person.embedding, face.embedding), person.name]).sort((a, b) => b[0] - a[0])[0];
  const verdict = far ? (cosine >= far.threshold ? ', the same person' : ', nobody in the list') : '';
  return `nearest in the list: ${name}, cosine ${number(cosine)}${verdict}`;
}

$('#gallery form').onsubmit = (event) => {
  event.preventDefault();
  const slot = slots[$('#gallery select').value], input = $('#gallery input'), note = $('#gallery .note');
  if (!slot.face) return say(note, `Photo ${slot.name} has no face yet.`, true);
  const person = { name: input.value.trim(), embedding: slot.face.embedding };
  const entry = document.createElement('li'), name = document.createElement('span'), forget = document.createElement('button');
  name.textContent = person.name;
  forget.textContent = 'Forget';
  forget.setAttribute('aria-label', `Forget ${person.name}`);
  forget.onclick = () => {
    people.splice(people.indexOf(person), 1);
    entry.remove();
    say(note, `${person.name} is forgotten.`);
    input.focus();
  };
  const small = toCanvas(slot.face.crop);
  small.setAttribute('aria-hidden', 'true');
  entry.append(small, name, forget);
  people.push(person);
  $('#gallery ul').append(entry);
  say(note, `${person.name} is in the list.`);
  input.value = '';
};

// ---- camera

const dialog = $('dialog'), video = $('video');
let cameraFor = 0, stream;

async function openCamera(index) {
  cameraFor = index;
  $('.take').disabled = true; // before it could get the focus
  dialog.showModal();
  say($('.note', dialog), 'Your browser asks whether this page may use the camera.');
  try {
    if (!navigator.mediaDevices) throw new Error('no camera here: pages have one on https:// and on localhost only');
    const opened = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'user', width: { ideal: 1280 } } });
    if (!dialog.open) return opened.getTracks().forEach((track) => track.stop());
    stream = video.srcObject = opened;
    await video.play();
    say($('.note', dialog), 'The picture stays in this page.');
    $('.take').disabled = false;
    $('.take').focus();
  } catch (error) {
    say($('.note', dialog), `The camera cannot be used (${error.message}).`, true);
  }
}

dialog.onclose = () => {
  stream?.getTracks().forEach((track) => track.stop());
  stream = video.srcObject = null;
};
$('.cancel').onclick = () => dialog.close();
$('.take').onclick = () => {
  take(cameraFor, video); // reads its picture at once
  dialog.close();
};

// ---- the rest of the page

for (const type of ['dragover', 'drop']) addEventListener(type, (event) => event.preventDefault()); // or the browser opens the file
addEventListener('paste', (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith('image/'));
  if (file) take(slots[0].face ? 1 : 0, file);
});
$('#look').onchange = () => slots.forEach(show);
$('#far select').onchange = (event) => {
  far = about.thresholds[event.target.value];
  answer();
};
for (const button of document.querySelectorAll('#examples button')) {
  button.onclick = () => button.dataset.pair.split(' ').forEach(async (example, index) => {
    take(index, await (await fetch(about.examples[example])).blob());
  });
}

async function start() {
  about = await (await fetch('page.json')).json();
  about.thresholds.forEach(({ far: rate }, i) => $('#far select').add(new Option(`1 in ${Math.round(1 / rate).toLocaleString('en')}`, i)));
  [far] = about.thresholds;
  $('#far').hidden = about.thresholds.length < 2;
  $('#about').textContent = about.text;
  if (about.backbone) askForBackbone(); else await load();
}

async function load(chosen) {
  const started = performance.now();
  await ask('load', { size: about.size, backbone: about.backbone, chosen });
  $('#progress').hidden = true;
  $('#examples').hidden = false;
  say($('#status'), `The model is ready (${((performance.now() - started) / 1000).toFixed(1)} s).`);
}

/** Asks for the file that the page may not hold, until it is the right one. */
function askForBackbone() {
  const section = $('#backbone'), input = $('input', section), note = $('.note', section);
  section.hidden = false;
  $('p', section).textContent = about.backbone.text;
  say($('#status'), 'The model waits for its backbone.');
  input.onchange = async () => {
    const [chosen] = input.files;
    if (!chosen) return;
    input.disabled = true;
    say(note, 'Reading the file …');
    try {
      await load(chosen);
      section.hidden = true;
    } catch (error) {
      say(note, error.message, true);
    }
    input.disabled = false;
    input.value = ''; // so that the same file can be chosen again
  };
}
start().catch((error) => say($('#status'), `The model could not be loaded: ${error.message}`, true));
