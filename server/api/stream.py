"""Server-sent events: text as it becomes sure, canvases, the end of each choice, and errors after the first byte.

OpenAI's clients can only append. A diffusion model reveals tokens anywhere, so text is sent when the run of revealed
tokens that touches the left edge grows. Where several trajectories compete, the winner's text comes at the end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answers import Data, choice, chosen, counted, head, report, usage
from server.api.body import unless_disconnected
from server.api.convert import Plan
from server.api.errors import envelope, unexpected
from server.api.fields import StreamOptions
from server.api.frontend import Frontend
from server.api.generation import events
from server.errors import ClientGone, RequestError
from server.log import note
from server.text.response import StreamDecoder
from server.text.tokenizer import Tokenizer
from server.types import JobResult
from server.wire.messages import Canvas, Event, Finished, Progress

# A failure that shows itself this soon gets its own status; after that the stream begins.
FIRST_EVENT_SECONDS = 1.0
KEEP_ALIVE = b": keep-alive\n\n"
# They end no line of server-sent events, but a client that splits with str.splitlines would cut the event there.
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}

Sequence = AsyncGenerator[tuple[int, Event]]


def encode(data: Data) -> bytes:
    """One event, which only its own end cuts into lines; its name is its `type`, if it has one."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).translate(LINE_ENDS)
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {text}\n\n".encode()


async def open_stream(frontend: Frontend, plan: Plan, tokenizer: Tokenizer, shape: type[Chunks]) -> EventStream:
    """Submit the jobs and wait a moment for a refusal, which is raised; then the response that streams the rest in the
    form of `shape`."""
    sequence = events(frontend, plan)
    first = asyncio.ensure_future(anext(sequence))
    try:
        await asyncio.wait({first}, timeout=FIRST_EVENT_SECONDS)
    except asyncio.CancelledError:
        await _abandon(first, sequence)
        raise
    if first.done() and first.exception() is not None:
        await first  # raises
    return EventStream(frontend, sequence, first, shape(plan, tokenizer, frontend.engine.info.model.stop_token_ids))


class EventStream(Response):
    """Sends a plan's events until they end or the client goes; then the jobs are cancelled."""

    media_type = "text/event-stream"

    def __init__(
        self, frontend: Frontend, sequence: Sequence, first: asyncio.Future[tuple[int, Event]], chunks: Chunks
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frontend = frontend
        self._sequence = sequence
        self._pending = first
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send for as long as the client stays."""
        try:
            await unless_disconnected(receive, self._send_all(send))
        except ClientGone as gone:
            note(error_code=gone.code, error_status=gone.status)
        finally:
            await _abandon(self._pending, self._sequence)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._data():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncGenerator[bytes]:
        """The bytes of the stream, keep-alive comments included."""
        for chunk in self._chunks.begin():
            yield encode(chunk)
        while True:
            done, _ = await asyncio.wait({self._pending}, timeout=self._frontend.settings.stream_comment_seconds)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                index, event = self._pending.result()
                made = list(self._chunks.feed(index, event))
            except StopAsyncIteration:
                break
            except Exception as error:
                if not isinstance(error, RequestError):
                    error = unexpected(error)
                note(error_code=error.code, error_status=error.status)
                self._frontend.metrics.refused(error)
                yield encode(self._chunks.failed(error))
                break
            self._pending = asyncio.ensure_future(anext(self._sequence))
            for chunk in made:
                yield encode(chunk)
        yield self._chunks.last


async def _abandon(pending: asyncio.Future[tuple[int, Event]], sequence: Sequence) -> None:
    """End a sequence that may be waiting for its next event."""
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await sequence.aclose()


class Chunks:
    """Turns events into OpenAI's chunks. `last` ends the stream."""

    last = b"data: [DONE]\n\n"

    def __init__(self, plan: Plan, tokenizer: Tokenizer, stop_token_ids: tuple[int, ...]) -> None:
        self._plan = plan
        self._mode = plan.asked.stream_options or StreamOptions.model_validate({})
        self._tokenizer = tokenizer
        self._results: dict[int, JobResult] = {}
        n = plan.sampling.n
        self._texts = {
            index * n + choice: StreamDecoder(tokenizer, stop_token_ids, job.sampling.stop, job.sampling.ignore_eos)
            for index, job in enumerate(plan.jobs)
            for choice in range(n)
        }
        self._token_texts: dict[int, str] = {}

    def begin(self) -> Iterator[Data]:
        """The chunks that open a chat stream: the role of each choice."""
        if self._plan.chat:
            for index in self._texts:
                yield self._chunk(self._choice(index, {"role": "assistant", "content": ""}))

    def failed(self, error: RequestError) -> Data:
        """The chunk that tells of a failure."""
        return envelope(error)

    def feed(self, prompt: int, event: Event) -> Iterator[Data]:
        """The chunks of one event of one prompt."""
        match event:
            case Progress(trajectory=trajectory, revealed=revealed):
                index = prompt * self._plan.sampling.n + trajectory
                if delta := self._texts[index].reveal(revealed):
                    yield self._text_chunk(index, delta)
            case Canvas():
                canvas = {
                    "prompt": prompt,
                    "trajectory": event.trajectory,
                    "step": event.step,
                    "tokens": [None if token < 0 else self._token_text(token) for token in event.token_ids],
                    "entropy": event.entropy,
                    "reward": event.reward,
                    "ancestor": event.ancestor,
                }
                yield self._chunk() | {"canvas": canvas}
            case Finished(result=result):
                yield from self._finished(prompt, result)

    def _finished(self, prompt: int, result: JobResult) -> Iterator[Data]:
        """The rest of each choice's text and its end; with the last prompt also what concerns the whole request."""
        plan = self._plan
        self._results[prompt] = result
        results = [self._results[each] for each in sorted(self._results)]
        whole = len(results) == len(plan.jobs)
        answers = chosen(result)
        for rank, answer in enumerate(answers):
            index = prompt * plan.sampling.n + rank
            text = self._texts[index]
            text.tokens = answer.completion_tokens
            if rest := text.rest(answer.text):
                yield self._text_chunk(index, rest)
            end = self._chunk(self._choice(index, {} if plan.chat else "") | choice(plan, index, answer))
            yield end | report(plan, results) if whole and rank == len(answers) - 1 else end
        if whole and self._mode.include_usage:
            yield self._chunk() | {"usage": usage(plan, results)}

    def _text_chunk(self, index: int, text: str) -> Data:
        return self._chunk(self._choice(index, {"content": text} if self._plan.chat else text))

    def _choice(self, index: int, content: dict[str, str] | str) -> Data:
        key = "delta" if self._plan.chat else "text"
        return {"index": index, key: content, "logprobs": None, "finish_reason": None}

    def _token_text(self, token: int) -> str:
        """One token by itself; special ones by name, parts of characters as U+FFFD."""
        if token not in self._token_texts:
            self._token_texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._token_texts[token]

    def _chunk(self, *choices: Data) -> Data:
        chunk = head(self._plan, "chat.completion.chunk" if self._plan.chat else "text_completion", [*choices])
        if self._mode.continuous_usage_stats:
            tokens = sum(text.tokens for text in self._texts.values())
            chunk["usage"] = counted(self._plan.prompt_tokens, tokens, tokens)
        elif self._mode.include_usage:
            chunk["usage"] = None
        return chunk
