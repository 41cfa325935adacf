"""The list of things that can be said between the HTTP process and the worker process, and nothing else.

Every message is a tagged msgspec struct in msgpack; the dataclasses of `server.types` nest inside as they
are. A frame is a four-byte big-endian length and that many bytes. No pickle, so a frame can hold data only.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import msgspec

from server.types import EngineInfo, Job, JobResult, Message
from server.wire.config import WorkerConfig
from server.wire.stats import RunnerStats

MAX_FRAME_BYTES = 64 * 2**20
LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """The other side sent what is no message, or a frame over the limit."""


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


class Heartbeat(_Wire, frozen=True):
    """Sent about every second, and before an answer. `busy`: it has work; `step_seconds`: how long the
    current step has been running (0 when idle)."""

    stats: RunnerStats
    busy: bool = False
    step_seconds: float = 0.0


class Begun(_Wire, frozen=True):
    """From now on the worker computes for this job. Said before the first computation, so that when the worker dies
    it is known who may have killed it."""

    job_id: str


class Started(_Wire, frozen=True):
    """The first trajectory of a job left the queue, and its first step is done."""

    job_id: str


class Progress(_Wire, frozen=True):
    """Response positions that a step revealed, as (position, token id). Only for jobs with
    `stream_tokens`."""

    job_id: str
    trajectory: int
    step: int
    revealed: list[tuple[int, int]]


class Canvas(_Wire, frozen=True):
    """A trajectory's L response tokens after a step, -1 where masked; entropy in nats by position, None where
    revealed; the reward that guidance last saw. Only for jobs with `stream_canvas`."""

    job_id: str
    trajectory: int
    step: int
    token_ids: list[int]
    entropy: list[float | None] | None = None
    reward: float | None = None


class Finished(_Wire, frozen=True):
    """The answer of a job."""

    job_id: str
    result: JobResult


class Failed(_Wire, frozen=True):
    """A job or a score request ends without an answer. `kind` names the class in `server.errors`."""

    job_id: str
    kind: str
    message: str
    param: str | None = None


class Scored(_Wire, frozen=True):
    """The answer of a score request: one reward an item, in order, and how many tokens were read for all of them."""

    id: str
    scores: list[float]
    tokens: int


ToWorker: TypeAlias = Configure | Submit | Cancel | Score | Shutdown
JobEvent: TypeAlias = Begun | Started | Progress | Canvas | Finished | Failed
Event: TypeAlias = JobEvent | Scored | Ready | Heartbeat | WorkerError
AnyMessage: TypeAlias = ToWorker | Event

_encoder = msgspec.msgpack.Encoder()
# mypy does not see that a union is a type form, hence the annotations.
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def subject(event: Event) -> str | None:
    """The id of the job or score request that an event is about, or None."""
    match event:
        case Scored(id=identity):
            return identity
        case Ready() | Heartbeat() | WorkerError():
            return None
        case _:
            return event.job_id


def frame(message: AnyMessage, limit_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The message as a frame. Raises FrameTooLarge over the limit, TypeError for what msgpack cannot hold."""
    try:
        body = _encoder.encode(message)
    except OverflowError as error:
        raise TypeError(f"{type(message).__name__} holds an integer of more than 64 bits") from error
    if len(body) > limit_bytes:
        raise FrameTooLarge(f"{type(message).__name__} takes {len(body)} bytes; a frame holds {limit_bytes}")
    return LENGTH.pack(len(body)) + body


def body_length(prefix: bytes | bytearray | memoryview, limit_bytes: int = MAX_FRAME_BYTES) -> int:
    """How many bytes follow the four-byte prefix. Raises ProtocolError over the limit, before anything is
    allocated."""
    length: int = LENGTH.unpack(prefix)[0]
    if length > limit_bytes:
        raise ProtocolError(f"a frame of {length} bytes is announced; the limit is {limit_bytes}")
    return length


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """A message to the worker. Raises ProtocolError for anything else."""
    try:
        return _to_worker.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"no message to the worker: {error}") from error


def decode_event(body: bytes | memoryview) -> Event:
    """An event of the worker. Raises ProtocolError for anything else."""
    try:
        return _event.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"no event of the worker: {error}") from error
