// Prompts as chips with colours, and the table of results.

const percent = (share) => `${Math.round(100 * share)} %`;
const number = (value) => (value === null || value === undefined ? "" : value.toFixed(3));

/** What is said of an answer in a few letters: its presence, else its score. */
export const brief = (answer) => (answer.error ? "!" : answer.presence === null ? number(answer.score) : percent(answer.presence));

/** The list of chips, which keeps its elements, and with them the focus. */
export class Chips {
  constructor(list, template, { choose, remove }) {
    Object.assign(this, { list, template, choose, remove, items: new Map() });
  }

  /** prompts: [{text, color, like, draft, chosen, absent, answer}], `answer` null while it is awaited. */
  update(prompts) {
    const texts = new Set(prompts.map(keyOf));
    for (const [key, item] of this.items) if (!texts.has(key)) this.drop(key, item);
    prompts.forEach((prompt, index) => {
      const item = this.items.get(keyOf(prompt)) ?? this.make(prompt);
      if (this.list.children[index] !== item) this.list.insertBefore(item, this.list.children[index] ?? null);
      this.fill(item, prompt);
    });
  }

  make(prompt) {
    const item = this.template.content.firstElementChild.cloneNode(true);
    item.querySelector(".choose").addEventListener("click", () => this.choose(item.prompt));
    item.querySelector(".remove").addEventListener("click", () => this.removeAt(item));
    item.addEventListener("keydown", (event) => {
      if (event.key === "Delete" || event.key === "Backspace") this.removeAt(item);
    });
    this.items.set(keyOf(prompt), item);
    return item;
  }

  fill(item, { text, color, like, draft, chosen, absent, answer }) {
    item.prompt = text;
    item.style.setProperty("--color", `rgb(${color.join(" ")})`);
    item.style.setProperty("--presence", absent ? 0 : (answer?.presence ?? 0));
    item.classList.toggle("draft", draft);
    item.classList.toggle("absent", absent);
    item.classList.toggle("awaited", !answer);
    item.classList.toggle("failed", Boolean(answer?.error));
    const choose = item.querySelector(".choose");
    choose.setAttribute("aria-pressed", chosen);
    choose.title = answer ? (answer.error ?? `image score ${number(answer.score)}`) : "";
    choose.querySelector(".text").textContent = text;
    const crop = choose.querySelector(".crop");
    crop.hidden = !like;
    if (like && crop.src !== like.crop) crop.src = like.crop;
    choose.querySelector(".presence").textContent = answer ? (absent ? `${brief(answer)} · absent` : brief(answer)) : "…";
    item.querySelector(".remove").setAttribute("aria-label", `Remove ${text}`);
  }

  /** Remove a chip; the focus goes on to the one that follows. */
  removeAt(item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    const focused = item.contains(document.activeElement);
    this.remove(item.prompt);
    if (focused) (next?.querySelector(".choose") ?? document.getElementById("prompt")).focus();
  }

  drop(key, item) {
    item.remove();
    this.items.delete(key);
  }
}

const keyOf = ({ text, draft }) => (draft ? "" : text); // the draft keeps its chip while it is being typed

/** rows: [{text, method, absent, answer, box, point}] into the body of a table. */
export function fillTable(body, rows) {
  body.replaceChildren(
    ...rows.map(({ text, method, absent, answer, box, point }) => {
      const row = document.createElement("tr");
      row.classList.toggle("absent", absent);
      const heading = document.createElement("th");
      heading.scope = "row";
      heading.textContent = text;
      const presence = answer.presence === null ? "" : percent(answer.presence) + (absent ? " (absent)" : "");
      const cells = answer.error
        ? [method, answer.error]
        : [method, presence, number(answer.score), point?.join(", ") ?? "", box?.join(", ") ?? ""];
      row.append(heading, ...cells.map(cellOf));
      if (answer.error) row.lastChild.colSpan = 4;
      return row;
    }),
  );
}

function cellOf(text) {
  const cell = document.createElement("td");
  cell.textContent = text;
  return cell;
}

/** A sentence on a result, for screen readers. */
export function sentence({ text, absent, answer, point }) {
  if (answer.error) return `${text}: ${answer.error}`;
  const where = point ? `; most similar at ${point.join(", ")}` : "";
  if (answer.presence === null) return `${text}: score ${number(answer.score)}${where}.`;
  return `${text}: ${absent ? "absent" : "present"}, presence ${percent(answer.presence)}${where}.`;
}
