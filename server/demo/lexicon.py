"""The words of the demo grammar: what can be reviewed, what can be said about it, and how well each word speaks.

Data only. Grades run from -3 (awful) to 3 (wonderful). Adjectives are sorted by the *kind* of thing that they fit,
so that soup is tasty and a receptionist is polite; `GENERAL` fits everything. Aspects are written
"noun:kind", with a trailing "s" flag for plurals ("rooms:place:s").
"""

from __future__ import annotations

from dataclasses import dataclass

GENERAL: dict[str, float] = {
    "wonderful": 3.0,
    "fantastic": 3.0,
    "excellent": 2.8,
    "lovely": 2.4,
    "great": 2.3,
    "very good": 2.0,
    "good": 1.5,
    "pleasant": 1.4,
    "nice": 1.2,
    "fine": 0.5,
    "decent": 0.5,
    "okay": 0.1,
    "average": -0.2,
    "ordinary": -0.4,
    "weak": -1.1,
    "disappointing": -1.7,
    "poor": -1.8,
    "bad": -2.0,
    "terrible": -2.7,
    "awful": -2.9,
    "horrible": -3.0,
}

ADJECTIVES: dict[str, dict[str, float]] = {
    "food": {
        "delicious": 2.7, "tasty": 1.9, "fresh": 1.6, "rich": 1.1, "simple": 0.4, "plain": -0.3,
        "bland": -1.4, "cold": -1.3, "dry": -1.4, "greasy": -1.6, "stale": -2.0, "burnt": -2.1,
    },
    "people": {
        "charming": 2.4, "kind": 2.1, "friendly": 2.0, "helpful": 1.9, "polite": 1.5, "patient": 1.4,
        "busy": -0.2, "slow": -1.1, "careless": -1.7, "cold": -1.5, "rude": -2.4, "unfriendly": -2.0,
    },
    "place": {
        "beautiful": 2.6, "cosy": 1.9, "clean": 1.6, "bright": 1.3, "quiet": 1.0, "spacious": 1.5,
        "small": -0.4, "crowded": -0.9, "noisy": -1.4, "cramped": -1.5, "dirty": -2.2, "filthy": -2.8,
    },
    "thing": {
        "superb": 2.8, "reliable": 1.9, "solid": 1.4, "comfortable": 1.8, "handy": 1.3, "light": 0.8,
        "heavy": -0.6, "awkward": -1.1, "flimsy": -1.7, "cheap": -1.2, "faulty": -2.2, "useless": -2.7,
    },
    "story": {
        "brilliant": 2.8, "gripping": 2.2, "moving": 2.0, "funny": 1.8, "clever": 1.7, "warm": 1.3,
        "strange": -0.3, "slow": -1.0, "confusing": -1.3, "dull": -1.7, "boring": -2.1, "tedious": -2.2,
    },
    "value": {
        "generous": 2.2, "fair": 1.4, "reasonable": 1.2, "low": 1.1, "modest": 0.5,
        "high": -1.0, "steep": -1.4, "unfair": -1.9, "ridiculous": -2.3, "outrageous": -2.6,
    },
    "look": {
        "stunning": 2.8, "beautiful": 2.6, "elegant": 2.0, "sharp": 1.4, "clear": 1.3, "simple": 0.4,
        "plain": -0.3, "dim": -1.0, "dull": -1.4, "faded": -1.3, "blurry": -1.7, "ugly": -2.4,
    },
    "pace": {
        "perfect": 2.8, "quick": 1.6, "smooth": 1.7, "steady": 1.1, "easy": 1.4,
        "uneven": -0.9, "slow": -1.2, "rough": -1.3, "clumsy": -1.5, "late": -1.4, "hopeless": -2.5,
    },
}  # fmt: skip

# Verbs with "the X" as their object.
FEELINGS: dict[str, float] = {
    "loved": 3.0,
    "really enjoyed": 2.5,
    "enjoyed": 2.0,
    "liked": 1.4,
    "quite liked": 1.0,
    "did not mind": 0.1,
    "did not like": -1.6,
    "disliked": -1.9,
    "could not stand": -2.6,
    "hated": -3.0,
}

INTENSIFIERS: dict[str, float] = {"very": 1.2, "really": 1.2, "truly": 1.25, "quite": 0.85, "rather": 0.8, "a bit": 0.6}

NUMBERS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "fifteen", "twenty", "thirty",
    "forty", "fifty", "sixty", "ninety",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("March", "April", "May", "June", "July", "October", "December")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "grey")


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

# Closing sentences with the grade that they express; {again} is the domain's.
CLOSINGS: tuple[tuple[str, float], ...] = (
    ("I cannot wait to {again} again.", 2.8),
    ("I recommend it to everyone.", 2.7),
    ("It made my week.", 2.5),
    ("I would gladly {again} again.", 2.2),
    ("Everyone should try it.", 2.3),
    ("It was worth every penny.", 2.2),
    ("I was very happy with it.", 2.1),
    ("I would {again} again.", 1.5),
    ("I can recommend it.", 1.6),
    ("It was worth the money.", 1.3),
    ("I might {again} again.", 0.6),
    ("It is worth a try.", 0.8),
    ("It did the job.", 0.3),
    ("It was neither good nor bad.", 0.0),
    ("I have no strong feelings about it.", -0.1),
    ("I am not sure that I would {again} again.", -0.7),
    ("You could do better.", -0.9),
    ("I expected more.", -1.3),
    ("It is not worth the money.", -1.6),
    ("I would not {again} again.", -1.8),
    ("I cannot recommend it.", -1.7),
    ("It was a waste of time.", -2.3),
    ("I want my money back.", -2.4),
    ("I will never {again} again.", -2.7),
    ("Nobody should try it.", -2.6),
)

# Sentences that say next to nothing.
VAGUE: tuple[str, ...] = (
    "It is hard to say more.",
    "It was much as one would expect.",
    "There is not much more to say.",
    "Some things were better than others.",
    "It was what it was.",
)
