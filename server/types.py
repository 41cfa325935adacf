"""The nouns that every layer shares. Plain frozen dataclasses; nothing here imports torch.

A *request* of the API becomes one `Job` per prompt. A job holds K = `best_of` *trajectories*: independent
denoising runs of the same prompt, told apart by their index, which keys their random numbers.
Symbols of the paper (arXiv 2602.05000) are named in full: L `max_tokens`, T `steps`, tau `temperature`,
K `best_of`, M `gradient_steps`, eta `eta`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.budget import Budget
from server.methods import METHODS

Algorithm = Literal["entropy", "maskgit_plus", "topk_margin", "origin", "entropy_bound", "threshold"]
Schedule = Literal["linear", "even"]
Confidence = Literal["base", "guided"]
FinishReason = Literal["stop", "length"]
Attention = Literal["auto", "full", "block_causal"]
ResampleBy = Literal["reward", "confidence"]
Potential = Literal["difference", "max"]
RewardOutput = Literal["logit", "log_softmax"]
"""Of a classifier's label: its logit, or log p(label), p being the softmax over all labels."""
RewardInput = Literal["response", "pair"]
"""What an encoder reads: the response alone, or what it answers and the response."""
BlocksFrom = Literal["prompt_end", "start"]
"""Where block-causal attention counts its blocks from: the prompt's end (BD3LM), or position 0 (SDAR)."""

