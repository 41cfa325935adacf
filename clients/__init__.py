"""Clients of the server. They speak HTTP and import nothing of it.

    from clients import Client, Guidance

    with Client("http://127.0.0.1:8000") as client:
        completion = client.complete("Write a short review of a hotel.", guidance=Guidance("entrgi"), best_of=4)
        print(completion.choices[0].reward, completion.choices[0].text)

`Client` and `AsyncClient` have the same methods. Any OpenAI client works with the server too; these know the fields
that OpenAI's do not: guidance, diffusion, rewards and the canvas.
"""

from .aio import AsyncClient, AsyncEventStream
from .client import Client, EventStream
from .errors import (
    ApiError,
    AuthenticationFailed,
    BadRequest,
    BodyTooLarge,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    NotFound,
    QueueFull,
    ScorerFailed,
    ServerFailed,
    StreamBroken,
    Unavailable,
    UnexpectedResponse,
)
from .events import CanvasFrame, ChoiceFinished, Event, Summary, TextDelta
from .options import Diffusion, Guidance, Message, Options, Resample, WeightedReward
from .retry import RetryPolicy
from .types import (
    ChatChoice,
    ChatCompletion,
    Choice,
    Completion,
    GuidanceReport,
    Model,
    Rerank,
    RerankResult,
    Score,
    Scores,
    StepTrace,
    Tokenized,
    Usage,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncEventStream",
    "AuthenticationFailed",
    "BadRequest",
    "BodyTooLarge",
    "CanvasFrame",
    "ChatChoice",
    "ChatCompletion",
    "Choice",
    "ChoiceFinished",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Diffusion",
    "Event",
    "EventStream",
    "Guidance",
    "GuidanceReport",
    "Message",
    "Model",
    "NotFound",
    "Options",
    "QueueFull",
    "Rerank",
    "RerankResult",
    "Resample",
    "RetryPolicy",
    "Score",
    "ScorerFailed",
    "Scores",
    "ServerFailed",
    "StepTrace",
    "StreamBroken",
    "Summary",
    "TextDelta",
    "Tokenized",
    "Unavailable",
    "UnexpectedResponse",
    "Usage",
    "WeightedReward",
]
