// What is looked at and asked for: the image, the phrases, the methods, and the answers so far.
import { COLORS } from "./chips.js";

export const AT_ONCE = 16; // phrases asked for in one request
const KEPT = 2000; // answers kept of an image
const METHODS = ["clip", "gem"]; // compared by default: the paper in one glance; the last is the one shown alone

export const state = {
  model: null, // of GET /v1/models
  picture: null, // {blob, name, origin, bitmap, view, id, answers, painted}: see `newImage`
  phrases: [], // {text, color, sample}: those that are kept, and whether they came with a sample
  draft: "", // what is being typed
  chosen: null, // the kept phrase that is looked at
  methods: [...METHODS],
  typed: null, // when the phrase that is not painted yet was typed, in milliseconds
};

export const tidy = (text) => text.split(/\s+/).filter(Boolean).join(" ");
export const looked = () => state.draft || state.chosen;

const key = (method, text) => `${method}\n${text}`;
const freeColor = () => COLORS.find((color) => !state.phrases.some((phrase) => phrase.color === color)) ?? COLORS[state.phrases.length % COLORS.length];

/** An image that is not sent yet. `id` is the server's name for it, `refused` why the server does not
 *  take it, `painted` what each method showed last. */
export const newImage = (given) => ({ ...given, id: null, refused: null, lost: 0, answers: new Map(), painted: new Map() });

export function setModel(model) {
  const names = model.methods.map(({ name }) => name);
  const usual = METHODS.filter((name) => names.includes(name));
  state.model = model;
  state.methods = usual.length ? [usual.at(0), usual.at(-1)] : [names.at(0), names.at(-1)];
}

/** All phrases with a method's answers, the one that is being typed last: [{text, color, draft, answer, absent, chosen}];
 *  `answer` is null while it is awaited, and absent is whose presence is below `limit`. */
export function allPhrases(method, limit) {
  const kept = state.phrases.map(({ text, color }) => ({ text, color, draft: false }));
  const typed = state.draft && !kept.some(({ text }) => text === state.draft);
  const all = typed ? [...kept, { text: state.draft, color: freeColor(), draft: true }] : kept;
  return all.map((phrase) => {
    const answer = state.picture?.answers.get(key(method, phrase.text)) ?? null;
    const absent = Boolean(answer) && answer.presence !== null && answer.presence < limit;
    return { ...phrase, answer, absent, chosen: phrase.text === looked() };
  });
}

export function keepAnswer({ answers }, method, text, answer) {
  answers.set(key(method, text), answer);
  if (answers.size > KEPT) answers.delete(answers.keys().next().value);
}

export function keepPhrase(text, sample = false) {
  if (text && !state.phrases.some((phrase) => phrase.text === text)) state.phrases.push({ text, color: freeColor(), sample });
}

/** Keep what was typed; commas and ends of lines divide phrases. */
export function keepTyped(typed) {
  const texts = typed.split(/[,\n]/).map(tidy).filter(Boolean);
  for (const text of texts) keepPhrase(text);
  if (texts.length) state.chosen = texts.at(-1);
}

/** The phrases of a sample, in place of those of the sample before; what was typed stays. */
export function keepSamples(texts) {
  state.phrases = state.phrases.filter(({ sample }) => !sample);
  for (const text of texts) keepPhrase(text, true);
  if (!state.phrases.some(({ text }) => text === state.chosen)) state.chosen = state.phrases[0]?.text ?? null;
}

export function removePhrase(text) {
  state.phrases = state.phrases.filter((phrase) => phrase.text !== text);
  if (state.chosen === text) state.chosen = state.phrases.at(-1)?.text ?? null;
}
