"""What others have written, made fit for a line on the terminal."""


def one_line(text):
    """Return a text, or what an exception says, in one line and without control characters."""
    words = str(text).split() or [type(text).__name__]
    return "".join(char if char.isprintable() else "?" for char in " ".join(words))
