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

  // `since` says of each token in which step it was revealed, and its entropy before it if it was ever seen masked.
  #add(canvas) {
    const frames = (this.frames[canvas.trajectory] ??= []);
    const before = frames.at(-1);
    const since = canvas.tokens.map((token, position) => token === null ? null
      : before?.since[position] ?? { step: canvas.step, entropy: before?.entropy?.[position] ?? null });
    frames.push({ ...canvas, since });
  }

  // The last step that any trajectory has taken, -1 before the first.
  get last() {
    return Math.max(-1, ...this.frames.flat().map(({ step }) => step));
  }

  // The canvas of a trajectory after a step; steps that reveal nothing have none of their own.
  at(trajectory, step) {
    return this.frames[trajectory]?.findLast((frame) => frame.step <= step);
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
