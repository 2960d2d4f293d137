"""Class names: listing them in a message, comparing two sets, and suggesting how to fix them."""

import unicodedata

from cspnet.text import printable

NETWORK, TRAINING = "the network", "train/"  # owners of the classes that a folder must have


def count_and_names(names: list[str], noun: str, others: tuple[str, ...] | list[str] = ()) -> str:
    """The number of things and their first names: `2 classes (bear, cat)`.

    A name that looks like another one in `names` or `others` is shown by its code points.
    """
    plural = noun if len(names) == 1 else noun + ("es" if noun.endswith("s") else "s")
    twins = _twins([*names, *others])
    shown = [_by_code_points(n) if n in twins else printable(n) for n in names[:5]]
    return f"{len(names):,} {plural} ({', '.join(shown)}{' …' * (len(names) > 5)})"


def _twins(names: list[str]) -> set[str]:
    """The names that differ from another one only by their Unicode normalization."""
    by_form: dict[str, set[str]] = {}
    for name in names:
        if not name.isascii():
            by_form.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    return {name for twins in by_form.values() if len(twins) > 1 for name in twins}


def _by_code_points(name: str) -> str:
    """A name with non-ASCII characters escaped: `cafe\\u0301`."""
    return ascii(name)[1:-1]


def class_differences(have: list[str], want: list[str], owner: str) -> str:
    """How class folders differ from the required classes, and what to do; empty if they do not.

    `owner` says whose classes are required: NETWORK or TRAINING.
    """
    missing = [name for name in want if name not in set(have)]
    extra = [name for name in have if name not in set(want)]
    if not missing and not extra:
        return ""
    problems = []
    if missing:
        problems.append(f"it lacks {count_and_names(missing, 'class', extra)}")
    if extra:
        reason = "that train/ lacks"
        if owner == NETWORK:
            reason = "that the network was not trained on"
        problems.append(f"it has {count_and_names(extra, 'class', missing)} {reason}")
    return f"{'; '.join(problems)}. {_advice(missing, extra, len(want))}"


def _advice(missing: list[str], extra: list[str], count: int) -> str:
    composed = {unicodedata.normalize("NFC", name): name for name in missing}
    twins = [name for name in extra if unicodedata.normalize("NFC", name) in composed]
    if twins:
        given = twins[0]
        wanted = composed[unicodedata.normalize("NFC", given)]
        form = _normal_form(wanted)
        how = f": convmv -r -f utf8 -t utf8 --{form.lower()} --notest FOLDER" * bool(form)
        return (
            "Names that look the same differ in their Unicode normalization: "
            f"{_by_code_points(given)} ({_normal_form(given) or 'neither NFC nor NFD'}) instead of "
            f"{_by_code_points(wanted)} ({form or 'neither NFC nor NFD'}). Rename the folders{how}"
        )
    folded = {fold_name(name): name for name in missing}
    pairs = [(name, folded[fold_name(name)]) for name in extra if fold_name(name) in folded]
    if pairs:
        shown = ", ".join(f"{name!r} instead of {wanted!r}" for name, wanted in pairs[:3])
        return f"Only case, spaces or leading zeros differ: {shown}. Rename the folders."
    numbers = [int(name) for name in (*missing, *extra) if name.isdecimal()]
    if (
        len(missing) == len(extra) == 1
        and len(numbers) == 2
        and count == abs(numbers[0] - numbers[1])
    ):
        first = min(numbers)
        return f"One is numbered from {first}, the other from {first + 1}: rename the folders."
    if extra and all(name.isdecimal() for name in extra) and len(numbers) == len(extra):
        return (
            "Numbers are not class names, and ImageNet's numbers do not follow the synset order: "
            "rename each folder to its class; data/README.md says how for ImageNet's val."
        )
    if len(missing) == count and extra:
        return "They have no class in common: do they belong to the same data set?"
    return "Folder names must be the class names of the training set."


def _normal_form(name: str) -> str:
    """The Unicode normalization form of a name, NFC or NFD; empty if it has neither."""
    if unicodedata.is_normalized("NFC", name):
        return "NFC"
    return "NFD" if unicodedata.is_normalized("NFD", name) else ""


def fold_name(name: str) -> str:
    """A key that is equal for names that people may confuse: case, spaces, `_`, `-`, zeros."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    folded = "".join(sign for sign in folded if not sign.isspace() and sign not in "_-")
    return str(int(folded)) if folded.isdecimal() else folded or name
