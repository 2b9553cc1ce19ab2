// The panels: one image per method, and the probe that reads values off all of them at the same place.
import { mapOf, paint } from "./draw.js";
import { stretch, valueAt } from "./maps.js";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }; // in patches
const CLICK = 0.02; // share of the image's sides that a drag needs to be a box
const LAST = 1 - 1e-6; // the end of a side, still on the image

export class Stage {
  /** `chooseMethod(index, name)` when a panel is to show another method, `drawn(sides)` when a box was drawn,
   *  `draws(pointerType)` whether a pointer draws, `say(text)` for those who hear the page. */
  constructor(place, template, { chooseMethod, draws, drawn, say }) {
    Object.assign(this, { place, template, chooseMethod, draws, drawn, say, panels: [], probe: null, corner: null, methods: [] });
  }

  /** The methods there are: [{name, about}]. */
  offer(methods) {
    this.methods = methods;
    this.place.replaceChildren();
    this.panels = [];
  }

  /** Show an image's view, one panel for each of `shown`:
   *  [{method, chosen, others, refused, heat, marks}], `chosen` the prompt that is looked at with its answer, or null, and
   *  `refused` why the server does not take the image, or null. */
  update(view, shown, settings) {
    this.shown = shown;
    this.view = view;
    this.place.classList.toggle("two", shown.length > 1);
    while (this.panels.length > shown.length) this.panels.pop().remove();
    while (this.panels.length < shown.length) this.panels.push(this.place.appendChild(this.make(this.panels.length)));
    shown.forEach((panel, index) => this.fill(this.panels[index], panel, settings));
    this.read();
  }

