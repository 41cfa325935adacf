// Reward by step of all runs, as one plot.

import { letter, shape, withSign } from "./dom.js";

const HEIGHT = 190, LEFT = 34, RIGHT = 26, TOP = 8, BOTTOM = 20;

// Round numbers between two values, about four of them.
function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const first = Math.ceil(low / size);
  return Array.from({ length: Math.floor(high / size) - first + 1 }, (_, index) => (first + index) * size);
}

// Draws the runs so far into `svg`, with a mark after `taken` steps.
export function plot(svg, runs, taken) {
  const width = Math.max(240, svg.clientWidth);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const curves = runs.map((run) => run.frames.map((_, trajectory) => run.curve(trajectory)));
  const rewards = [...curves.flat(2).map(([, reward]) => reward), ...runs.flatMap((run) => run.rewards)];
  const known = rewards.filter((reward) => reward !== null);
  svg.ariaLabel = summary(runs);
  svg.replaceChildren();
  if (!known.length) return;
  const low = Math.min(...known) - 0.2, high = Math.max(...known) + 0.2;
  const steps = Math.max(2, ...runs.map((run) => run.last + 1));
  const x = (step) => LEFT + (width - LEFT - RIGHT) * step / (steps - 1);
  const y = (reward) => TOP + (HEIGHT - TOP - BOTTOM) * (high - reward) / (high - low);
  for (const tick of ticks(low, high)) {
    svg.append(shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, Number(tick.toPrecision(3))));
  }
  svg.append(shape("text", { x: LEFT, y: HEIGHT - 4 }, "step 1"));
  svg.append(shape("text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, steps));
  const at = x(Math.max(0, taken - 1));
  svg.append(shape("line", { class: "mark", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
  const line = (points, names) => svg.append(shape("polyline", { class: names,
    points: points.map(([step, reward]) => `${x(step).toFixed(1)},${y(reward).toFixed(1)}`).join(" ") }));
  runs.forEach((run, column) => {
    for (const points of curves[column]) line(points, `thin line-${letter(column)}`);
    line(run.mean, `thick line-${letter(column)}`);
    for (const reward of run.rewards.filter((each) => each !== null)) {
      svg.append(shape("circle", { class: `line-${letter(column)}`, cx: width - RIGHT + 8 + 4 * column, cy: y(reward), r: 3 }));
    }
  });
}

// The same in words.
function summary(runs) {
  const words = runs.map((run, column) => {
    const [first, last] = [run.mean[0], run.mean.at(-1)];
    if (!first) return `${letter(column)} has no rewards`;
    const of = ([step, reward]) => `${withSign(reward, 2)} in step ${step + 1}`;
    return `the mean reward of ${letter(column)} is ${of(first)} and ${of(last)}`;
  });
  return `Reward by step: ${words.join("; ")}`;
}
