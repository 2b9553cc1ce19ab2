// The lines that reproduce what is seen: of the command line, and of Python.

/** One word for a POSIX shell. */
export const quote = (word) => (/^[\w%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

const literal = JSON.stringify; // a string of JSON is one of Python too
const list = (texts) => `[${texts.map((text) => literal(text)).join(", ")}]`;
const usual = { threshold: 0.5, presence: 0.5, dtype: "float32", template: "a photo of a {}." }; // the defaults of the library
const options = { size: "image-size" }; // of the command line, where they are not called as the arguments of `load`

/** The arguments of `open_gem.load` that give the server's model, by name. */
function settingsOf({ name, size, dtype, template }) {
  const [, base, pretrained] = /^(.*?)(?:, (.*))?$/s.exec(name); // a name of open_clip goes with a tag or a file
  const settings = { model: base, pretrained, size };
  if (dtype && dtype !== usual.dtype) settings.dtype = dtype;
  if (template && template !== usual.template) settings.template = template;
  return Object.fromEntries(Object.entries(settings).filter(([, value]) => value));
}

/** The views that differ from the whole image at once: [[name, value]]. */
function viewsOf({ views }) {
  const whole = { window: null, stride: null, scales: "1", flip: false, merge: "features" };
  return Object.entries(views ?? {}).filter(([name, value]) => String(value) !== String(whole[name]));
}

/** A shell's lines: where images are samples, the first get them.
 *
 *  view: {file, origin, token, model, prompts, likes, methods, threshold, presence}; `origin` is where a sample comes from, else
 *  null, `model` as GET /v1/models has it, and `likes` the exemplars: [{text, file, box, origin}].
 */
export function shellLines({ file, origin, token, model, prompts, likes = [], methods, threshold, presence = usual.presence }) {
  if (Array.isArray(model.template)) return "# The command line takes one template, and this server has several: see Python.";
  const header = token ? ' -H "Authorization: Bearer $OPEN_GEM_TOKEN"' : "";
  const words = ["open-gem", "ground", file.startsWith("-") ? `./${file}` : file];
  for (const prompt of prompts) words.push("-p", prompt.startsWith("@") ? ` ${prompt}` : prompt); // "@…" would be a file
  for (const like of likes) words.push("--like", `${like.text}=${like.file}:${like.box}`);
  for (const [name, value] of Object.entries(settingsOf(model))) words.push(`--${options[name] ?? name}`, String(value));
  for (const [name, value] of viewsOf(model)) words.push(`--${name}`, ...(value === true ? [] : [String(value)]));
  words.push("--method", methods.join(","));
  for (const [name, value] of Object.entries({ threshold, presence })) if (value !== usual[name]) words.push(`--${name}`, String(value));
  words.push("--save", "overlay,mask,json");
  const samples = [{ file, origin }, ...likes].filter((image) => image.origin).map((image) => `curl -s${header} -o ${quote(image.file)} ${quote(image.origin)}`);
  return [...new Set(samples), words.map(quote).join(" ")].join("\n");
}

/** Python's lines. `view` as for the shell. */
export function pythonLines({ file, model, prompts, likes = [], methods, threshold }) {
  const { model: name, pretrained, ...settings } = settingsOf(model);
  const words = [name, pretrained].filter(Boolean).map((word) => literal(word));
  for (const [setting, value] of Object.entries(settings)) words.push(`${setting}=${Array.isArray(value) ? list(value) : literal(value)}`);
  const views = viewsOf(model).map(([name, value]) => `${name}=${value === true ? "True" : Array.isArray(value) ? `(${value},)` : literal(value)}`);
  if (views.length) words.push(`views=Views(${views.join(", ")})`);
  const exemplars = likes.map((like) => `Exemplar(${literal(like.file)}, (${like.box.join(", ")}), ${literal(like.text)})`);
  const wanted = [...prompts.map((text) => literal(text)), ...exemplars].join(", ");
  const limit = threshold === usual.threshold ? "" : threshold;
  return [
    "import open_gem",
    ...(likes.length ? ["from open_gem import Exemplar"] : []),
    ...(views.length ? ["from open_gem.images.views import Views"] : []),
    "",
    `localizer = open_gem.load(${words.join(", ")})`,
    `encoded = localizer.encode(${literal(file)}, ${list(methods)})`,
    `results = {method: localizer.locate(image, [${wanted}]) for method, image in encoded.items()}`,
    "for method, result in results.items():",
    "    print(method, result.presence, result.scores)",
    `    heatmaps, masks = result.heatmaps(), result.masks(${limit})`,
    `    points, boxes = result.points(), result.boxes(${limit})`,
  ].join("\n");
}

/** A name without what no file should be called. */
export const fileName = (name) => name.replace(/[\\/\p{Cc}]/gu, "_").replace(/^\.+/, "") || "image";
