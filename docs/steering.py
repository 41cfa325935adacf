"""README's picture: one request guided and unguided on the same seed, as an animated SVG.

`make serve`, then `python -m docs.steering` runs both through the server, with all their canvases, and draws one
trajectory of each, token by token, above the rewards of all. Whoever asks for less motion gets the last frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from clients import CanvasFrame, Client, Guidance, Summary

OUT = Path(__file__).with_name("plots") / "steering.svg"
WIDTH, MARGIN, FONT = 560, 18, 14
ADVANCE, LINE = 0.6 * FONT, 25  # of one character, and from line to line
PLOT = 130
STEP, HOLD = 0.17, 4.0  # seconds
PANELS = (("none", "plain", "Unguided"), ("entrgi", "guided", "Guided by EntRGi"))
"""Method, class of the style, title."""

STYLE = """
:root { --card: #fffdf8; --ink: #23211d; --soft: #665f55; --line: #ddd7ca;
  --open: #5b3b9e; --plain: #1a659a; --guided: #a84a22 }
@media (prefers-color-scheme: dark) { :root { --card: #221f1b; --ink: #ece7dd; --soft: #a9a193; --line: #3a352d;
  --open: #b79cf5; --plain: #73b8e6; --guided: #e58656 } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
text { fill: var(--ink); font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.title { font: 600 14px system-ui, sans-serif } .note { font: 12px system-ui, sans-serif; fill: var(--soft) }
.end { fill: var(--soft); opacity: .5 }
.card, .cover { fill: var(--card) } .card, .grid { stroke: var(--line) }
.cover { transform: scaleX(0); transform-box: fill-box; transform-origin: right }
.masked { fill: var(--open); stroke: var(--soft); stroke-width: .5; opacity: 0 }
polyline { fill: none; opacity: .5 } .mean { stroke-width: 2.5; opacity: 1 }
.plain { stroke: var(--plain); stroke-dasharray: 6 3 } .guided { stroke: var(--guided) }
text.plain { fill: var(--plain); stroke: none } text.guided { fill: var(--guided); stroke: none }
"""


@dataclass(frozen=True, slots=True)
class Run:
    """The canvases of four trajectories, step after step, and their final rewards."""

    frames: list[list[CanvasFrame]]
    rewards: list[float]

    def curve(self, trajectory: int) -> list[float]:
        """The reward that was read in each step."""
        return [frame.reward for frame in self.frames[trajectory] if frame.reward is not None]

    @property
    def mean(self) -> list[float]:
        """The mean of all curves."""
        curves = [self.curve(trajectory) for trajectory in range(len(self.frames))]
        return [sum(rewards) / len(rewards) for rewards in zip(*curves, strict=True)]


def ask(client: Client, prompt: str, method: str, seed: int) -> Run:
    """Ask for it. A trace reads the reward in every step, which without guidance nothing else does."""
    frames: list[list[CanvasFrame]] = [[] for _ in range(4)]
    rewards: list[float | None] = []
    guidance = Guidance(method, reward_model="sentiment")
    for event in client.stream_complete(prompt, canvas=True, guidance=guidance, seed=seed, n=4, best_of=4, trace=True):
        if isinstance(event, CanvasFrame):
            frames[event.trajectory].append(event)
        elif isinstance(event, Summary) and event.guidance and event.guidance.rewards:
            rewards = event.guidance.rewards[0]
    return Run(frames, [reward for reward in rewards if reward is not None])


class Timeline:
    """The style's rules for what changes from step to step of the loop that the animation is."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, steps * STEP + HOLD
        self.rules: dict[str, str] = {}

    def changing(self, name: str, keys: Sequence[tuple[int, str]]) -> str:
        """The class `name` of something that has these declarations, each from its step on."""
        frames = "".join(f"{100 * step * STEP / self.seconds:.1f}%{{{declared}}}" for step, declared in keys)
        animation = f".{name}{{animation:{name} {self.seconds:.1f}s step-end infinite}}"
        self.rules[name] = f"@keyframes {name}{{{frames}}}{animation}"
        return name

    def appearing(self, step: int) -> str:
        """The class of what is there from a step on."""
        return self.changing(f"from{step}", [(0, "opacity:0"), (step, "opacity:1")])


def text(x: float, y: float, words: str, kind: str, more: str = "") -> str:
    """A line of text that begins at x or, with an `anchor` in `more`, ends there."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


RIGHT = ' text-anchor="end"'


def places(words: Sequence[str], y: float) -> Iterator[tuple[float, float]]:
    """Where each token begins, (x, y); a line ends before a token that has no room."""
    x = float(MARGIN)
    for word in words:
        blank = ADVANCE * (len(word) - len(word.lstrip()))
        width = ADVANCE * len(word.lstrip())
        x += blank if x > MARGIN else 0
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        yield x, y
        x += width + 1


def shades(frames: Sequence[CanvasFrame], place: int, most: float) -> list[tuple[int, str]]:
    """How a masked position looks before the first step and after each, until it is revealed; equal ones once."""
    entropies = [(frame.entropy or [])[place] for frame in frames]
    opacities = [0.5, *(0.12 + 0.8 * entropy / most for entropy in entropies if entropy is not None)]
    looks = [f"opacity:{opacity:.2f}" for opacity in opacities]
    changes = [step for step, look in enumerate(looks) if step == 0 or look != looks[step - 1]]
    return [*((step, looks[step]) for step in changes), (len(looks), "opacity:0")]


def canvas(
    frames: Sequence[CanvasFrame], name: str, top: float, most: float, time: Timeline
) -> tuple[list[str], float]:
    """The tokens of one trajectory, masked ones as boxes in the colour of their entropy; and the last line's y."""
    tokens = [token or "" for token in frames[-1].tokens]
    first_end = next((place for place, token in enumerate(tokens) if token.startswith("<|")), len(tokens))
    words = [*tokens[:first_end], *["·"] * (len(tokens) - first_end)]
    parts, y = [], top
    for place, (x, y) in enumerate(places(words, top)):
        looks = shades(frames, place, most)
        word, kind = words[place].strip(), "end " if place >= first_end else ""
        width = ADVANCE * len(word)
        box = time.changing(f"{name}{place}", looks)
        parts.append(
            f'<rect class="masked {box}" x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="17" rx="2"/>'
        )
        parts.append(text(x, y, word, kind + time.appearing(looks[-1][0]), f' textLength="{width:.1f}"'))
    return parts, y


def plot(runs: Sequence[Run], top: float, time: Timeline) -> list[str]:
    """Reward by step: a thin line for each trajectory, a thick one for their mean. A cover moves off them with time."""
    left, right, steps = MARGIN + 26.0, WIDTH - MARGIN - 74.0, time.steps
    curves = [[run.curve(trajectory) for trajectory in range(len(run.frames))] for run in runs]
    rewards = [reward for each in curves for curve in each for reward in curve]
    low, high = min(rewards) - 0.1, max(rewards) + 0.1

    def height(reward: float) -> float:
        return top + PLOT * (high - reward) / (high - low)

    def line(curve: Sequence[float], kind: str) -> str:
        x = [left + (right - left) * step / (steps - 1) for step in range(len(curve))]
        points = " ".join(f"{at:.1f},{height(reward):.1f}" for at, reward in zip(x, curve, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = []
    for run, each, (_, kind, _) in zip(runs, curves, PANELS, strict=True):
        parts += [*(line(curve, kind) for curve in each), line(run.mean, f"mean {kind}")]
    left_to_come = [1 - max(0, step - 1) / (steps - 1) for step in range(steps + 1)]
    moves = [(step, f"transform:scaleX({share:.3f})") for step, share in enumerate(left_to_come)]
    size = f'x="{left}" y="{top - 2:.1f}" width="{right - left + 2}" height="{PLOT + 4}"'
    parts.append(f'<rect class="{time.changing("cover", moves)}" {size}/>')
    for tick in range(round(low), int(high) + 1):
        parts.append(f'<path class="grid" d="M{left} {height(tick):.1f}H{right}"/>')
        parts.append(text(left - 8, height(tick) + 4, str(tick).replace("-", "−"), "note", RIGHT))
    for run, (_, kind, title) in zip(runs, PANELS, strict=True):
        parts.append(
            text(right + 8, height(run.mean[-1]) + 4, title.split()[0].lower(), f"note {kind} {time.appearing(steps)}")
        )
    return [*parts, text(left, top + PLOT + 20, "Reward by step: four trajectories each, and their mean", "note")]


def picture(runs: Sequence[Run], trajectory: int, prompt: str) -> str:
    """The whole SVG."""
    shown = [run.frames[trajectory] for run in runs]
    time = Timeline(len(shown[0]))
    most = max(entropy or 0.0 for frames in shown for frame in frames for entropy in frame.entropy or [])
    parts, y = [text(MARGIN, 26, f"“{prompt}” The same seed twice; the darker, the less certain.", "note")], 26.0
    for run, frames, (method, kind, title) in zip(runs, shown, PANELS, strict=True):
        reward = f"reward {run.rewards[trajectory]:+.2f}".replace("-", "−")
        parts.append(text(MARGIN, y + 34, title, f"title {kind}"))
        parts.append(text(WIDTH - MARGIN, y + 34, reward, f"title {kind} {time.appearing(time.steps)}", RIGHT))
        tokens, y = canvas(frames, method[0], y + 60, most, time)
        parts += tokens
    parts += plot(runs, y + 30, time)
    height = y + PLOT + 64
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    style = STYLE + "\n".join(time.rules.values())
    card = f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="10"/>'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>", card, *parts, "</svg>\n"]
    return "\n".join(lines)


def main() -> None:
    """Ask, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m docs.steering", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a server with the bundled models")
    parser.add_argument("--prompt", default="Write a short review of a hotel.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--trajectory", type=int, default=1, help="which of the four is shown, from 0")
    given = parser.parse_args()
    with Client(given.url) as client:
        runs = [ask(client, given.prompt, method, given.seed) for method, _, _ in PANELS]
    OUT.write_text(picture(runs, given.trajectory, given.prompt), "utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")
    for each, (method, _, _) in zip(runs, PANELS, strict=True):
        print(method, each.rewards)


if __name__ == "__main__":
    main()
