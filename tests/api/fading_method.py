"""A guidance method of an operator's own, which `test_plugins` has a server import."""

from server.methods import Method, register

register(
    Method(
        "fading",
        "Steers by the drawn token at first, and ever more softly as time runs out.",
        "this test",
        lambda rows: rows.time * (rows.entropy_1 <= rows.entropy_tau.max() + 99) * (rows.step >= 0),
    )
)