ADAPTIVE_ALGORITHMS: frozenset[str] = frozenset({"entropy_bound", "threshold"})
"""Those that choose at every step how many positions to reveal. Not exact: tokens revealed together do not see each
other, and no schedule says how many they are."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `name` is its author's, for templates that write it."""

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What is sampled, and how often. `temperature` 0 means argmax; `top_k` None keeps every token."""

    max_tokens: int
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 0
    n: int = 1
    best_of: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """How the canvas is filled (algorithm.md, section 1). `entropy_bound` is in nats; it and `confidence_threshold`
    each belong to one algorithm and mean nothing to the others. `blocks_from` is None for full attention; otherwise
    attention is block-causal and there is a `block_length` (ValueError without one)."""

    steps: int
    algorithm: Algorithm = "entropy"
    algorithm_temperature: float | None = None
    deprioritize_eos: bool = True
    block_length: int | None = None
    schedule: Schedule = "linear"
    cfg_scale: float = 0.0
    entropy_bound: float = 0.1
    confidence_threshold: float = 0.9
    blocks_from: BlocksFrom | None = None

    def __post_init__(self) -> None:
        if self.block_causal and self.block_length is None:
            raise ValueError("block-causal attention needs a block length")

    @property
    def block_causal(self) -> bool:
        """Whether the response is written block by block, each seeing what is before it and itself alone."""
        return self.blocks_from is not None

    @property
    def adaptive(self) -> bool:
        """Whether the algorithm chooses at every step how many positions to reveal."""
        return self.algorithm in ADAPTIVE_ALGORITHMS


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """The name of a loaded reward model or of a scorer, and its weight in the objective."""

    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Resampling:
    """The K trajectories of a job as particles (algorithm.md, section 5): after every `every` steps, better ones are
    copied over worse ones. A particle's weight is exp(`strength` x score), the score being the reward of what it would
    say now, or, by "confidence", the log probability of the tokens that it has revealed. With the potential "max" the
    best reward so far counts. They are resampled when the effective sample size is below `threshold` x K."""

    by: ResampleBy = "reward"
    every: int = 8
    strength: float = 1.0
    potential: Potential = "difference"
    threshold: float = 0.5


@dataclass(frozen=True, slots=True)
class GuidanceParams:
    """How the logits are steered (algorithm.md, section 2), and by what. `method` is a name in `methods.METHODS`.
    `reward_models` have gradients, which steer; `scorers` have none, and are heard with them for final rewards and for
    resampling. Both are empty only where nothing is rewarded. Raises ValueError for an unknown method."""

    method: str = "none"
    reward_models: tuple[WeightedReward, ...] = ()
    gradient_steps: int = 3
    eta: float = 0.5
    confidence: Confidence = "base"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    scorers: tuple[WeightedReward, ...] = ()
    resample: Resampling | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"there is no guidance method {self.method!r}")

    @property
    def rewards(self) -> tuple[WeightedReward, ...]:
        """All terms of the reward, those without a gradient last."""
        return self.reward_models + self.scorers

    @property
    def resampled_by(self) -> ResampleBy | None:
        """What trajectories are resampled by, None where they are not."""
        return None if self.resample is None else self.resample.by

    @property
    def uses_gradient(self) -> bool:
        """Whether the method moves logits along the reward's gradient."""
        return METHODS[self.method].weight is not None

    @property
    def inner_steps(self) -> int:
        """How often a guided step moves them: M, or 0 for a method that does not."""
        return self.gradient_steps if self.uses_gradient else 0


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of one request, as the engine takes it.

    `conversation` is what the reward model reads before the response (for a raw prompt: that prompt as one user
    message). `suffix_ids` follow the canvas in the diffusion model's context (infilling); `response_suffix` is
    the same text behind the completion for the reward model, and `response_prefix` is text that stands at the end of
    the prompt and begins the response for the reward model. A lower `priority` goes first: what somebody waits for has
    0, a line of a batch 1. `deadline` is in seconds of `time.time()`. Some steps of a `timed` job are reported with
    what their parts took. `adapter` is the version of the LoRA adapter that the diffusion
    model runs with, None for the base alone.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    diffusion: DiffusionParams
    guidance: GuidanceParams = GuidanceParams()
    prompt_index: int = 0
    suffix_ids: tuple[int, ...] = ()
    conversation: tuple[Message, ...] = ()
    response_prefix: str = ""
    response_suffix: str = ""
    priority: int = 0
    deadline: float | None = None
    stream_tokens: bool = False
    stream_canvas: bool = False
    return_token_ids: bool = False
    return_step_map: bool = False
    trace: bool = False
    timed: bool = False
    adapter: str | None = None

    @property
    def reads_rewards(self) -> bool:
        """Whether reward models read its canvas between denoising steps: to steer, or for the trace."""
        return bool(self.guidance.reward_models) and (self.guidance.inner_steps > 0 or self.trace)

    @property
    def shows_canvas(self) -> bool:
        """Whether more of its canvases is asked for than their texts, which end at a stop token."""
        shown = self.return_token_ids or self.return_step_map or self.stream_canvas or self.trace
        return shown or self.sampling.ignore_eos

    def whole(self, text: str) -> str:
        """A response's text as rewards read it."""
        return self.response_prefix + text + self.response_suffix

    @property
    def lead(self) -> int:
        """How many prompt tokens are in the block in which the response begins."""
        length = self.diffusion.block_length
        return len(self.prompt_ids) % length if length and self.diffusion.blocks_from == "start" else 0


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One denoising step of one trajectory. Entropy in nats; `mean_w` is None on unguided steps, where both rewards are
    that of the estimate. Without a reward model, and on steps that reveal nothing, they are None."""

    step: int
    """Which step it was, from 0"""
    time: float
    """t at its beginning, which falls from 1 to 0"""
    masked: int
    """Positions that were masked before it"""
    revealed: int
    """Positions that it revealed"""
    mean_entropy: float | None = None
    """Nats, over the masked positions whose logits it took: with blocks often those of its own block alone"""
    mean_w: float | None = None
    """The mean weight of hard embeddings; null where it was not guided"""
    reward_before: float | None = None
    """The reward of the estimate before the gradient steps"""
    reward_after: float | None = None
    """The same after them"""
    reward_estimate: float | None = None
    """Where the trajectories met after it: the reward of the text as it would be now, or the log probability so far"""
    log_weight: float | None = None
    """There: the logarithm of its weight, before it was normalised"""
    ancestor: int | None = None
    """There: the trajectory whose copy it went on as; its own index where nothing was copied"""


@dataclass(frozen=True, slots=True)
class TrajectoryResult:
    """A finished trajectory. `token_ids` has all L canvas tokens; `completion_tokens` counts those before the end
    of the text; `rewards` maps the name of each reward model and scorer to its value and `reward` is their weighted
    sum; a scorer that did not answer before the deadline has None, and then there is no sum. `step_map` has
    the step at which each of the L tokens was revealed, -1 where none was, if the job asks for it. `model_calls` and
    `reward_calls` count the passes of the diffusion model and of reward models that its denoising steps and meetings
    asked for; what it shared with equal canvases is counted too, and final scores are not."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    completion_tokens: int
    stop_reason: str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    step_map: tuple[int, ...] = ()
    model_calls: int = 0
    reward_calls: int = 0
    trace: tuple[StepTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class JobResult:
    """All K trajectories in index order, and the indices of the n best, best first.

    Of a job that resamples, `resampled` has a row for each time that trajectories were copied: the number of steps
    taken, and each trajectory's ancestor; `weights` are the normalised weights of the K, None where a final score is
    missing. Other jobs have neither."""

    trajectories: tuple[TrajectoryResult, ...]
    chosen: tuple[int, ...]
    steps: int
    queue_ms: float
    generation_ms: float
    resampled: tuple[tuple[int, tuple[int, ...]], ...] = ()
    weights: tuple[float, ...] | None = None

    @property
    def model_calls(self) -> int:
        """Of the trajectory that asked for the most."""
        return max(trajectory.model_calls for trajectory in self.trajectories)

    @property
    def reward_calls(self) -> int:
        """Of the trajectory that asked for the most."""
        return max(trajectory.reward_calls for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the HTTP side needs to know of the loaded diffusion model. `tokenizer_path` is a local folder. For what a
    request leaves out, `diffusion_defaults` are the family's own of `DiffusionParams` and `template_arguments` those of
    the chat template; `blocks_from` is None for full attention."""

    id: str
    family: str
    tokenizer_path: str
    context_length: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    default_max_tokens: int
    dtype: str
    parameters: int
    diffusion_defaults: dict[str, str | int] = field(default_factory=dict)
    template_arguments: dict[str, bool] = field(default_factory=dict)
    blocks_from: BlocksFrom | None = None


@dataclass(frozen=True, slots=True)
class RewardModelInfo:
    """A loaded reward model: its name, its context length and, where it has a gradient, the share of the diffusion
    vocabulary that it knows. The reward is the `output` of the label named `label`, None where there is one label. What
    has no gradient is an encoder, and reads its `input`; the others read the conversation in their chat template."""

    id: str
    family: str
    context_length: int
    vocab_coverage: float | None
    vocab_fallback: Literal["unk", "zero"] | None
    dtype: str
    parameters: int
    gradient: bool = True
    label: str | None = None
    output: RewardOutput = "logit"
    input: RewardInput | None = None


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a stack of decoder blocks, as far as memory depends on them: widths in channels."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    layers: int


@dataclass(frozen=True, slots=True)
class Way:
    """How a part of the work ("device", "kernels", "attention", "graphs") is done here, for one model or (an empty
    name) for all, and why, where that is not what would be best."""

    part: str
    model: str
    how: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Sent by the worker when it is ready. `largest` is what one trajectory may take and `shared` what all that run at
    once may; more can never run here. `ways` is what was decided at load."""

    model: ModelInfo
    reward_models: tuple[RewardModelInfo, ...]
    device: str
    kernel_backend: str
    largest: Budget = field(default_factory=Budget)
    shared: Budget = field(default_factory=Budget)
    ways: tuple[Way, ...] = ()
