// Who was copied: each trajectory of a run as a line, and at each copy a line from its ancestor.

import { letter, shape } from "./dom.js";

const ROW = 14, LEFT = 16, RIGHT = 8;

// Draws what the first `taken` steps have made; lines of trajectories that nobody goes on from are faint.
export function drawLineage(svg, run, column, taken) {
  const copies = run.copies(taken), meetings = [...copies.keys()].sort((one, other) => one - other);
  svg.toggleAttribute("hidden", !meetings.length);
  if (!meetings.length) return;
  const count = run.frames.length, width = Math.max(200, svg.clientWidth);
  const x = (step) => LEFT + (width - LEFT - RIGHT) * step / Math.max(1, run.last + 1), y = (row) => ROW * (row + 0.5);
  svg.setAttribute("viewBox", `0 0 ${width} ${ROW * count}`);
  svg.style.height = `${ROW * count}px`;
  svg.ariaLabel = meetings.map((step) => words(step, copies.get(step))).join("; ");
  svg.replaceChildren(...Array.from({ length: count }, (_, row) => shape("text", { x: 0, y: y(row) + 4 }, row + 1)));
  let living = new Set(Array.from({ length: count }, (_, row) => row)), end = taken;
  for (const step of [...meetings].reverse()) { // from the end, where all live, back to whom they come from
    draw(step, end, living);
    const ancestors = copies.get(step);
    for (const row of living) {
      const from = ancestors[row], names = `line-${letter(column)}`;
      if (from !== row) svg.append(shape("path", { class: names, d: curve(x(step), y(from), y(row)) }));
    }
    living = new Set([...living].map((row) => ancestors[row]));
    end = step;
  }
  draw(0, end, living);

  function draw(from, to, living) {
    for (let row = 0; row < count; row++) {
      const names = `line-${letter(column)}${living.has(row) ? "" : " faint"}`;
      svg.append(shape("line", { class: names, x1: x(from), x2: x(to), y1: y(row), y2: y(row) }));
    }
  }
}

// From one row to another around a step.
const curve = (at, from, to) => `M${at - 6},${from} C${at},${from} ${at},${to} ${at + 6},${to}`;

function words(step, ancestors) {
  const told = ancestors.map((from, row) => (from === row ? "" : `${row + 1} a copy of ${from + 1}`));
  return `From step ${step + 1} on trajectory ${told.filter((each) => each).join(", ")}`;
}
