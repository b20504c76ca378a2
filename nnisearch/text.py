"""What others have written, made fit for a line on the terminal."""


def one_line(text):
    """Return a text, or what an exception says, in one line and without control characters."""
    words = str(text).split()
    if not words and isinstance(text, Exception):
        words = [type(text).__name__]
    return "".join(char if char.isprintable() else "?" for char in " ".join(words))


def last_line(path):
    """Return the last line that has been written to a file, made fit to be shown, or ""."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return one_line(lines[-1]) if lines else ""
