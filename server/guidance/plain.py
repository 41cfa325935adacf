"""The plain loop: one trajectory at a time, as the paper reads. It is the oracle of the engine, not its engine.
Trajectories that are resampled take turns, as many steps as lie between two meetings at a time.

Nothing is cached, packed, skipped or fused here: every step is one full forward of the diffusion LM (with block-causal
attention the blocks of the canvas are rows of one layout, which stands for the mask), every inner step one full forward
and backward of the reward model through stock transformers attention, autograd, and torch.optim.Adam; the nucleus is
found by sorting. Section numbers are those of docs/algorithm.md.
It shares with the engine only what defines a run: the schedule, the keyed random numbers, and the rules of ranking and
of resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.random import INNER_FINAL, INNER_ORIGIN, INNER_RANK, row_keys, uniform
from server.diffusion import sampler
from server.diffusion.schedule import Step, adapted, block_lengths, plan
from server.guidance.best_of import choose
from server.guidance.distributions import draw, entropy, filtered_distribution, weighted_rows
from server.guidance.resample import Meeting, Particles
from server.methods import METHODS
from server.models.base import DiffusionModel
from server.models.packing import PackedLayout, places
from server.text.response import finish_text
from server.text.template import conversation_ids, split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Job, ModelInfo, Resampling, RewardOutput


@dataclass(frozen=True, slots=True)
class PlainReward:
    """A transformers sequence classifier as transformers runs it; by diffusion id its embeddings, (V, D), and whether
    the id reads as its padding token, (V,) bool (None: none does). R is the `output` of its label number `label`."""

    model: Any
    tokenizer: Tokenizer
    table: Tensor
    padding: Tensor | None = None
    label: int = 0
    output: RewardOutput = "logit"

    def own(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (n, D) of reward-vocabulary ids."""
        embed = self.model.get_input_embeddings()
        embeds: Tensor = embed(torch.tensor(ids, dtype=torch.long, device=embed.weight.device))
        return embeds

    def pads(self, ids: Sequence[int]) -> Tensor:
        """Which of reward-vocabulary ids are the padding token, (n,) bool."""
        pad = self.model.config.get_text_config().pad_token_id
        return torch.tensor([token == pad for token in ids], dtype=torch.bool, device=self.table.device)

    def read(self, embeds: Tensor, visible: Tensor, padding: Tensor | None = None) -> Tensor:
        """R of one sequence at the last visible position that does not hold padding, else at the first: embeds (S, D),
        visible and padding (S,) bool -> scalar. Without `padding` no position holds any."""
        positions = torch.arange(len(embeds), device=embeds.device)[None]
        hidden = self.model.base_model(
            inputs_embeds=embeds[None],
            attention_mask=visible[None].long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        content = torch.nonzero(visible if padding is None else visible & ~padding)[:, 0]
        last = int(content[-1]) if len(content) else 0
        logits: Tensor = self.model.score(hidden[0, last])
        return (logits if self.output == "logit" else torch.log_softmax(logits, dim=-1))[self.label]

    def score(self, ids: Sequence[int]) -> float:
        """Final reward of a whole tokenised conversation."""
        with torch.no_grad():
            padding = self.pads(ids)
            return float(self.read(self.own(ids), torch.ones_like(padding), padding))


@dataclass(slots=True)
class PlainTrajectory:
    """One trajectory under way: response tokens, which of them are masked, and the step at which each was revealed
    (last). `estimate` is the response as far as it is there, with the best guess where it is masked; `length` is where
    the answer ends. `taken` counts forwards, and `log_probability` is the total of the tokens revealed."""

    index: int
    steps: tuple[Step, ...]
    response: Tensor
    masked: Tensor
    step_map: Tensor
    estimate: Tensor
    length: int
    cursor: int = 0
    taken: int = 0
    log_probability: float = 0.0

    def child(self, index: int) -> PlainTrajectory:
        """A copy that goes on as another trajectory."""
        tensors = {name: getattr(self, name).clone() for name in ("response", "masked", "step_map", "estimate")}
        return replace(self, index=index, **tensors)


@dataclass(frozen=True, slots=True)
class PlainResult:
    """All K trajectories: canvas tokens and the steps at which they were revealed (L each), texts, final rewards (None
    without any), the chosen n. Of those that are resampled, what came of each meeting, a row for each time that some
    were copied (steps taken, ancestors), and the final weights."""

    token_ids: list[list[int]]
    step_maps: list[list[int]]
    texts: list[str]
    rewards: list[float | None]
    chosen: tuple[int, ...]
    meetings: list[Meeting] = field(default_factory=list)
    resampled: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    weights: tuple[float, ...] | None = None


Outside = Callable[[list[str]], dict[str, list[float]]]
"""What stands for outside scorers: whole texts -> one score a text, by name of the scorer."""


class PlainLoop:
    """Decodes one job with one loaded diffusion model and its reward models."""

    def __init__(
        self, model: DiffusionModel, tokenizer: Tokenizer, info: ModelInfo, rewards: dict[str, PlainReward]
    ) -> None:
        self.model, self.tokenizer, self.info, self.rewards = model, tokenizer, info, rewards
        self.device = model.device

    def run(self, job: Job, outside: Outside | None = None) -> PlainResult:
        """All K trajectories of a job, then the n best of them."""
        sampling, guidance = job.sampling, job.guidance
        trajectories = [self.begin(job, index) for index in range(sampling.best_of)]
        particles, meetings, meets_at = None, list[Meeting](), math.inf
        if (rule := guidance.resample) is not None:
            particles, meets_at = Particles.of(job, rule), rule.every
        while any(self.next_step(job, trajectory) for trajectory in trajectories):
            for trajectory in trajectories:
                while trajectory.taken < meets_at and (step := self.next_step(job, trajectory)) is not None:
                    self.take(job, trajectory, step)
            if particles is not None and any(self.next_step(job, trajectory) for trajectory in trajectories):
                meetings.append(particles.meet(int(meets_at), self.scores(job, trajectories, particles.rule, outside)))
                meets_at += particles.rule.every
                if chosen := meetings[-1].ancestors:
                    trajectories = [trajectories[ancestor].child(index) for index, ancestor in enumerate(chosen)]
        texts = [self.text(job, trajectory) for trajectory in trajectories]
        rewards = self.rewards_of(job, texts, outside)
        scores = rewards
        if particles is not None and particles.rule.by == "confidence":
            scores = [trajectory.log_probability for trajectory in trajectories]
        ranking = rewards if guidance.rewards else scores
        return PlainResult(
            [trajectory.response[: trajectory.length].tolist() for trajectory in trajectories],
            [trajectory.step_map[: trajectory.length].tolist() for trajectory in trajectories],
            texts,
            rewards,
            choose(ranking, sampling.n, ranked=guidance.method != "none"),
            meetings,
            particles.resampled if particles else [],
            particles.weights(scores) if particles else None,
        )

    def scores(
        self, job: Job, trajectories: Sequence[PlainTrajectory], rule: Resampling, outside: Outside | None
    ) -> list[float]:
        """What each trajectory is resampled by (section 5)."""
        if rule.by == "confidence":
            return [trajectory.log_probability for trajectory in trajectories]
        rewards = self.rewards_of(job, [self.text(job, trajectory) for trajectory in trajectories], outside)
        return [reward for reward in rewards if reward is not None]

    def text(self, job: Job, trajectory: PlainTrajectory) -> str:
        """The text of a trajectory, of one under way as it would be now."""
        tokens, sampling = trajectory.estimate[: trajectory.length].tolist(), job.sampling
        ends = self.info.stop_token_ids, sampling.stop, sampling.ignore_eos
        return finish_text(self.tokenizer, tokens, *ends).text

    def rewards_of(self, job: Job, texts: Sequence[str], outside: Outside | None) -> list[float | None]:
        """The weighted sum of R on each text (end of section 2); None where nothing is rewarded."""
        if not job.guidance.rewards:
            return [None for _ in texts]
        whole = [job.whole(text) for text in texts]
        judged = outside(whole) if outside is not None else {}
        totals = np.zeros(len(texts))
        for weighted in job.guidance.rewards:
            if weighted.model not in judged:
                reward = self.rewards[weighted.model]
                sequences = [conversation_ids(reward.tokenizer, job.conversation, text) for text in whole]
                judged[weighted.model] = [reward.score(ids) for ids in sequences]
            totals += weighted.weight * np.array(judged[weighted.model])
        return list(totals.tolist())

    def begin(self, job: Job, index: int) -> PlainTrajectory:
        """Trajectory `index` before its first step: everything is masked."""
        steps = plan(job.sampling.max_tokens, job.diffusion, job.guidance, job.lead)
        response = torch.full((steps[-1].stop,), self.info.mask_token_id, device=self.device)
        masked, step_map = torch.ones_like(response, dtype=torch.bool), torch.full((len(response),), -1)
        return PlainTrajectory(index, steps, response, masked, step_map, response, job.sampling.max_tokens)

    def next_step(self, job: Job, trajectory: PlainTrajectory) -> Step | None:
        """The next step that can reveal something, None at the end; block-causal, that is at the latest the end of the
        block in which the text ends."""
        diffusion, length = job.diffusion, job.sampling.max_tokens
        stops = set() if job.sampling.ignore_eos else set(self.info.stop_token_ids)
        while trajectory.cursor < len(trajectory.steps):
            step = trajectory.steps[trajectory.cursor]
            if diffusion.block_causal and not stops.isdisjoint(trajectory.response[: step.start].tolist()):
                trajectory.length = step.start
                return None
            reveals = step.reveal > 0 or diffusion.algorithm == "origin"  # a step that reveals nothing changes nothing
            if reveals and trajectory.masked[step.start : step.stop].any():
                if not diffusion.adaptive:
                    return step
                return adapted(step, int(trajectory.masked[:length].sum()), length, trajectory.taken, job.guidance)
            trajectory.cursor += 1
        return None

    def take(self, job: Job, trajectory: PlainTrajectory, step: Step) -> None:
        """One denoising step of one trajectory."""
        length, block_causal, index = job.sampling.max_tokens, job.diffusion.block_causal, trajectory.index
        prompt = torch.tensor(job.prompt_ids, dtype=torch.long, device=self.device)
        suffix = torch.tensor(job.suffix_ids, dtype=torch.long, device=self.device)
        there = step.stop if block_causal else len(trajectory.response)  # of a block-causal one later blocks are not
        response = trajectory.response[:there]
        rows = torch.nonzero(trajectory.masked[:there])[:, 0]
        with torch.no_grad():
            phi_0 = phi = self.logits(job, torch.cat([prompt, response, suffix]), rows, len(prompt), length)
        if step.guided:  # positions past the answer are not
            answer, own = response[: min(there, length)], int((rows < length).sum())
            phi = torch.cat([self.steer(job, index, step, phi_0[:own], answer, rows[:own]), phi_0[own:]])
        chosen, tokens = self.reveal(job, index, step, phi_0, phi, rows)
        log_p = torch.log_softmax(phi_0, dim=-1)[torch.searchsorted(rows, chosen), tokens]
        trajectory.log_probability += float(log_p.double().sum())
        mask = torch.arange(phi.shape[-1], device=phi.device) == self.info.mask_token_id
        trajectory.estimate = response.index_put((rows,), phi.masked_fill(mask, -torch.inf).argmax(-1))
        for tensor in (trajectory.response, trajectory.estimate):
            tensor[chosen] = tokens
        trajectory.masked[chosen] = False
        trajectory.step_map[chosen.cpu()] = step.index
        trajectory.cursor += 1
        trajectory.taken += 1

    def logits(self, job: Job, canvas: Tensor, rows: Tensor, prompt_length: int, length: int) -> Tensor:
        """phi_0 (N, V) at the masked rows, with classifier-free guidance (end of section 1); in float32 at least, in
        which a 16-bit model's logits are exact, and what is computed of them is not rounded to 16 bits again."""
        lengths: tuple[int, ...] = (len(canvas),)
        if job.diffusion.block_causal:
            lengths = block_lengths(len(canvas), prompt_length - job.lead, job.diffusion.block_length or 1)
        layout = PackedLayout.of(lengths, self.device, before=places(lengths))
        logits = self.model.masked_logits(canvas, layout, rows + prompt_length)
        if scale := job.diffusion.cfg_scale:
            blind = torch.full_like(canvas, self.info.mask_token_id)
            blind[prompt_length : prompt_length + length] = canvas[prompt_length : prompt_length + length]
            unconditional = self.model.masked_logits(blind, layout, rows + prompt_length)
            logits = unconditional + (scale + 1.0) * (logits - unconditional)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def keys(self, job: Job, trajectory: int, step: Step, inner: int, positions: Tensor) -> Tensor:
        """The random keys (N, 4) of section 1.4: (seed, prompt, trajectory, step, inner step, position)."""
        values = job.sampling.seed, job.prompt_index, trajectory, step.index, inner
        columns = [*(torch.full_like(positions, value) for value in values), positions]
        return row_keys(*columns)

    def steer(
        self,
        job: Job,
        trajectory: int,
        step: Step,
        phi_0: Tensor,
        response: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """M Adam steps on the logits along the reward's gradient (section 2); phi (N, V)."""
        sampling, guidance = job.sampling, job.guidance
        tau = sampling.temperature or 1.0
        phi = phi_0.detach().clone().requires_grad_()
        adam = torch.optim.Adam([phi], lr=guidance.eta, betas=(0.9, 0.999), eps=1e-8, maximize=True)
        for inner in range(guidance.gradient_steps):
            with torch.no_grad():
                w = METHODS[guidance.method].weigh(weighted_rows(phi, tau, step))[:, None]
                q, filtered = filtered_distribution(phi, sampling.temperature, sampling.top_p, sampling.top_k)
                keys = self.keys(job, trajectory, step, inner, rows)
                x = draw(phi, q, filtered, keys, greedy=sampling.temperature == 0)
                current = response.clone()
                current[rows] = phi.argmax(-1)
                visible = self.visible(current)
            total = phi.new_zeros(())
            for weighted in guidance.reward_models:
                reward = self.rewards[weighted.model]
                table = reward.table.to(phi.dtype)
                soft = torch.softmax(phi / tau, dim=-1) @ table
                e = soft + (w * (table[x] - soft)).detach()
                embeds = table[current].index_put((rows,), e).to(reward.table.dtype)
                around = job.response_suffix, job.response_prefix
                before, after = split_at_response(reward.tokenizer, job.conversation, *around)
                sequence = torch.cat([reward.own(before), embeds, reward.own(after)])
                # Prompt, prefix and suffix are never hidden.
                seen = torch.cat([visible.new_ones(len(before)), visible, visible.new_ones(len(after))])
                own = torch.zeros_like(visible) if reward.padding is None else reward.padding[current]
                padding = torch.cat([reward.pads(before), own, reward.pads(after)])
                total = total + weighted.weight * reward.read(sequence, seen, padding)
            (phi.grad,) = torch.autograd.grad(total, [phi])
            adam.step()
        return phi.detach()

    def visible(self, tokens: Tensor) -> Tensor:
        """Response positions the reward model sees: none after the first EOS, none that holds the pad token; (L,)."""
        ended = (tokens == self.info.eos_token_id).long()
        after_eos = (ended.cumsum(0) - ended) > 0
        return ~after_eos & (tokens != self.info.pad_token_id)

    def reveal(
        self, job: Job, trajectory: int, step: Step, phi_0: Tensor, phi: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Response positions revealed by this step and their tokens (section 1, points 4 to 6)."""
        sampling, diffusion = job.sampling, job.diffusion
        in_block = (rows >= step.start) & (rows < step.stop)
        candidates, phi, phi_0 = rows[in_block], phi[in_block], phi_0[in_block]
        q, filtered = filtered_distribution(phi, sampling.temperature, sampling.top_p, sampling.top_k)
        keys = self.keys(job, trajectory, step, INNER_FINAL, candidates)
        never = self.info.mask_token_id
        tokens = draw(phi, q, filtered, keys, greedy=sampling.temperature == 0, never=never)
        ranking = INNER_ORIGIN if diffusion.algorithm == "origin" else INNER_RANK
        chosen = sampler.reveal(
            diffusion,
            step,
            self.confidence(job, step, phi_0, filtered, tokens).cpu().numpy(),
            (tokens == self.info.eos_token_id).cpu().numpy(),
            uniform(self.keys(job, trajectory, step, ranking, candidates), 0).cpu().numpy(),
        )
        index = torch.from_numpy(np.ascontiguousarray(chosen)).to(self.device)
        return candidates[index], tokens[index]

    def confidence(self, job: Job, step: Step, phi_0: Tensor, filtered: Tensor, tokens: Tensor) -> Tensor:
        """Confidence of each candidate (section 1, point 5); (n,)."""
        if job.diffusion.algorithm == "maskgit_plus":
            return filtered.gather(-1, tokens[:, None])[:, 0]
        if job.diffusion.algorithm == "topk_margin":
            top = filtered.topk(2, dim=-1).values
            return top[:, 0] - top[:, 1]
        base = step.guided and job.guidance.confidence == "base"
        if job.diffusion.algorithm == "threshold":
            q = torch.softmax(phi_0 / (job.sampling.temperature or 1.0), dim=-1)
            return (q if base else filtered).amax(-1)
        if base:
            return -entropy(phi_0 / (job.sampling.temperature or 1.0))
        log = torch.where(filtered > 0, filtered, torch.ones_like(filtered)).log()
        return (filtered * log).sum(-1)
