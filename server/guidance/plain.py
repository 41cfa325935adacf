"""The plain loop: one trajectory at a time, as the paper reads. It is the oracle of the engine, not its engine.

Nothing is cached, packed, skipped or fused here: every step is one full forward of the diffusion LM (with block-causal
attention the blocks of the canvas are rows of one layout, which stands for the mask), every inner step one full forward
and backward of the reward model through stock transformers attention, autograd, and torch.optim.Adam; the nucleus is
found by sorting. Section numbers are those of docs/algorithm.md.
It shares with the engine only what defines a run: the schedule, the keyed random numbers and the ranking rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.random import INNER_FINAL, INNER_ORIGIN, INNER_RANK, row_keys, uniform
from server.diffusion import sampler
from server.diffusion.schedule import Step, adapted, block_lengths, plan
from server.guidance.best_of import choose
from server.methods import METHODS
from server.models.base import DiffusionModel
from server.models.packing import PackedLayout, places
from server.text.response import finish_text
from server.text.template import conversation_ids, split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Job, ModelInfo

MAX_REJECTIONS = 64


@dataclass(frozen=True, slots=True)
class PlainReward:
    """A transformers sequence classifier as transformers runs it; by diffusion id its embeddings, (V, D), and whether
    the id reads as its padding token, (V,) bool (None: none does)."""

    model: Any
    tokenizer: Tokenizer
    table: Tensor
    padding: Tensor | None = None

    def own(self, ids: Sequence[int]) -> Tensor:
        """Embeddings (n, D) of reward-vocabulary ids."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight[torch.tensor(ids, dtype=torch.long, device=weight.device)]

    def pads(self, ids: Sequence[int]) -> Tensor:
        """Which of reward-vocabulary ids are the padding token, (n,) bool."""
        pad = self.model.config.get_text_config().pad_token_id
        return torch.tensor([token == pad for token in ids], dtype=torch.bool, device=self.table.device)

    def read(self, embeds: Tensor, visible: Tensor, padding: Tensor | None = None) -> Tensor:
        """R of one sequence at the last visible position that does not hold padding, else at the first: embeds (S, D),
        visible and padding (S,) bool -> scalar. Without `padding` no position holds any."""
        positions = torch.arange(len(embeds), device=embeds.device)[None]
        hidden = self.model.model(
            inputs_embeds=embeds[None],
            attention_mask=visible[None].long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        content = torch.nonzero(visible if padding is None else visible & ~padding)[:, 0]
        last = int(content[-1]) if len(content) else 0
        result: Tensor = self.model.score(hidden[0, last])[0]
        return result

    def score(self, ids: Sequence[int]) -> float:
        """Final reward of a whole tokenised conversation."""
        with torch.no_grad():
            padding = self.pads(ids)
            return float(self.read(self.own(ids), torch.ones_like(padding), padding))


class PlainRows(NamedTuple):
    """What a method's weight sees of one trajectory's rows (`methods.Rows`)."""

    entropy_1: Tensor
    entropy_tau: Tensor
    vocab_size: int
    step: Tensor
    time: Tensor


@dataclass(frozen=True, slots=True)
class PlainResult:
    """All K trajectories: canvas tokens and the steps at which they were revealed (L each), texts, final rewards (None
    without a reward model), the chosen n."""

    token_ids: list[list[int]]
    step_maps: list[list[int]]
    texts: list[str]
    rewards: list[float | None]
    chosen: tuple[int, ...]


def filtered_distribution(phi: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """(unfiltered, filtered) distributions of section 1.4, each (N, V); the kept tokens are where the second is > 0.

    Temperature 0 divides by nothing. top_p keeps a token when the mass ranked before it is at most p, top_k keeps the
    k largest; equal values: the lower id ranks first.
    """
    q = torch.softmax(phi / (temperature or 1.0), dim=-1)
    order = torch.sort(phi, dim=-1, descending=True, stable=True).indices
    ranked = q.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    keep = before <= top_p
    if top_k is not None:
        keep[:, top_k:] = False
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    filtered = torch.where(kept, q, torch.zeros_like(q))
    return q, filtered / filtered.sum(-1, keepdim=True)


def draw(phi: Tensor, q: Tensor, filtered: Tensor, keys: Tensor, *, greedy: bool, never: int | None = None) -> Tensor:
    """One token a row (section 1.4): rejection from the unfiltered q until the filters keep it; (N,) int64. The id
    `never` is rejected too: greedy rows, and those whose filters keep nothing else, take the best other token."""
    if never is not None:
        other = torch.arange(phi.shape[-1], device=phi.device) != never
        phi, filtered = phi.masked_fill(~other, -torch.inf), filtered * other
    kept = filtered > 0
    tokens = phi.argmax(-1)
    pending = (kept.sum(-1) > 1) & (not greedy)
    cumulative = q.cumsum(-1)
    for round_ in range(MAX_REJECTIONS):
        if not pending.any():
            return tokens
        x = torch.searchsorted(cumulative, uniform(keys, round_).to(q)[:, None], right=True)[:, 0]
        x = x.clamp_max(q.shape[-1] - 1)
        accepted = pending & kept.gather(-1, x[:, None])[:, 0]
        tokens = torch.where(accepted, x, tokens)
        pending = pending & ~accepted
    if pending.any():
        u = uniform(keys, MAX_REJECTIONS).to(q)[:, None]
        cumulative = filtered.cumsum(-1)
        x = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].clamp_max(q.shape[-1] - 1)
        tokens = torch.where(pending, x, tokens)
    return tokens


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), (N,)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def weighted_rows(phi: Tensor, tau: float, step: Step) -> PlainRows:
    """The rows of phi (N, V) in a denoising step."""
    entropy_1 = entropy(phi)
    step_of_rows = torch.full_like(entropy_1, step.index, dtype=torch.int64)
    return PlainRows(entropy_1, entropy(phi / tau), phi.shape[-1], step_of_rows, torch.full_like(entropy_1, step.time))