  make(index) {
    const panel = this.template.content.firstElementChild.cloneNode(true);
    const select = panel.querySelector("select"), canvas = panel.querySelector("canvas");
    select.append(...this.methods.map(({ name, about }) => Object.assign(new Option(name, name), { title: about ?? "" })));
    select.addEventListener("change", () => this.chooseMethod(index, select.value));
    canvas.addEventListener("pointermove", (event) => this.point(canvas, event));
    canvas.addEventListener("pointerdown", (event) => this.press(canvas, event));
    canvas.addEventListener("pointerup", () => this.finish());
    canvas.addEventListener("pointercancel", () => this.move(null));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.move(null));
    canvas.addEventListener("keydown", (event) => this.step(event, index));
    return panel;
  }

  fill(panel, { method, chosen, refused, heat, marks }, settings) {
    const select = panel.querySelector("select"), canvas = panel.querySelector("canvas");
    select.value = method;
    select.title = this.methods.find(({ name }) => name === method)?.about ?? "";
    const inputs = [this.view, heat?.map, heat?.absent, JSON.stringify(settings), ...marks.flatMap(({ map, color }) => [map, color])];
    if (!isSame(inputs, panel.inputs)) paint(canvas, this.view, { ...settings, heat, marks });
    panel.inputs = inputs;
    panel.querySelector(".canvas").style.setProperty("--ratio", this.view.width / this.view.height);
    const caption = refused ?? captionOf(chosen);
    panel.querySelector(".caption").textContent = caption;
    canvas.setAttribute("aria-label", `${method}. ${caption} Arrow keys read values off the image, Enter begins and ends a box to look for.`);
    canvas.dataset.shows = chosen?.answer ? chosen.text : "";
  }

  // The probe ---------------------------------------------------------------------------------------------------------

  point(canvas, event) {
    const frame = canvas.getBoundingClientRect();
    const at = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    if (this.corner) this.move(at.map((share) => Math.min(Math.max(share, 0), LAST)));
    else this.move(at.every((share) => share >= 0 && share < 1) ? at : null);
  }

  press(canvas, event) {
    this.corner = null;
    this.point(canvas, event);
    if (event.button !== 0 || !this.draws(event.pointerType)) return;
    canvas.setPointerCapture(event.pointerId);
    this.corner = this.probe;
  }

  /** End the box; one that is too small was a click. */
  finish() {
    const box = this.box();
    this.corner = null;
    this.read();
    if (box && box[2] - box[0] > CLICK && box[3] - box[1] > CLICK) this.drawn(box);
  }

  /** The box that is being drawn, from its first corner to the probe: left, top, right, bottom as shares; or null. */
  box() {
    const sides = (extreme) => this.corner.map((side, axis) => extreme(side, this.probe[axis]));
    return this.corner && [...sides(Math.min), ...sides(Math.max)];
  }

  step(event, index) {
    if (event.key === "Escape") this.move(null);
    if (event.key === "Enter" && this.corner) return this.finish();
    if (event.key === "Enter" && this.probe) {
      this.corner = this.probe;
      return this.say("A box begins here. Enter at its other corner ends it.");
    }
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const { cols, rows } = gridOf(this.shown[index]);
    const patch = this.probe ? [Math.floor(this.probe[0] * cols) + step[0], Math.floor(this.probe[1] * rows) + step[1]] : [cols >> 1, rows >> 1];
    const inside = [Math.min(Math.max(patch[0], 0), cols - 1), Math.min(Math.max(patch[1], 0), rows - 1)];
    this.move([(inside[0] + 0.5) / cols, (inside[1] + 0.5) / rows]);
    this.say(this.panels[index].querySelector(".readout").textContent);
  }

  move(at) {
    this.probe = at;
    if (!at) this.corner = null;
    this.read();
  }

  /** Write down, below each panel, what is where the probe is. */
  read() {
    this.panels.forEach((panel, index) => {
      const cross = panel.querySelector(".probe"), band = panel.querySelector(".band"), box = this.box();
      cross.hidden = !this.probe;
      band.hidden = !box;
      if (box) ["--left", "--top", "--right", "--bottom"].forEach((side, index) => band.style.setProperty(side, box[index]));
      panel.querySelector(".readout").textContent = this.probe ? this.reading(this.shown[index]) : "Point at the image to read values; drag a box to look for what it shows.";
      if (!this.probe) return;
      cross.style.setProperty("--x", this.probe[0]);
      cross.style.setProperty("--y", this.probe[1]);
    });
  }

  reading({ chosen, others }) {
    const { width, height } = this.view.image;
    const words = [`x ${Math.floor(this.probe[0] * width)}, y ${Math.floor(this.probe[1] * height)}`];
    if (chosen?.answer?.grid) {
      const value = valueAt(chosen.answer.grid, this.probe);
      const { low, gain } = stretch(mapOf(this.view, chosen.answer));
      const heat = Math.min(Math.max((value - low) * gain, 0), 1);
      words.push(`${chosen.text} ${value.toFixed(3)} (heat ${heat.toFixed(2)})`);
    }
    const nearest = nearestOf(others, this.probe);
    if (nearest) words.push(`most similar: ${nearest.text} ${nearest.value.toFixed(3)}`);
    return words.join(" · ");
  }
}

const gridOf = ({ others }) => others.find(({ answer }) => answer?.grid)?.answer.grid ?? { rows: 16, cols: 16 };

const isSame = (values, others = []) => values.length === others.length && values.every((value, index) => value === others[index]);

/** The prompt that is most similar at a place. */
function nearestOf(prompts, at) {
  const values = prompts.filter(({ answer }) => answer?.grid).map(({ text, answer }) => ({ text, value: valueAt(answer.grid, at) }));
  return values.reduce((best, next) => (best && best.value >= next.value ? best : next), null);
}

function captionOf(chosen) {
  if (!chosen) return "No prompt yet.";
  const { text, answer, absent } = chosen;
  if (!answer) return `Looking for “${text}” …`;
  if (answer.error) return answer.error;
  const best = Math.max(...answer.grid.values).toFixed(3);
  return absent ? `“${text}” is absent. Light shows where the image is most similar (${best}).` : `“${text}”, highest similarity ${best}.`;
}
