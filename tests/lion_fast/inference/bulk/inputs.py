"""How many pictures the tests' jobs have, and which of them are none."""

COUNT = 120
CORRUPT = {"pictures/00017.png": b"no picture", "pictures/sub/00090.png": b""}
