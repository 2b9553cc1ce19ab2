// What is looked at and asked for: the image, the prompts, the methods, and the answers so far.
import { LABELS } from "./constants.js";

export const AT_ONCE = 16; // prompts asked for in one request
const KEPT = 2000; // answers kept of an image
const METHODS = ["clip", "gem"]; // compared by default: the paper in one glance; the last is the one shown alone

export const state = {
  model: null, // of GET /v1/models
  image: null, // {blob, name, origin, bitmap, view, id, answers, painted}: see `newImage`
  prompts: [], // {text, color, sample}: those that are kept, and whether they came with a sample
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

/** All prompts with a method's answers, the one that is being typed last: [{text, color, draft, answer, absent, chosen}];
 *  `answer` is null while it is awaited, and absent is whose presence is below `limit`. */
export function allPrompts(method, limit) {
  const kept = state.prompts.map(({ text, color }) => ({ text, color, draft: false }));
  const typed = state.draft && !kept.some(({ text }) => text === state.draft);
  const all = typed ? [...kept, { text: state.draft, color: freeColor(), draft: true }] : kept;
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

export function keepPrompt(text, sample = false) {
  if (text && !state.prompts.some((prompt) => prompt.text === text)) state.prompts.push({ text, color: freeColor(), sample });
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
