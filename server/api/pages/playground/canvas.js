// One trajectory on the page: its tokens after a step, coloured by entropy, and what is known of one that is pointed at.

import { element, signed } from "./dom.js";

const SPECIAL = /^<[|/]?[^<>]*>$/;
const END = /^<[|/]?(endoftext|end_of_text|im_end|eot_id|eot|eos|s)\|?>$/i;

export class Canvas {
  // `id` is one of its own on the page, `most` the largest entropy there can be, in nats.
  constructor(run, trajectory, id, most) {
    Object.assign(this, { run, trajectory, id, most, taken: 0, active: -1 });
    this.name = element("span", "name", `Trajectory ${trajectory + 1}`);
    this.copied = element("span", "copied");
    this.reward = element("span");
    this.about = element("p", "about");
    this.tokens = element("div", "tokens", ...run.frames[trajectory][0].tokens.map((_, position) => {
      const token = element("span");
      token.id = `${id}-${position}`;
      token.role = "option";
      return token;
    }));
    Object.assign(this.tokens, { role: "listbox", tabIndex: 0, ariaLabel: `Tokens of trajectory ${trajectory + 1}` });
    this.card = element("div", "card canvas", element("h3", "", this.name, this.copied, this.reward), this.tokens, this.about);
    this.tokens.addEventListener("pointerover", ({ target }) => this.#point([...this.tokens.children].indexOf(target)));
    this.tokens.addEventListener("pointerleave", () => this.#point(-1));
    this.tokens.addEventListener("blur", () => this.#point(-1));
    this.tokens.addEventListener("keydown", (event) => this.#move(event));
  }

  // The canvas after so many steps of the run.
  show(taken) {
    const { run, trajectory } = this;
    this.taken = taken;
    this.frame = run.at(trajectory, taken - 1);
    let ended = false;
    [...this.tokens.children].forEach((node, position) => {
      const text = this.frame?.tokens[position] ?? null, since = this.frame?.since[position];
      ended ||= text !== null && END.test(text);
      node.className = text === null ? "masked" : ended ? "after" : since.step === taken - 1 ? "new" : "";
      node.textContent = text === null ? "" : SPECIAL.test(text) ? "·" : text;
      const entropy = text === null ? this.frame?.entropy?.[position] : since.entropy;
      node.style.setProperty("--entropy", `${100 * Math.min(1, (entropy ?? 0) / this.most)}%`);
    });
    const copied = this.frame?.copied;
    this.copied.textContent = copied ? `copy of ${copied.from + 1} since step ${copied.step + 1}` : "";
    const over = run.report !== null && taken > run.last;
    const reward = (over ? run.rewards[trajectory] : this.frame?.reward) ?? null;
    this.reward.replaceChildren(...(reward === null ? [] : [over ? "final reward " : "reward ", signed(reward, 2)]));
    this.card.classList.toggle("best", over && run.best === trajectory);
    this.#point(this.active);
  }

  // Says what is known of a position, or of the whole canvas.
  #point(position) {
    const tokens = [...this.tokens.children];
    for (const token of tokens) token.ariaSelected = null;
    this.active = position;
    this.about.textContent = position < 0 ? this.#summary() : this.#words(position);
    if (position < 0) return this.tokens.removeAttribute("aria-activedescendant");
    Object.assign(tokens[position], { ariaSelected: "true", ariaLabel: this.about.textContent });
    this.tokens.setAttribute("aria-activedescendant", tokens[position].id);
  }

  #summary() {
    const { length } = this.tokens.children;
    return `${this.frame?.tokens.filter((token) => token !== null).length ?? 0} of ${length} tokens revealed`;
  }

  #words(position) {
    const token = this.frame?.tokens[position] ?? null;
    const { step, entropy } = this.frame?.since[position] ?? { entropy: this.frame?.entropy?.[position] ?? null };
    const nats = entropy === null ? "entropy not known" : `entropy ${entropy.toFixed(2)} nats`;
    if (token === null) return `Position ${position + 1}: masked, ${nats}`;
    return `Position ${position + 1}: “${token}”, revealed in step ${step + 1}, ${nats}${entropy === null ? "" : " before"}`;
  }

  #move(event) {
    const last = this.tokens.children.length - 1;
    const to = { ArrowLeft: this.active - 1, ArrowRight: this.active + 1, ArrowUp: this.active - 1,
      ArrowDown: this.active + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#point(Math.max(0, Math.min(last, to)));
  }
}
