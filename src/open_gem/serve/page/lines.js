// The lines that reproduce what is seen: of the command line, and of Python.

/** One word for a POSIX shell. */
export const quote = (word) => (/^[\w%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

const literal = JSON.stringify; // a string or list of strings of JSON is one of Python too
const usual = (threshold) => threshold === 0.5;

/** A shell's lines: where the picture is a sample, the first gets it.
 *
 *  view: {file, origin, token, model: [name, pretrained?], size, phrases, pathways, threshold}; `origin` is where a sample
 *  comes from, else null, and `size` the rule by which images are resized, null for what the model recommends.
 */
export function shellLines({ file, origin, token, model: [name, pretrained], size, phrases, pathways, threshold }) {
  const header = token ? ' -H "Authorization: Bearer $OPEN_GEM_TOKEN"' : "";
  const words = ["open-gem", "ground", file.startsWith("-") ? `./${file}` : file];
  for (const phrase of phrases) words.push("-p", phrase.startsWith("@") ? ` ${phrase}` : phrase); // "@…" would be a file
  if (name !== "embedded") words.push("--model", name);
  if (pretrained) words.push("--pretrained", pretrained);
  if (size) words.push("--size", size);
  words.push("--pathway", pathways.join(","));
  if (!usual(threshold)) words.push("--threshold", String(threshold));
  words.push("--save", "overlay,mask,json");
  return [...(origin ? [`curl -s${header} -o ${quote(file)} ${quote(origin)}`] : []), words.map(quote).join(" ")].join("\n");
}

/** Python's lines. `view` as for the shell. */
export function pythonLines({ file, model: [name, pretrained], size, phrases, pathways, threshold }) {
  const loaded = [...(name === "embedded" ? [] : [literal(name)]), ...(pretrained ? [literal(pretrained)] : [])];
  if (size) loaded.push(`size=${literal(size)}`);
  const limit = usual(threshold) ? "" : threshold;
  return [
    "import open_gem",
    "",
    `localizer = open_gem.load(${loaded.join(", ")})`,
    `found = localizer.compare(${literal(file)}, ${list(phrases)}, ${list(pathways)})`,
    "for pathway, result in found.items():",
    "    print(pathway, result.presence, result.scores)",
    `    heatmaps, masks = result.heatmaps(), result.masks(${limit})`,
    `    points, boxes = result.points(), result.boxes(${limit})`,
  ].join("\n");
}

const list = (texts) => `[${texts.map((text) => literal(text)).join(", ")}]`;

/** A name without what no file should be called. */
export const fileName = (name) => name.replace(/[\\/\p{Cc}]/gu, "_").replace(/^\.+/, "") || "picture";
