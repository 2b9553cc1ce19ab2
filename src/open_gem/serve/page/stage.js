// The panels: one image per method, and the probe that reads values off all of them at the same place.
import { mapOf, paint } from "./draw.js";
import { stretch, valueAt } from "./maps.js";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }; // in patches

export class Stage {
  /** `chooseMethod(index, name)` when a panel is to show another method, `say(text)` for those who hear the page. */
  constructor(place, template, { chooseMethod, say }) {
    Object.assign(this, { place, template, chooseMethod, say, panels: [], probe: null, methods: [] });
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
    canvas.addEventListener("pointerdown", (event) => this.point(canvas, event));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.move(null));
    canvas.addEventListener("keydown", (event) => this.step(event, index));
    return panel;
  }

  fill(panel, { method, chosen, refused, heat, marks }, settings) {
    const select = panel.querySelector("select"), canvas = panel.querySelector("canvas");
    select.value = method;
    select.title = this.methods.find(({ name }) => name === method)?.about ?? "";
    const drawn = [this.view, heat?.map, heat?.absent, JSON.stringify(settings), ...marks.flatMap(({ map, color }) => [map, color])];
    if (!isSame(drawn, panel.drawn)) paint(canvas, this.view, { ...settings, heat, marks });
    panel.drawn = drawn;
    panel.querySelector(".canvas").style.setProperty("--ratio", this.view.width / this.view.height);
    const caption = refused ?? captionOf(chosen);
    panel.querySelector(".caption").textContent = caption;
    canvas.setAttribute("aria-label", `${method}. ${caption} Arrow keys read values off the image.`);
    canvas.dataset.shows = chosen?.answer ? chosen.text : "";
  }

  // The probe ---------------------------------------------------------------------------------------------------------

  point(canvas, event) {
    const frame = canvas.getBoundingClientRect();
    const at = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    this.move(at.every((share) => share >= 0 && share < 1) ? at : null);
  }

  step(event, index) {
    if (event.key === "Escape") this.move(null);
    const step = STEPS[event.key], grid = gridOf(this.shown[index]);
    if (!step || !grid) return;
    event.preventDefault();
    const [cols, rows] = [grid.cols, grid.rows];
    const patch = this.probe ? [Math.floor(this.probe[0] * cols) + step[0], Math.floor(this.probe[1] * rows) + step[1]] : [cols >> 1, rows >> 1];
    const inside = [Math.min(Math.max(patch[0], 0), cols - 1), Math.min(Math.max(patch[1], 0), rows - 1)];
    this.move([(inside[0] + 0.5) / cols, (inside[1] + 0.5) / rows]);
    this.say(this.panels[index].querySelector(".readout").textContent);
  }

  move(at) {
    this.probe = at;
    this.read();
  }

  /** Write down, below each panel, what is where the probe is. */
  read() {
    this.panels.forEach((panel, index) => {
      const cross = panel.querySelector(".probe");
      cross.hidden = !this.probe;
      panel.querySelector(".readout").textContent = this.probe ? this.reading(this.shown[index]) : "Point at the image to read values.";
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

const gridOf = ({ others }) => others.find(({ answer }) => answer?.grid)?.answer.grid;

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
