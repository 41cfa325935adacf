"""The list of things that can be said between the HTTP process and the worker process, and nothing else.

Every message is a tagged msgspec struct in msgpack; the dataclasses of `server.types` nest inside as they
are. A frame is a four-byte big-endian length and that many bytes. No pickle, so a frame can hold data only.
"""

from __future__ import annotations

import struct
from typing import TypeAlias, TypeVar

import msgspec

from server.errors import BY_KIND, EngineFailed, RequestError
from server.types import EngineInfo, Job, JobResult, Message
from server.wire.config import WorkerConfig
from server.wire.stats import RunnerStats

MAX_FRAME_BYTES = 64 * 2**20
LENGTH = struct.Struct(">I")


class ChannelClosed(Exception):
    """Nothing more comes from the other end: its process has ended, or has let go of us."""


class ProtocolError(ChannelClosed):
    """The other end sent what is no message, or a frame over the limit; what follows cannot be trusted."""


class FrameTooLarge(ValueError):
    """A message of ours takes more than a frame may hold."""


class _Wire(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: the class name is the tag, fields go by position."""


# -- to the worker -------------------------------------------------------------------------------------------


class Configure(_Wire, frozen=True):
    """Load these models. The first message, once."""

    config: WorkerConfig


class Submit(_Wire, frozen=True):
    """Queue a job."""

    job: Job


class Cancel(_Wire, frozen=True):
    """Forget a job or a score request before the next denoising step. No event answers it."""

    id: str


class Score(_Wire, frozen=True):
    """Reward of each (conversation, response) under one reward model."""

    id: str
    reward_model: str
    items: list[tuple[tuple[Message, ...], str]]


class Judged(_Wire, frozen=True):
    """What the outside scorers said of the texts of an Ask: by scorer, one score a text. None in place of all of them
    says that none will come before the job's deadline. A job that is not here any more, or does not wait for this, is
    ignored."""

    job_id: str
    step: int
    scores: dict[str, list[float]] | None


class SetAdapters(_Wire, frozen=True):
    """Have exactly these adapters, by version, from their folders. AdaptersSet answers it."""

    folders: dict[str, str]


class Shutdown(_Wire, frozen=True):
    """End the process; running jobs are dropped."""


# -- from the worker -----------------------------------------------------------------------------------------


class Ready(_Wire, frozen=True):
    """The models are loaded and a guided job has run."""

    info: EngineInfo


class WorkerError(_Wire, frozen=True):
    """The worker ends itself. `configuration` says that a setting or a checkpoint is wrong, so that a restart
    would not help."""

    message: str
    configuration: bool = False


class AdaptersSet(_Wire, frozen=True):
    """The versions of adapters that are there now, and why others are not."""

    held: list[str]
    refused: dict[str, str]


class Heartbeat(_Wire, frozen=True):
    """Sent about every second, and before an answer. `step_seconds`: how long the current step has been running (0 when
    idle)."""

    stats: RunnerStats
    step_seconds: float = 0.0


class _About(_Wire, frozen=True):
    """Base of what is said about one job, or one score request: its id."""

    job_id: str


class Begun(_About, frozen=True):
    """From now on the worker computes for this job. Said before the first computation, so that when the worker dies
    it is known which ones may have killed it."""


class Started(_About, frozen=True):
    """The first trajectory of a job left the queue, and its first step is done."""


class Progress(_About, frozen=True):
    """Response positions that a step revealed, as (position, token id). Only for jobs with `stream_tokens`."""

    trajectory: int
    step: int
    revealed: list[tuple[int, int]]


class Canvas(_About, frozen=True):
    """A trajectory's L response tokens after a step, -1 where masked; entropy in nats by position, None where
    revealed; the reward that guidance last saw. `ancestor` is the trajectory whose copy it is since the last meeting
    after which it was copied, None where there was none. Only for jobs with `stream_canvas`."""

    trajectory: int
    step: int
    token_ids: list[int]
    entropy: list[float | None] | None = None
    reward: float | None = None
    ancestor: int | None = None


class Ask(_About, frozen=True):
    """Outside scores are wanted: of a job's K texts, in index order, as a reward would read them (with the response's
    prefix and suffix), at the meeting after `step` steps, or at the end (`step` -1). Judged answers it; until then the
    job is parked and holds nothing of the budgets."""

    step: int
    texts: list[str]


class Timed(_About, frozen=True):
    """What one denoising step took, in seconds; `guidance` includes the reward models' passes, which are `reward`. It
    began at `began` (seconds of `time.time()`), and `trajectories` shared it. Only for jobs that are `timed`."""

    step: int
    trajectories: int
    began: float
    seconds: float
    model: float
    guidance: float
    reward: float


class Finished(_About, frozen=True):
    """The answer of a job."""

    result: JobResult


class Failed(_About, frozen=True):
    """A job or a score request ends with an error. `kind` names its class in `server.errors`."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, job_id: str, error: RequestError) -> Failed:
        """The error as an event."""
        return cls(job_id, error.kind, error.message, error.param)

    def error(self) -> RequestError:
        """The event as an error; an unknown kind is an EngineFailed."""
        return BY_KIND.get(self.kind, EngineFailed)(self.message, self.param)


class Scored(_About, frozen=True):
    """The answer of a score request: one reward an item, in order, and how many tokens were read for all of them."""

    scores: list[float]
    tokens: int


ToWorker: TypeAlias = Configure | Submit | Cancel | Score | Judged | SetAdapters | Shutdown
OfTheWorker: TypeAlias = Ready | AdaptersSet | Heartbeat | WorkerError
Event: TypeAlias = Begun | Started | Progress | Canvas | Ask | Timed | Finished | Failed | Scored | OfTheWorker
Decoded = TypeVar("Decoded")

_encoder = msgspec.msgpack.Encoder()
# mypy does not see that a union is a type form, hence the annotations.
TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
EVENT: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def subject(event: Event) -> str | None:
    """The id of the job or score request that an event is about, or None."""
    return event.job_id if isinstance(event, _About) else None


def frame(message: ToWorker | Event) -> bytes:
    """The message as a frame. Raises FrameTooLarge over the limit, TypeError for what msgpack cannot hold."""
    try:
        body = _encoder.encode(message)
    except OverflowError as error:
        raise TypeError(f"{type(message).__name__} holds an integer of more than 64 bits") from error
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"{type(message).__name__} takes {len(body)} bytes; a frame holds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


def body_length(prefix: bytes | bytearray) -> int:
    """How many bytes follow the four-byte prefix. Raises ProtocolError over the limit, before anything is allocated."""
    length: int = LENGTH.unpack(prefix)[0]
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes is announced; the limit is {MAX_FRAME_BYTES}")
    return length


def decode(decoder: msgspec.msgpack.Decoder[Decoded], body: bytes) -> Decoded:
    """A message of the kind that `decoder` takes, `TO_WORKER` or `EVENT`. Raises ProtocolError for anything else."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"these bytes are no message: {error}") from error
