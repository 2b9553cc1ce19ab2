// To take away: a PNG, a JSON, lines to copy.
import { brief } from "./chips.js";
import { paint, toPng, viewOf } from "./draw.js";
import { asked, together } from "./state.js";

/** What is seen, as large as the image is. `panels(view)` gives what each method shows on a view. */
export async function savePng({ bitmap, view: { image }, name }, panels, settings) {
  const view = viewOf(bitmap, image, false);
  const shown = panels(view);
  const canvases = shown.map(({ heat, marks }) => {
    const canvas = new OffscreenCanvas(view.width, view.height);
    paint(canvas, view, { ...settings, heat, marks });
    return canvas;
  });
  download(await toPng(canvases, shown.map(captionOf)), name, "png");
}

function captionOf({ method, chosen }) {
  const said = chosen?.answer && brief(chosen.answer) + (chosen.absent ? ", absent" : "");
  return [method, chosen?.text, said].filter(Boolean).join(" · ");
}

/** The server's own answers at this threshold, with masks, so that numbers are the library's. */
export async function saveJson(client, { id, name }, prompts, methods, { threshold, presence }) {
  const answers = [];
  for (const method of methods) {
    for (let left = prompts, batch; left.length; left = left.filter((prompt) => !batch.includes(prompt))) {
      batch = together(left);
      answers.push(await client.ground(id, { prompts: asked(batch), method, threshold, presence, refine: "none", mask: "rle", similarity: true }));
    }
  }
  const document = JSON.stringify({ image: name, threshold, presence, answers }, null, 1);
  download(new Blob([document], { type: "application/json" }), name, "json");
}

function download(blob, name, ending) {
  const href = URL.createObjectURL(blob);
  const stem = name.replace(/\.\w+$/, "");
  Object.assign(document.createElement("a"), { href, download: `${stem}.open_gem.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** Copy an element's text; `button` says that it was done. */
export async function copyText(element, button) {
  try {
    await navigator.clipboard.writeText(element.textContent);
  } catch { // no clipboard for pages that are not on a secure origin
    getSelection().selectAllChildren(element);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
