// The page: columns of settings, one run of each on the same seed, and a walk through their steps.

import { models, stream } from "./api.js";
import { Canvas } from "./canvas.js";
import { plot } from "./chart.js";
import { button, byId, element, letter, shape, signed, withSign } from "./dom.js";
import { drawLineage } from "./lineage.js";
import { Run } from "./run.js";
import { columnForm, requestOf, settingsOf, steers, told } from "./settings.js";
import { curl, python } from "./snippets.js";

const MOST_COLUMNS = 4;
const page = { served: null, runs: [], results: [], taken: 0, controller: null, timer: null, drawing: false };
const key = () => byId("key").value.trim();
const columns = () => [...byId("columns").children];
const say = (text) => { byId("message").textContent = text; };

// -- settings, and the link that holds them ---------------------------------------------------------------------

async function connect() {
  const first = !page.served;
  try {
    page.served = await models(key());
    byId("served").textContent = `${page.served.model.id} · ${page.served.model.family}`;
    say("");
    if (!first) return;
    byId("go").disabled = byId("link").disabled = false;
    fill(fromLink());
  } catch (error) {
    byId("served").textContent = "not connected";
    say(error.message);
    setTimeout(() => { if (!page.served) connect(); }, 3000);
  }
}

// Without a link: guidance beside the best of as many unguided answers.
function fill({ prompt, seed, columns }) {
  const offered = ["entrgi", "bon", "none"].filter((method) => page.served.model.guidance_methods.includes(method));
  if (prompt !== undefined) byId("prompt").value = prompt;
  if (seed !== undefined) byId("seed").value = seed;
  const wanted = columns ?? offered.slice(0, 2).map((method) => ({ method }));
  byId("columns").replaceChildren(...wanted.slice(0, MOST_COLUMNS).map((each) => columnForm(page.served, each)));
  name();
}

function name() {
  columns().forEach((column, index) => {
    const remove = button("Remove", () => { column.remove(); name(); });
    remove.ariaLabel = `Remove column ${letter(index)}`;
    column.querySelector("legend").replaceChildren(letter(index), ...(columns().length > 1 ? [remove] : []));
  });
  byId("add").disabled = columns().length === MOST_COLUMNS;
}

function fromLink() {
  if (!location.hash) return {};
  try {
    const settings = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    if (settings.columns.length && settings.columns.every((each) => each && typeof each === "object")) return settings;
    throw new TypeError("no columns");
  } catch {
    say("The settings in this link cannot be read: it was cut off or changed.");
    return {};
  }
}

function toLink(seed) {
  const settings = { prompt: byId("prompt").value, seed, columns: columns().map((each) => told(page.served, settingsOf(each))) };
  history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(settings)));
}

const givenSeed = () => (byId("seed").value === "" ? undefined : Number(byId("seed").value));

// -- a run ------------------------------------------------------------------------------------------------------

async function generate() {
  const seed = givenSeed() ?? crypto.getRandomValues(new Uint32Array(1))[0];
  toLink(seed);
  pause();
  page.runs = columns().map((each) => new Run(requestOf(page.served, byId("prompt").value, seed, settingsOf(each))));
  page.results = page.runs.map(result);
  page.taken = 0;
  page.controller = new AbortController();
  byId("results").replaceChildren(...page.results.map(({ section }) => section));
  byId("lines").replaceChildren(...page.runs.map((run, column) =>
    element("span", "", element("i", `line-${letter(column)}`), ` ${letter(column)}: ${run.body.guidance.method}`)));
  byId("most").textContent = mostEntropy().toFixed(1);
  byId("runs").hidden = false;
  byId("go").disabled = true;
  byId("stop").disabled = false;
  say("Running…");
  await Promise.all(page.runs.map(follow));
  show();
  byId("go").disabled = false;
  byId("stop").disabled = true;
  const ends = page.runs.map((run, column) => `${letter(column)}: ${outcome(run)}`);
  say(ends.join(" · "));
}

async function follow(run) {
  run.traced = byId("follow").checked && !steers(run.body.guidance); // a trace reads the reward in every step
  try {
    await stream(run.traced ? { ...run.body, trace: true } : run.body, key(), page.controller.signal, (chunk) => {
      const following = page.taken === lastStep();
      run.take(chunk);
      if (following) page.taken = lastStep();
      draw();
    });
  } catch (error) {
    run.error = error.name !== "AbortError" ? error.message
      : `stopped ${run.last < 0 ? "before the first step" : `after step ${run.last + 1}`}; the server works on it no more`;
  }
}

function outcome(run) {
  if (run.error) return run.error;
  if (!run.report) return "the stream ended before its answer";
  const { reward } = run.report.choice;
  return reward === null ? "done, without a reward" : `reward ${withSign(reward, 2)}`;
}

const lastStep = () => Math.max(0, ...page.runs.map((run) => run.last + 1));
const mostEntropy = () => Math.log(page.served.model.vocab_size);

