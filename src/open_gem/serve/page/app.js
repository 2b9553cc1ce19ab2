// The page: what is wanted of the server, what is painted of its answers, and what people do.
import { Client, Loop } from "./api.js";
import { Chips, fillTable, sentence } from "./chips.js";
import { OPACITY, PRESENCE } from "./constants.js";
import { boxInImage, cropOf, mapOf, marksOf, pointInImage, viewOf } from "./draw.js";
import { fileName, pythonLines, shellLines } from "./lines.js";
import { decodeHalf } from "./maps.js";
import { Stage } from "./stage.js";
import { allPrompts, asked, forget, keepAnswer, keepBox, keepPrompt, keepSamples, keepTyped, looked, newImage, removePrompt, setModel, state, tidy, together } from "./state.js";
import { copyText, saveJson, savePng } from "./take.js";
import { askToken } from "./token.js";

const SETTLED = 100, PAUSE = 500; // milliseconds without a change: until the table is filled, until words are spoken
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

const number = (id) => Number($(id).value);
const boxes = all("input[type=checkbox]"), outputs = all("output");
const switches = () => Object.fromEntries(boxes.map(({ name, checked }) => [name, checked]));
const settings = () => ({ show: switches(), threshold: number("threshold"), opacity: number("opacity") });
const promptsOf = (method) => allPrompts(method, number("limit"));
const shownMethods = () => (switches().compare ? state.methods : state.methods.slice(-1));

const client = new Client(askToken);
const loop = new Loop({ next: nextRequest, waiting, failed });
const chips = new Chips($("chips"), $("chip"), { choose, remove });
const stage = new Stage($("panels"), $("panel"), { chooseMethod, draws, drawn, say: tell });

// What is wanted of the server -----------------------------------------------------------------------------------------

/** The most wanted request, or null: see `Loop`. */
function nextRequest() {
  const { image } = state;
  if (!image || image.refused || !state.model) return null;
  if (!image.id) return (signal) => upload(image, signal);
  const lost = state.prompts.find(({ like }) => like && !like.image.id && !like.image.refused);
  if (lost) return (signal) => upload(lost.like.image, signal);
  for (const method of shownMethods()) {
    const missing = promptsOf(method).filter(({ answer }) => !answer);
    missing.sort((first, second) => second.chosen - first.chosen);
    const wanted = together(image.singly ? missing.slice(0, 1) : missing);
    if (wanted.length) return (signal) => ask(image, method, wanted, signal);
  }
  return null;
}

async function upload(image, signal) {
  say("Sending the image …");
  try {
    const { id, height, width } = await client.upload(image.blob, image.name, signal);
    const { image: size } = image.view;
    if (height !== size.height || width !== size.width) image.view = viewOf(image.bitmap, { height, width });
    image.id = id;
    say("");
  } catch (error) {
    if ([400, 413, 415, 422].includes(error.status)) image.refused = error.message;
    throw error;
  } finally {
    refresh();
  }
}

async function ask(image, method, prompts, signal) {
  try {
    const wanted = { prompts: asked(prompts), method, objects: false, similarity: true };
    const { grid, labels } = await client.ground(image.id, wanted, signal);
    labels.forEach((label, index) => keepAnswer(image, method, prompts[index].text, answerFrom(label, grid)));
    image.lost = 0;
    if (state.typed === null) say("");
  } catch (error) {
    if (error.status === 404 && ++image.lost < 3) forget(image, prompts);
    else if (![400, 413, 422].includes(error.status)) throw error;
    else if (prompts.length > 1) image.singly = true; // one of them is at fault: which?
    else keepAnswer(image, method, prompts[0].text, { error: error.message, presence: null });
  }
  refresh();
}

function answerFrom({ score, presence, similarity }, [rows, cols]) {
  return { score, presence, grid: { rows, cols, values: decodeHalf(similarity) } };
}

function waiting({ message, retryAfter }) {
  say(`${message} Trying again in ${retryAfter} s.`);
}

let stuck = false; // nothing is asked any more until somebody does something

function failed(error) {
  stuck = true;
  show();
  complain(error.message, state.image?.refused ? null : refresh);
}

// What is seen ---------------------------------------------------------------------------------------------------------

let scheduled = false;

/** Paint in the next frame, and ask for what is missing. */
function refresh() {
  stuck = false;
  if (!scheduled) requestAnimationFrame(show);
  scheduled = true;
  loop.poke();
}

function show() {
  scheduled = false;
  for (const output of outputs) output.value = number(output.htmlFor.value).toFixed(2);
  const main = promptsOf(shownMethods().at(-1));
  chips.update(main);
  const { image } = state;
  for (const sample of all("#samples button")) sample.setAttribute("aria-pressed", sample.value === image?.origin);
  $("limit-row").hidden = main.some(({ answer }) => answer?.presence === null && !answer.error);
  $("caution").hidden = !image || image.origin !== null || !$("caution").textContent; // a sample is no photograph
  $("empty").hidden = Boolean(image);
  $("panels").hidden = !image;
  $("panels").dataset.image = image?.name ?? "";
  $("results").hidden = !image || Boolean(image.refused) || !main.length;
  if (!image || !state.model) return;
  const shown = shownMethods().map((method) => panelOf(method, image.view));
  stage.update(image.view, shown, settings());
  if (shown.every(({ chosen }) => chosen?.answer)) painted();
  showLines();
  showTable(shown);
}

