"""The words of the demo grammar: what can be said of whatever is reviewed, and how well each word speaks of it.

Data only. Grades run from -3 (awful) to 3 (wonderful). Adjectives are sorted by the *kind* of thing that they fit,
so that soup is tasty and a receptionist is polite; `GENERAL` fits everything. What is reviewed: `demo.domains`.
"""

from __future__ import annotations

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
