"""Number of image files of the tests' jobs, and the content of the corrupt ones."""

COUNT = 120
CORRUPT = {"pictures/00017.png": b"no picture", "pictures/sub/00090.png": b""}