function result(run, column) {
  const copies = element("div", "actions",
    button("Copy as curl", () => offer(`${letter(column)} as curl`, curl(run.body, key() !== ""))),
    button("Copy as Python", () => offer(`${letter(column)} as Python`, python(run.body, key() !== ""))));
  const { method, reward_model, ...rest } = told(page.served, settingsOf(columns()[column]));
  const settings = Object.entries(rest).map(([name, value]) => `${name} ${value}`);
  const title = element("h2", "", `${letter(column)}: ${[method, ...settings].join(", ")}`);
  const text = element("p", "text"), facts = element("p", "facts"), canvases = element("div", "canvases");
  const lineage = shape("svg", { class: "lineage", role: "img", hidden: "" });
  const section = element("section", "", title, text, facts, copies, lineage, canvases);
  return { section, text, facts, lineage, canvases, shown: [] };
}

// -- showing it -------------------------------------------------------------------------------------------------

// At most once for each frame that the browser paints, however many steps arrive meanwhile.
function draw() {
  if (page.drawing) return;
  page.drawing = true;
  requestAnimationFrame(() => {
    page.drawing = false;
    show();
  });
}

function show() {
  const last = lastStep(), step = byId("step");
  step.max = last;
  step.value = page.taken;
  step.ariaValueText = byId("where").textContent = page.taken ? `after step ${page.taken} of ${last}` : "before the first step";
  page.runs.forEach((run, column) => showRun(run, column, page.results[column]));
  plot(byId("chart"), page.runs, page.taken);
}

function showRun(run, column, { text, facts, lineage, canvases, shown }) {
  run.frames.forEach((_, trajectory) => {
    if (shown[trajectory]) return;
    shown[trajectory] = new Canvas(run, trajectory, `${letter(column)}-${trajectory}`, mostEntropy());
    canvases.append(shown[trajectory].card);
  });
  for (const canvas of shown) canvas?.show(page.taken);
  drawLineage(lineage, run, column, page.taken);
  text.textContent = run.error || run.text.trim();
  text.classList.toggle("failed", run.error !== "");
  facts.replaceChildren(...(run.report ? factsOf(run) : []));
}

function factsOf({ body, report, rewards, traced }) {
  const curve = traced && !body.guidance.resample ? `, ${report.reward_calls_total - rewards.length} of them for the curve` : "";
  const reward = report.choice.reward === null ? [] : ["reward ", signed(report.choice.reward, 3), " · "];
  const rest = [
    report.reward_models.join(" + "), `seed ${report.seed}`, `${report.model_calls_total} model calls`,
    `${report.reward_calls_total} reward calls${curve}`, `${(report.generation_ms / 1000).toFixed(2)} s`,
    report.approximations.length ? `not exact: ${report.approximations.join(", ")}` : "",
  ];
  return [...reward, rest.filter((fact) => fact).join(" · ")];
}

// -- walking through the steps ----------------------------------------------------------------------------------

function go(taken) {
  page.taken = Math.max(0, Math.min(lastStep(), taken));
  show();
}

function pause() {
  clearInterval(page.timer);
  page.timer = null;
  byId("play").textContent = "Play";
}

function play() {
  if (page.timer) return pause();
  if (page.taken === lastStep()) go(0);
  byId("play").textContent = "Pause";
  page.timer = setInterval(() => {
    go(page.taken + 1);
    if (page.taken === lastStep()) pause();
  }, 120);
}

// -- copying ----------------------------------------------------------------------------------------------------

function offer(title, text) {
  byId("offered").textContent = title;
  byId("copy-text").value = text;
  byId("copied").textContent = "";
  byId("offer").showModal();
  byId("copy-text").select();
}

async function copy() {
  byId("copy-text").select();
  try {
    await navigator.clipboard.writeText(byId("copy-text").value);
    byId("copied").textContent = "Copied.";
  } catch { // a page that came without TLS from another machine has no clipboard
    byId("copied").textContent = "The browser does not let this page copy: press Ctrl+C or ⌘C.";
    byId("copy-text").focus();
  }
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
byId("stop").addEventListener("click", () => page.controller.abort());
byId("add").addEventListener("click", () => {
  byId("columns").append(columnForm(page.served, told(page.served, settingsOf(columns().at(-1)))));
  name();
});
byId("link").addEventListener("click", () => { toLink(givenSeed()); offer("A link to these settings", location.href); });
byId("key").addEventListener("change", connect);
byId("first").addEventListener("click", () => go(0));
byId("back").addEventListener("click", () => go(page.taken - 1));
byId("forward").addEventListener("click", () => go(page.taken + 1));
byId("last").addEventListener("click", () => go(lastStep()));
byId("play").addEventListener("click", play);
byId("step").addEventListener("input", (event) => go(Number(event.target.value)));
byId("copy").addEventListener("click", copy);
addEventListener("hashchange", () => { if (page.served) fill(fromLink()); });
addEventListener("resize", draw);
connect();