/** What one method shows of the image. While a prompt is awaited, the one before stays. */
function panelOf(method, view) {
  const { painted } = state.image;
  const others = promptsOf(method);
  const chosen = others.find((prompt) => prompt.chosen) ?? null;
  if (chosen?.answer) painted.set(method, chosen);
  const heated = chosen && !chosen.answer ? painted.get(method) : chosen;
  const seen = others.filter(({ answer }) => answer?.grid);
  const marked = seen.filter(({ text, absent }) => !absent && (text === heated?.text || switches().all));
  if (heated?.answer.grid && !heated.absent && !marked.some(({ text }) => text === heated.text)) marked.push(heated);
  return {
    method,
    others,
    chosen,
    refused: state.image.refused,
    heat: heated?.answer.grid ? { map: mapOf(view, heated.answer), absent: heated.absent } : null,
    marks: marked.map(({ answer, color }) => ({ map: mapOf(view, answer), color })),
  };
}

/** The prompts that a method has answered, with point and best box in pixels of the image. */
function rowsOf(method, prompts) {
  const { view } = state.image, threshold = number("threshold");
  return prompts.filter(({ answer }) => answer).map((prompt) => {
    const marks = prompt.answer.grid && !prompt.absent ? marksOf(mapOf(view, prompt.answer), threshold) : null;
    return { ...prompt, method, box: marks?.boxes[0] && boxInImage(marks.boxes[0].box, view), point: marks && pointInImage(marks.point, view) };
  });
}

let filling = 0;

/** Fill the table once nothing has changed for a moment: it needs the maps of all prompts, the image that of one. */
function showTable(shown) {
  clearTimeout(filling);
  $("results").ariaBusy = "true";
  filling = setTimeout(() => {
    const rows = shown.flatMap(({ method, others }) => rowsOf(method, others));
    fillTable($("results").querySelector("tbody"), rows);
    const complete = shown.every(({ others }) => others.every(({ answer }) => answer));
    if (!complete && !stuck) return; // there is more to come
    $("results").ariaBusy = "false";
    if (complete) announce(rows.filter(({ chosen }) => chosen).slice(-1));
  }, SETTLED);
}

function showLines() {
  const { name, origin } = state.image, threshold = number("threshold");
  const kept = promptsOf(""), methods = [...new Set(shownMethods())];
  const prompts = kept.filter(({ like }) => !like).map(({ text }) => text);
  const likes = kept.filter(({ like }) => like).map(({ text, like: { image, box } }) => ({ text, box, file: image.name, origin: image.origin }));
  const lines = { file: name, origin, token: client.token, model: state.model, prompts, likes, methods, threshold, presence: number("limit") };
  $("cli").textContent = shellLines(lines);
  $("python").textContent = pythonLines(lines);
}

/** What was typed is in the frame that follows: take the time once it is on the screen. */
function painted() {
  if (state.typed === null) return;
  const start = state.typed, text = looked();
  state.typed = null;
  const channel = new MessageChannel();
  channel.port1.onmessage = () => {
    const { duration } = performance.measure("prompt to image", { start, end: performance.now(), detail: text });
    say(`${Math.round(duration)} ms from the last letter to the image`);
  };
  channel.port2.postMessage(null);
}

function say(text) {
  $("status").textContent = text;
}

let speaking = 0, spoken = "";

/** Tell those who hear the page, once typing pauses. */
function announce(rows) {
  clearTimeout(speaking);
  const text = rows.map(sentence).join(" ");
  speaking = setTimeout(() => text !== spoken && tell((spoken = text)), PAUSE);
}

function tell(text) {
  $("live").textContent = text;
}

function complain(message, again = null) {
  $("trouble").hidden = false;
  $("trouble").querySelector("p").textContent = message;
  $("retry").hidden = !again;
  $("retry").onclick = () => (calm(), again());
  say("");
}

function calm() {
  $("trouble").hidden = true;
}

// Images ---------------------------------------------------------------------------------------------------------------

let latest = null; // the image that was asked for last: one that is decoded later must not take its place

/** Look at an image: `name` as its file is called, `origin` where a sample can be had, else null. */
async function look(blob, name, origin = null) {
  let bitmap;
  latest = blob;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return complain(`${name} is not an image that this browser can show.`);
  }
  if (latest !== blob) return bitmap.close();
  calm();
  loop.abort();
  state.image?.bitmap.close();
  state.image = newImage({ blob, name: fileName(name), origin, bitmap, view: viewOf(bitmap, bitmap) });
  stage.move(null);
  return refresh();
}

function lookAtFiles(files) {
  const [file] = files;
  return file ? look(file, file.name || "image.png") : complain("That is no image file. Save the image first, then drop or pick the file.");
}

