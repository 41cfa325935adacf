// What is known of one request: the canvases of every step that was taken, the text, and how it ended.

export class Run {
  constructor(body) {
    this.body = body;
    this.frames = []; // by trajectory, in the order of steps
    this.text = "";
    this.report = null; // `guidance` of the answer, and its choice
    this.error = "";
    this.traced = false; // whether rewards were read that the request itself does not need
  }

  take({ canvas, choices, guidance }) {
    if (canvas) this.#add(canvas);
    for (const choice of choices) this.text += choice.delta?.content ?? choice.text ?? "";
    if (guidance) this.report = { ...guidance, choice: choices[0] };
  }

  // `since` says of each token in which step it was revealed, and its entropy before it if it was ever seen masked;
  // `copied` from which trajectory, and at which step, this one was copied last, null if it never was.
  #add(canvas) {
    const frames = (this.frames[canvas.trajectory] ??= []), own = frames.at(-1);
    const kept = own?.tokens.every((token, position) => token === null || token === canvas.tokens[position]);
    const now = canvas.ancestor !== null && (own?.ancestor !== canvas.ancestor || !kept);
    const before = now ? this.at(canvas.ancestor, canvas.step - 1) : own;
    const copied = now ? { from: canvas.ancestor, step: canvas.step } : own?.copied ?? null;
    const since = canvas.tokens.map((token, position) => token === null ? null
      : before?.since[position] ?? { step: canvas.step, entropy: before?.entropy?.[position] ?? null });
    frames.push({ ...canvas, since, copied });
  }

  // The last step that any trajectory has taken, -1 before the first.
  get last() {
    return Math.max(-1, ...this.frames.flat().map(({ step }) => step));
  }

  // The canvas of a trajectory after a step; steps that reveal nothing have none of their own.
  at(trajectory, step) {
    return this.frames[trajectory]?.findLast((frame) => frame.step <= step);
  }

  // The copies that were made in the first `taken` steps, by the step before which they were: whose copy each trajectory is.
  copies(taken) {
    const made = new Map();
    for (const { copied, step, trajectory } of this.frames.flat()) {
      if (copied?.step !== step || step >= taken) continue;
      if (!made.has(step)) made.set(step, [...this.frames.keys()]);
      made.get(step)[trajectory] = copied.from;
    }
    return made;
  }

  // The final reward of each trajectory that has one.
  get rewards() {
    return this.report?.rewards[0] ?? [];
  }

  // The trajectory with the largest final reward, -1 where there is no choice.
  get best() {
    const known = this.rewards.filter((reward) => reward !== null);
    return known.length > 1 ? this.rewards.indexOf(Math.max(...known)) : -1;
  }

  // [step, reward] wherever the reward model has read a trajectory.
  curve(trajectory) {
    const frames = this.frames[trajectory] ?? [];
    return frames.filter(({ reward }) => reward !== null).map(({ step, reward }) => [step, reward]);
  }

  // The mean of these rewards over the trajectories, at each step that all of them have taken.
  get mean() {
    const sums = new Map();
    for (const index of this.frames.keys()) {
      for (const [step, reward] of this.curve(index)) sums.set(step, [...(sums.get(step) ?? []), reward]);
    }
    const whole = [...sums].filter(([, rewards]) => rewards.length === this.frames.length);
    return whole.map(([step, rewards]) => [step, rewards.reduce((sum, reward) => sum + reward) / rewards.length]);
  }
}
