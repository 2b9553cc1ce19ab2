// What is looked at and asked for: the image, the prompts, the methods, and the answers so far.
import { LABELS } from "./constants.js";

export const AT_ONCE = 16; // prompts asked for in one request
const KEPT = 2000; // answers kept of an image
const METHODS = ["clip", "gem"]; // compared by default: the paper in one glance; the last is the one shown alone

export const state = {
  model: null, // of GET /v1/models
  image: null, // {blob, name, origin, bitmap, view, id, answers, painted}: see `newImage`
  prompts: [], // {text, color, sample, like}: those that are kept, whether they came with a sample, and what was drawn: see `keepBox`
  draft: "", // what is being typed
  chosen: null, // the kept prompt that is looked at
  methods: [...METHODS],
  typed: null, // when the prompt that is not painted yet was typed, in milliseconds
};

export const tidy = (text) => text.split(/\s+/).filter(Boolean).join(" ");
export const looked = () => state.draft || state.chosen;

const key = (method, text) => `${method}\n${text}`;
const freeColor = () => LABELS.find((color) => !state.prompts.some((prompt) => prompt.color === color)) ?? LABELS[state.prompts.length % LABELS.length];

/** An image that is not sent yet. `id` is the server's name for it, `refused` why the server does not
 *  take it, `painted` what each method showed last. */
export const newImage = (decoded) => ({ ...decoded, id: null, refused: null, lost: 0, answers: new Map(), painted: new Map() });

export function setModel(model) {
  const names = model.methods.map(({ name }) => name);
  const usual = METHODS.filter((name) => names.includes(name));
  state.model = model;
  state.methods = usual.length ? [usual.at(0), usual.at(-1)] : [names.at(0), names.at(-1)];
}

/** All prompts with a method's answers, the one that is being typed last: [{text, color, like, draft, answer, absent, chosen}];
 *  `answer` is null while it is awaited, and absent is whose presence is below `limit`. */
export function allPrompts(method, limit) {
  const kept = state.prompts.map(({ text, color, like }) => ({ text, color, like, draft: false }));
  const typed = state.draft && !kept.some(({ text }) => text === state.draft);
  const all = typed ? [...kept, { text: state.draft, color: freeColor(), like: null, draft: true }] : kept;
  return all.map((prompt) => {
    const answer = state.image?.answers.get(key(method, prompt.text)) ?? null;
    const absent = Boolean(answer) && answer.presence !== null && answer.presence < limit;
    return { ...prompt, answer, absent, chosen: prompt.text === looked() };
  });
}

export function keepAnswer({ answers }, method, text, answer) {
  answers.set(key(method, text), answer);
  if (answers.size > KEPT) answers.delete(answers.keys().next().value);
}

export function keepPrompt(text, sample = false, like = null) {
  if (text && !state.prompts.some((prompt) => prompt.text === text)) state.prompts.push({ text, color: freeColor(), sample, like });
}

let boxes = 0; // drawn so far: a number is used once, for answers are kept by text

/** Keep a box in an image as a prompt, an exemplar: it goes on to other images, so it has what is needed to send its own again.
 *  `box` is in pixels, `crop` the address of a small image of it. */
export function keepBox({ blob, name, origin, id, view }, box, crop) {
  const { height, width } = view.image; // of a bitmap that will be closed
  state.chosen = `box ${++boxes} in ${name}`;
  keepPrompt(state.chosen, false, { image: { blob, name, origin, id, view: { image: { height, width } } }, box, crop });
}

/** The first of these prompts that one request takes: texts together, an exemplar by itself. */
export const together = (prompts) => (prompts[0]?.like ? prompts.slice(0, 1) : prompts.filter(({ like }) => !like).slice(0, AT_ONCE));

/** The prompts of one request, as the server reads them. */
export const asked = (prompts) => {
  const [{ text, like }] = prompts;
  return like ? { [text]: [{ like: like.image.id, box: like.box }] } : prompts.map((prompt) => prompt.text);
};

/** The server no longer has an image, or that of an exemplar among these prompts: both are sent again. */
export function forget(image, prompts) {
  for (const gone of [image, ...prompts.flatMap(({ like }) => like?.image ?? [])]) gone.id = null;
}

/** Keep what was typed; commas and ends of lines divide prompts. */
export function keepTyped(typed) {
  const texts = typed.split(/[,\n]/).map(tidy).filter(Boolean);
  for (const text of texts) keepPrompt(text);
  if (texts.length) state.chosen = texts.at(-1);
}

/** The prompts of a sample, in place of those of the sample before; what was typed stays. */
export function keepSamples(texts) {
  state.prompts = state.prompts.filter(({ sample }) => !sample);
  for (const text of texts) keepPrompt(text, true);
  if (!state.prompts.some(({ text }) => text === state.chosen)) state.chosen = state.prompts[0]?.text ?? null;
}

export function removePrompt(text) {
  state.prompts = state.prompts.filter((prompt) => prompt.text !== text);
  if (state.chosen === text) state.chosen = state.prompts.at(-1)?.text ?? null;
}
