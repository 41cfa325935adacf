// What a column sets, and the request that it makes. The form, the request and the link follow one table.

import { element } from "./dom.js";

export const steers = ({ method }) => !["none", "bon"].includes(method); // all others move logits
const chooses = ({ method }) => method !== "none"; // without a reward there is nothing to choose by
const resamples = (settings) => chooses(settings) && settings.resample !== undefined;

// `within` is the path of the object of the request that has the field, under the name `as` if not its own; `applies` says
// for which settings it has an effect.
const FIELDS = [
  { name: "method", label: "Guidance", within: ["guidance"], choices: ({ model }) => model.guidance_methods },
  { name: "reward_model", label: "Reward model", within: ["guidance"], choices: ({ rewards }) => rewards },
  { name: "best_of", label: "Trajectories (K)", min: 1, max: ({ model }) => model.limits.trajectories, applies: chooses },
  { name: "resample", label: "Resampled by", within: ["guidance", "resample"], as: "by", unset: "nothing",
    choices: () => ["", "reward", "confidence"], applies: chooses },
  { name: "eta", label: "Step size (eta)", within: ["guidance"], min: 0, max: () => 10, step: "any", applies: steers },
  { name: "gradient_steps", label: "Gradient steps (M)", within: ["guidance"], min: 0, max: () => 16, applies: steers },
  { name: "max_tokens", label: "Tokens (L)", min: 1 },
  { name: "steps", label: "Steps (T)", within: ["diffusion"], min: 1, unset: "as tokens" },
  { name: "temperature", label: "Temperature", min: 0, max: () => 2, step: "any" },
  { name: "top_p", label: "Top-p", min: 0, max: () => 1, step: "any", more: true },
  { name: "strength", label: "Resampling strength", within: ["guidance", "resample"], min: 0, max: () => 100, step: "any",
    more: true, unset: "1", applies: resamples },
  { name: "resample_every", label: "Resampled every", within: ["guidance", "resample"], as: "every", min: 1, more: true,
    unset: "8 steps", applies: resamples },
  { name: "algorithm", label: "Revealed first", within: ["diffusion"], more: true, choices: ({ model }) => model.algorithms },
  { name: "entropy_bound", label: "Entropy bound, nats", within: ["diffusion"], min: 0, max: () => 1000, step: "any", more: true,
    applies: ({ algorithm }) => algorithm === "entropy_bound" },
  { name: "confidence_threshold", label: "Confidence threshold", within: ["diffusion"], min: 0, max: () => 1, step: "any",
    more: true, applies: ({ algorithm }) => algorithm === "threshold" },
  { name: "block_length", label: "Block length", within: ["diffusion"], min: 1, more: true, unset: "the model's" },
];
const ALWAYS_SENT = ["method", "reward_model"];

// The value of a field that a request leaves out.
function usual(served, { name, unset }) {
  const defaults = served.model.defaults;
  if (name === "method") return defaults.guidance;
  if (name === "reward_model") return served.rewards[0];
  if (name === "best_of") return Math.max(...Object.values(defaults.best_of)); // that of all methods that choose
  return unset ? undefined : defaults[name];
}

// One fieldset with an input for each field, filled with these settings and otherwise with what holds without them.
export function columnForm(served, settings) {
  const column = element("fieldset", "card column");
  const more = element("details", "", element("summary", "", "More settings"), element("div", "fields"));
  column.append(element("legend"), element("div", "fields"), more, element("p", "hint"));
  for (const field of FIELDS) {
    const choices = field.choices?.(served);
    const input = choices ? element("select", "", ...choices.map((name) => new Option(name || field.unset, name))) : element("input");
    if (!choices) Object.assign(input, { type: "number", min: field.min, step: field.step ?? 1, placeholder: field.unset ?? "" });
    if (field.max) input.max = field.max(served);
    input.name = field.name;
    const value = settings[field.name] ?? usual(served, field);
    if (value !== undefined && !(choices && !choices.includes(value))) input.value = value;
    const label = element("label", "", field.label, " ", input);
    label.hidden = choices?.length === 0;
    column.querySelector(field.more ? "details .fields" : ".fields").append(label);
  }
  more.open = FIELDS.some((field) => field.more && settings[field.name] !== undefined);
  column.addEventListener("change", () => adapt(column));
  adapt(column);
  return column;
}

const inputOf = (column, { name }) => column.querySelector(`[name=${name}]`);

// Takes away what has no effect for the present choice.
function adapt(column) {
  const settings = settingsOf(column);
  for (const field of FIELDS) inputOf(column, field).disabled = !(field.applies?.(settings) ?? true);
  column.querySelector(".hint").textContent = resamples(settings)
    ? "While they run, good trajectories are copied over bad ones; with bon by reward, that is smc (sequential Monte Carlo)."
    : chooses(settings) ? "" : "With none there is no reward to choose an answer by, so one trajectory runs. bon runs "
      + "several in the same way and keeps the one with the largest reward.";
}

// All values of a column that are there, by name.
export function settingsOf(column) {
  const settings = {};
  for (const field of FIELDS) {
    const { value } = inputOf(column, field);
    if (value !== "") settings[field.name] = field.choices ? value : Number(value);
  }
  return settings;
}

// The settings that say something: those with an effect that are not what holds without them.
export function told(served, settings) {
  const fields = FIELDS.filter((field) => settings[field.name] !== undefined && (field.applies?.(settings) ?? true));
  const kept = fields.filter((field) => ALWAYS_SENT.includes(field.name)
    || settings[field.name] !== usual(served, field));
  return Object.fromEntries(kept.map(({ name }) => [name, settings[name]]));
}

// The request of a column: what it says, and nothing of how it is shown.
export function requestOf(served, prompt, seed, settings) {
  const asked = served.model.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = { model: served.model.id, ...asked, seed };
  for (const [name, value] of Object.entries(told(served, settings))) {
    const { within = [], as = name } = FIELDS.find((field) => field.name === name);
    within.reduce((object, part) => (object[part] ??= {}), body)[as] = value;
  }
  return body;
}
