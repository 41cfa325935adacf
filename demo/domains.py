"""What the demo grammar can review: subjects, sorted into domains, and the parts of each.

Data only. The kinds of adjectives are those of `demo.lexicon`. Aspects are written "noun:kind", with a trailing
"s" flag for plurals ("rooms:place:s").
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Aspect:
    """A part of a subject: its noun, the kind of adjectives that fit it, and whether it is plural."""

    noun: str
    kind: str
    plural: bool = False

    @classmethod
    def parse(cls, text: str) -> Aspect:
        """Read "noun:kind" or "noun:kind:s"."""
        noun, kind, *flag = text.split(":")
        return cls(noun, kind, bool(flag))


@dataclass(frozen=True)
class Domain:
    """What the subjects of one sort share.

    `kind` is the sort of adjectives that fit the subjects themselves; `again` completes "I would gladly ... again";
    `occasion` completes "My ... was lovely". `aspects` are shared by all subjects, each of which adds its own;
    `details` are concrete sentences with slots for numbers ({n}, {m}), ordinals ({o}), days ({d}), months ({mo})
    and colours ({c}).
    """

    kind: str
    again: str
    occasion: str
    aspects: tuple[str, ...]
    details: tuple[str, ...]
    subjects: dict[str, tuple[str, ...]]


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "place",
        "eat there",
        "meal at the {s}",
        ("food:food", "service:people", "menu:value", "staff:people", "prices:value:s", "soup:food", "music:place"),
        (
            "We waited {n} minutes for a table by the window.",
            "The bill for {n} people came to {m} dollars.",
            "I ordered the fish and a glass of {c} wine.",
            "Our waiter brought {n} plates of soup on {d} night.",
            "Lunch cost {n} dollars with coffee and bread.",
            "We sat at table {n} near the kitchen door.",
        ),
        {
            "restaurant": ("desserts:food:s", "waiters:people:s", "steak:food"),
            "cafe": ("coffee:food", "cakes:food:s", "chairs:thing:s"),
            "bakery": ("bread:food", "pastries:food:s", "counter:place"),
            "diner": ("burgers:food:s", "breakfast:food", "booths:place:s"),
            "pizzeria": ("pizza:food", "crust:food", "salad:food"),
            "bar": ("drinks:food:s", "snacks:food:s", "crowd:people"),
        },
    ),
    Domain(
        "place",
        "stay there",
        "stay at the {s}",
        ("staff:people", "location:place", "view:look", "price:value", "kitchen:place", "garden:look"),
        (
            "We stayed {n} nights on the {o} floor.",
            "The room had {n} beds and a {c} door.",
            "Breakfast was served until {n} on {d}.",
            "We paid {m} dollars a night in {mo}.",
            "The sea is {n} minutes away on foot.",
            "Two {c} towels hung in the bathroom.",
        ),
        {
            "hotel": ("rooms:place:s", "breakfast:food", "pool:place", "beds:thing:s"),
            "hostel": ("beds:thing:s", "showers:place:s", "guests:people:s"),
            "campsite": ("showers:place:s", "ground:place", "neighbours:people:s"),
            "cottage": ("fireplace:place", "bedroom:place", "furniture:thing"),
            "guesthouse": ("owner:people", "rooms:place:s", "breakfast:food"),
        },
    ),
    Domain(
        "story",
        "see it",
        "evening with the {s}",
        ("story:story", "ending:story", "characters:story:s", "jokes:story:s", "opening:story", "pace:pace"),
        (
            "It has {n} chapters and {m} songs.",
            "The hero leaves home on a {d} in {mo}.",
            "The last part is set in a {c} house by the sea.",
            "It took me {n} hours over {m} days.",
            "The {o} part is about a boy and his {c} dog.",
            "{N} people near me cried at the end.",
        ),
        {
            "book": ("writing:story", "language:story", "cover:look"),
            "novel": ("plot:story", "dialogue:story", "hero:story"),
            "film": ("acting:story", "music:story", "pictures:look:s"),
            "play": ("actors:story:s", "stage:look", "costumes:look:s"),
            "podcast": ("host:people", "sound:pace", "interviews:story:s"),
            "comic": ("drawings:look:s", "colours:look:s", "plot:story"),
            "documentary": ("interviews:story:s", "pictures:look:s", "music:story"),
        },
    ),
    Domain(
        "thing",
        "buy it",
        "first week with the {s}",
        ("battery:thing", "design:look", "price:value", "buttons:thing:s", "manual:story", "setup:pace"),
        (
            "It weighs {n} pounds and cost {m} dollars.",
            "The battery lasts {n} hours after {m} minutes of charging.",
            "I bought the {c} one in {mo}.",
            "It broke after {n} weeks and {m} days.",
            "It fits in the {o} pocket of my {c} bag.",
            "It came with {n} cables in a {c} box.",
        ),
        {
            "phone": ("screen:look", "camera:look", "speaker:thing"),
            "laptop": ("keyboard:thing", "screen:look", "fan:thing"),
            "camera": ("lens:look", "pictures:look:s", "strap:thing"),
            "printer": ("ink:look", "paper tray:thing", "prints:look:s"),
            "tablet": ("screen:look", "pen:thing", "apps:thing:s"),
            "watch": ("strap:thing", "dial:look", "alarm:thing"),
            "speaker": ("sound:look", "bass:look", "case:thing"),
            "television": ("picture:look", "remote:thing", "sound:look"),
        },
    ),
    Domain(
        "thing",
        "buy it",
        "first month with the {s}",
        ("design:look", "colour:look", "price:value", "material:thing", "size:thing", "delivery:pace"),
        (
            "It is {n} feet long and has {m} legs.",
            "I paid {m} dollars for the {c} one.",
            "It arrived on {d} in {n} {c} boxes.",
            "It took {n} screws and {m} minutes to put together.",
            "It stands next to the {c} door on the {o} floor.",
            "My cat scratched it after {n} days.",
        ),
        {
            "sofa": ("cushions:thing:s", "fabric:thing", "frame:thing"),
            "lamp": ("light:look", "switch:thing", "shade:look"),
            "mattress": ("foam:thing", "cover:thing", "springs:thing:s"),
            "kettle": ("handle:thing", "lid:thing", "spout:thing"),
            "blender": ("motor:thing", "blades:thing:s", "jug:thing"),
            "toaster": ("timer:thing", "toast:food", "tray:thing"),
            "desk": ("drawers:thing:s", "surface:look", "legs:thing:s"),
            "chair": ("seat:thing", "back:thing", "wheels:thing:s"),
        },
    ),
    Domain(
        "thing",
        "buy it",
        "first trip with the {s}",
        ("fabric:thing", "colour:look", "price:value", "fit:thing", "zip:thing", "pockets:thing:s"),
        (
            "I wore it for {n} days in the rain of {mo}.",
            "It has {n} pockets and a {c} lining.",
            "I paid {m} dollars for it on {d}.",
            "The {o} button fell off after {n} weeks.",
            "It weighs {n} pounds and dries in {m} minutes.",
            "I carried {n} apples and a {c} bottle with it.",
        ),
        {
            "jacket": ("hood:thing", "sleeves:thing:s", "collar:look"),
            "coat": ("lining:thing", "buttons:thing:s", "belt:look"),
            "dress": ("cut:look", "sleeves:thing:s", "pattern:look"),
            "backpack": ("straps:thing:s", "padding:thing", "buckles:thing:s"),
            "tent": ("poles:thing:s", "floor:thing", "door:thing"),
            "umbrella": ("handle:thing", "frame:thing", "cover:look"),
        },
    ),
    Domain(
        "thing",
        "ride it",
        "ride on the {s}",
        ("seats:thing:s", "brakes:thing:s", "price:value", "ride:pace", "noise:place", "steering:pace"),
        (
            "We rode {n} miles in {m} minutes.",
            "It left at {n} on {d} and was {m} minutes late.",
            "The ticket cost {m} dollars in {mo}.",
            "I sat in row {n} behind a {c} suitcase.",
            "It needs {n} litres for {m} miles.",
            "We stopped {n} times before the {c} bridge.",
        ),
        {
            "bicycle": ("saddle:thing", "gears:pace:s", "tyres:thing:s"),
            "scooter": ("wheels:thing:s", "battery:thing", "lights:look:s"),
            "car": ("engine:pace", "doors:thing:s", "boot:place"),
            "train": ("carriages:place:s", "driver:people", "tickets:value:s"),
            "ferry": ("deck:place", "crew:people", "crossing:pace"),
            "bus": ("driver:people", "windows:look:s", "route:pace"),
        },
    ),
    Domain(
        "place",
        "go there",
        "visit to the {s}",
        ("entrance:place", "staff:people", "tickets:value:s", "paths:place:s", "crowd:people", "shop:place"),
        (
            "We spent {n} hours there on {d}.",
            "Tickets cost {m} dollars for {n} children.",
            "The {c} hall on the {o} floor has {n} windows.",
            "We took {n} photos next to the {c} gate.",
            "The queue was {n} feet long in {mo}.",
            "There are {n} benches and {m} old trees.",
        ),
        {
            "museum": ("paintings:look:s", "rooms:place:s", "guides:people:s"),
            "park": ("trees:look:s", "benches:thing:s", "lake:look"),
            "zoo": ("animals:look:s", "cages:place:s", "keepers:people:s"),
            "gallery": ("paintings:look:s", "lighting:look", "walls:place:s"),
            "beach": ("sand:place", "water:look", "sunset:look"),
            "castle": ("towers:look:s", "garden:look", "guides:people:s"),
            "market": ("stalls:place:s", "fruit:food", "sellers:people:s"),
            "library": ("shelves:thing:s", "reading room:place", "desks:thing:s"),
            "gym": ("machines:thing:s", "trainers:people:s", "showers:place:s"),
        },
    ),
    Domain(
        "story",
        "go",
        "evening at the {s}",
        ("music:story", "seats:thing:s", "crowd:people", "tickets:value:s", "sound:look", "lights:look:s"),
        (
            "We sat in row {n} next to a {c} wall.",
            "The band played {n} songs in {m} minutes.",
            "It began at {n} on {d} with a {c} flag.",
            "Tickets cost {m} dollars in {mo}.",
            "{N} people stood behind us near the {o} door.",
            "We walked {n} miles home in the rain.",
        ),
        {
            "concert": ("singer:people", "drums:look:s", "encore:story"),
            "festival": ("bands:story:s", "stage:look", "food:food"),
            "circus": ("clowns:story:s", "tent:place", "acrobats:story:s"),
            "opera": ("voices:story:s", "costumes:look:s", "orchestra:story"),
            "game": ("players:story:s", "referee:people", "stadium:place"),
        },
    ),
    Domain(
        "people",
        "call them",
        "experience with the {s}",
        ("price:value", "advice:story", "manner:people", "schedule:pace", "office:place", "results:look:s"),
        (
            "It took {n} lessons over {m} weeks.",
            "I paid {m} dollars on {d}.",
            "We met in a {c} room on the {o} floor.",
            "There were {n} of us from {mo} to July.",
            "I got {n} pages of notes and a {c} folder.",
            "They called back after {n} hours.",
        ),
        {
            "course": ("teacher:people", "lessons:story:s", "homework:story"),
            "tutor": ("lessons:story:s", "methods:pace:s", "voice:people"),
            "dentist": ("nurse:people", "waiting room:place", "treatment:pace"),
            "barber": ("haircut:look", "shave:pace", "mirror:look"),
            "tour": ("guide:people", "route:pace", "stops:place:s"),
            "plumber": ("work:pace", "tools:thing:s", "repair:pace"),
        },
    ),
)

# Subjects that differ from the rest of their domain.
AGAIN: dict[str, str] = {
    "book": "read it", "novel": "read it", "comic": "read it", "podcast": "listen to it", "course": "take it",
    "tour": "take it", "dentist": "go there", "barber": "go there", "car": "drive it", "train": "take it",
    "ferry": "take it", "bus": "take it", "game": "see it",
}  # fmt: skip
KIND: dict[str, str] = {"course": "story", "tour": "story"}