async function offerSamples() {
  $("samples").replaceChildren();
  for (const { name, labels } of await client.samples()) {
    const blob = await client.sample(name);
    const file = /\.\w+$/.test(name) ? name : `${name}.png`;
    const origin = new URL(`v1/samples/${encodeURIComponent(name)}`, location.href).href;
    const button = Object.assign(document.createElement("button"), { type: "button", title: labels.join(", ") });
    button.setAttribute("aria-label", `Sample scene: ${labels.join(", ")}`);
    button.append(Object.assign(new Image(), { src: URL.createObjectURL(blob), alt: "", width: 72, height: 72 }));
    button.value = origin;
    button.addEventListener("click", () => (keepSamples(labels), look(blob, file, origin)));
    const item = document.createElement("li");
    item.append(button);
    $("samples").append(item);
  }
}

// What people do -------------------------------------------------------------------------------------------------------

function typing(event) {
  const parts = $("prompt").value.split(/[,\n]/), before = looked();
  if (parts.length > 1) {
    keepTyped(parts.slice(0, -1).join(","));
    $("prompt").value = parts.at(-1).trimStart();
  }
  state.draft = tidy(parts.at(-1));
  if (!state.draft) state.typed = null;
  else if (looked() !== before) state.typed = event.timeStamp;
  refresh();
}

function keepDraft(event) {
  event.preventDefault();
  keepPrompt(state.draft);
  if (state.draft) state.chosen = state.draft;
  state.draft = $("prompt").value = "";
  refresh();
}

function choose(text) {
  if (text === state.draft) return $("prompt").focus();
  state.draft = $("prompt").value = "";
  state.chosen = text;
  return refresh();
}

function remove(text) {
  if (text === state.draft) state.draft = $("prompt").value = "";
  removePrompt(text);
  refresh();
}

function chooseMethod(index, name) {
  state.methods[index + (switches().compare ? 0 : 1)] = name;
  refresh();
}

const orComplain = (work) => async () => {
  try {
    await work();
  } catch (error) {
    complain(error.message, orComplain(work));
  }
};

/** Whether dragging draws a box: a finger scrolls the page, unless it is to draw. */
function draws(pointerType) {
  return pointerType === "mouse" || switches().draw;
}

/** A box was drawn in the image; its sides are shares of width and height. */
function drawn(sides) {
  const { image } = state;
  if (!image.id) return say("The server does not have the image yet: draw the box again.");
  const { width, height } = image.view.image, [left, top, right, bottom] = sides;
  const box = [Math.floor(left * width), Math.floor(top * height), Math.ceil(right * width), Math.ceil(bottom * height)];
  keepBox(image, box, cropOf(image.bitmap, sides));
  state.draft = $("prompt").value = "";
  return refresh();
}

/** Whether something else than text is dragged: a file, or an image of another page, which comes as a link. */
const isImage = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");

/** The server's document; where it no longer has the image, it gets it again before the next try. */
async function takeJson() {
  const { image } = state, prompts = promptsOf("");
  try {
    if (!image.id) throw new Error("The server does not have the image yet.");
    await saveJson(client, image, prompts, new Set(shownMethods()), { threshold: number("threshold"), presence: number("limit") });
  } catch (error) {
    if (error.status === 404) forget(image, prompts);
    refresh();
    throw error;
  }
}

function listen() {
  $("prompt").addEventListener("input", typing);
  $("add").addEventListener("submit", keepDraft);
  $("prompt").addEventListener("keydown", (event) => event.key === "Backspace" && !event.target.value && !event.repeat && state.prompts.length && remove(state.prompts.at(-1).text));
  for (const control of all("input[type=checkbox], input[type=range]")) control.addEventListener("input", refresh);
  $("file").addEventListener("change", ({ target }) => (lookAtFiles(target.files), (target.value = "")));
  document.addEventListener("paste", (event) => event.clipboardData.files.length && (event.preventDefault(), lookAtFiles(event.clipboardData.files)));
  document.addEventListener("dragover", (event) => isImage(event) && (event.preventDefault(), ($("dropping").hidden = false)));
  document.addEventListener("dragleave", (event) => event.relatedTarget || ($("dropping").hidden = true));
  document.addEventListener("drop", (event) => isImage(event) && (event.preventDefault(), ($("dropping").hidden = true), lookAtFiles(event.dataTransfer.files)));
  $("token").addEventListener("cancel", (event) => event.preventDefault());
  $("dismiss").addEventListener("click", calm);
  $("png").addEventListener("click", orComplain(() => savePng(state.image, (view) => shownMethods().map((method) => panelOf(method, view)), settings())));
  $("json").addEventListener("click", orComplain(takeJson));
  for (const button of all(".copy")) button.addEventListener("click", () => (copyText($(button.dataset.copies), button), tell("Copied")));
}

async function start() {
  const { models } = await client.models();
  setModel(models[0]);
  stage.offer(state.model.methods);
  $("model").textContent = `Model: ${state.model.name}`;
  $("caution").textContent = state.model.warnings.map((warning) => `Note: ${warning}.`).join(" ");
  refresh();
  await offerSamples();
}

$("limit").value = PRESENCE;
$("opacity").value = OPACITY;
listen();
refresh();
orComplain(start)();
