"""Diffusion, watched: every trajectory's canvas in the terminal, redrawn after each denoising step."""

from __future__ import annotations

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from .events import CanvasFrame
from .terminal import printable

MASKED = "░"
SHOWN_TRAJECTORIES = 8
# Entropy in nats below which a token counts as certain, likely, unsure; above the last: a guess.
_STYLES = ((0.1, "bold"), (1.0, ""), (2.5, "yellow"), (float("inf"), "red"))


class CanvasView:
    """The newest frame of each trajectory, as something that rich can draw."""

    def __init__(self) -> None:
        self._frames: dict[tuple[int, int], CanvasFrame] = {}

    def update(self, frame: CanvasFrame) -> None:
        """Take a new frame."""
        self._frames[frame.prompt, frame.trajectory] = frame

    def __rich__(self) -> Group:
        shown = [self._frames[key] for key in sorted(self._frames)][:SHOWN_TRAJECTORIES]
        hidden = len(self._frames) - len(shown)
        parts: list[Panel | Text] = [_panel(frame) for frame in shown]
        if hidden:
            parts.append(Text(f"and {hidden} more", style="dim"))
        return Group(*parts)


def _panel(frame: CanvasFrame) -> Panel:
    body = Text()
    for position, token in enumerate(frame.tokens):
        if token is None:
            body.append(MASKED, style="dim")
        else:
            body.append(printable(token), style=_style(frame, position))
    reward = "" if frame.reward is None else f" · reward {frame.reward:.2f}"
    copy = "" if frame.ancestor is None else f" (copy of {frame.ancestor})"
    return Panel(body, title=f"trajectory {frame.trajectory}{copy} · step {frame.step}{reward}", title_align="left")


def _style(frame: CanvasFrame, position: int) -> str:
    entropy = frame.entropy[position] if frame.entropy and position < len(frame.entropy) else None
    if entropy is None:
        return ""
    return next(style for bound, style in _STYLES if entropy < bound or bound == float("inf"))