class PlainLoop:
    """Decodes one job with one loaded diffusion model and its reward models."""

    def __init__(
        self, model: DiffusionModel, tokenizer: Tokenizer, info: ModelInfo, rewards: dict[str, PlainReward]
    ) -> None:
        self.model, self.tokenizer, self.info, self.rewards = model, tokenizer, info, rewards
        self.device = model.device

    def run(self, job: Job) -> PlainResult:
        """All K trajectories of a job, one after the other, then the n best of them."""
        sampling, guidance = job.sampling, job.guidance
        token_ids, step_maps, texts, rewards = [], [], [], []
        for trajectory in range(sampling.best_of):
            tokens, step_map = self.decode(job, trajectory)
            finished = finish_text(self.tokenizer, tokens, self.info.stop_token_ids, sampling.stop, sampling.ignore_eos)
            token_ids.append(tokens)
            step_maps.append(step_map)
            texts.append(finished.text)
            rewards.append(self.final_reward(job, finished.text) if guidance.reward_models else None)
        chosen = choose(rewards, sampling.n, ranked=guidance.method != "none")
        return PlainResult(token_ids, step_maps, texts, rewards, chosen)

    def final_reward(self, job: Job, text: str) -> float:
        """The weighted sum of R on the text (end of section 2)."""
        total = 0.0
        for weighted in job.guidance.reward_models:
            reward = self.rewards[weighted.model]
            response = job.response_prefix + text + job.response_suffix
            ids = conversation_ids(reward.tokenizer, job.conversation, response)
            total += weighted.weight * reward.score(ids)
        return total

    def decode(self, job: Job, trajectory: int) -> tuple[list[int], list[int]]:
        """One trajectory's L canvas tokens, and the step at which each was revealed (last); block-causal, at most up to
        the end of the block in which the text ends."""
        length, block_causal = job.sampling.max_tokens, job.diffusion.block_causal
        steps = plan(length, job.diffusion, job.guidance, job.lead)
        prompt = torch.tensor(job.prompt_ids, dtype=torch.long, device=self.device)
        suffix = torch.tensor(job.suffix_ids, dtype=torch.long, device=self.device)
        response = torch.full((steps[-1].stop,), self.info.mask_token_id, device=self.device)
        masked = torch.ones(len(response), dtype=torch.bool, device=self.device)
        step_map = torch.full((len(response),), -1)
        taken = 0
        for step in steps:
            if block_causal and not job.sampling.ignore_eos:
                finished = response[: step.start].tolist()
                if not set(self.info.stop_token_ids).isdisjoint(finished):
                    return finished, step_map[: step.start].tolist()
            if step.reveal == 0 and job.diffusion.algorithm != "origin":
                continue  # a step that reveals nothing changes nothing
            if not masked[step.start : step.stop].any():
                continue
            if job.diffusion.adaptive:
                step = adapted(step, int(masked[:length].sum()), length, taken, job.guidance)
            taken += 1
            there = step.stop if block_causal else len(response)  # of a block-causal response the later blocks are not
            canvas = torch.cat([prompt, response[:there], suffix])
            rows = torch.nonzero(masked[:there])[:, 0]
            with torch.no_grad():
                phi_0 = phi = self.logits(job, canvas, rows, len(prompt), length)
            if step.guided:  # positions past the answer are not
                answer, own = response[: min(there, length)], int((rows < length).sum())
                phi = torch.cat([self.steer(job, trajectory, step, phi_0[:own], answer, rows[:own]), phi_0[own:]])
            chosen, tokens = self.reveal(job, trajectory, step, phi_0, phi, rows)
            response[chosen] = tokens
            masked[chosen] = False
            step_map[chosen.cpu()] = step.index
        return response[:length].tolist(), step_map[:length].tolist()

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
