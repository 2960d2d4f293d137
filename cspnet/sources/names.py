"""Names of classes: how they are listed, how two sets of them differ, and what to do about it."""

import unicodedata

from cspnet.text import printable

NETWORK, TRAINING = "the network", "train/"  # whose classes a folder must have


def count_and_names(names: list[str], noun: str, beside: tuple[str, ...] | list[str] = ()) -> str:
    """A number of things, and the first of their names: `2 classes (bear, cat)`.

    Names that look like another one, among them or `beside` them, are told apart.
    """
    plural = noun if len(names) == 1 else noun + ("es" if noun.endswith("s") else "s")
    twins = _twins([*names, *beside])
    shown = [_by_code_points(n) if n in twins else printable(n) for n in names[:5]]
    return f"{len(names):,} {plural} ({', '.join(shown)}{' …' * (len(names) > 5)})"


def _twins(names: list[str]) -> set[str]:
    """Those of the names that are equal to another one but for their Unicode normalization."""
    composed: dict[str, set[str]] = {}
    for name in names:
        if not name.isascii():
            composed.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    return {name for alike in composed.values() if len(alike) > 1 for name in alike}


def _by_code_points(name: str) -> str:
    """A name with escapes for its characters beyond ASCII: `cafe\\u0301`."""
    return ascii(name)[1:-1]


def class_differences(have: list[str], want: list[str], owner: str) -> str:
    """How class folders differ from the classes that they must be, and what to do; or nothing.

    `owner` is whose classes they must be: NETWORK or TRAINING.
    """
    missing = [name for name in want if name not in set(have)]
    extra = [name for name in have if name not in set(want)]
    if not missing and not extra:
        return ""
    parts = []
    if missing:
        parts.append(f"it lacks {count_and_names(missing, 'class', extra)}")
    if extra:
        lacks = "that train/ lacks" if owner == TRAINING else "that the network was not trained for"
        parts.append(f"it has {count_and_names(extra, 'class', missing)} {lacks}")
    return f"{'; '.join(parts)}. {_cure(missing, extra, len(want))}"


def _cure(missing: list[str], extra: list[str], count: int) -> str:
    composed = {unicodedata.normalize("NFC", name): name for name in missing}
    twins = [name for name in extra if unicodedata.normalize("NFC", name) in composed]
    if twins:
        other = twins[0]
        meant = composed[unicodedata.normalize("NFC", other)]
        form = _normal_form(meant)
        how = f": convmv -r -f utf8 -t utf8 --{form.lower()} --notest FOLDER" * bool(form)
        return (
            "Names that look the same differ in their Unicode normalization: "
            f"{_by_code_points(other)} ({_normal_form(other) or 'neither NFC nor NFD'}) for "
            f"{_by_code_points(meant)} ({form or 'neither NFC nor NFD'}). Rename the folders{how}"
        )
    folded = {fold_name(name): name for name in missing}
    pairs = [(name, folded[fold_name(name)]) for name in extra if fold_name(name) in folded]
    if pairs:
        shown = ", ".join(f"{name!r} for {meant!r}" for name, meant in pairs[:3])
        return f"Only case, blanks or zeros differ: {shown}. Rename the folders."
    numbers = [int(name) for name in (*missing, *extra) if name.isdecimal()]
    if (
        len(missing) == len(extra) == 1
        and len(numbers) == 2
        and count == abs(numbers[0] - numbers[1])
    ):
        return (
            f"One is counted from {min(numbers)}, one from {min(numbers) + 1}: rename the folders."
        )
    if extra and all(name.isdecimal() for name in extra) and len(numbers) == len(extra):
        return (
            "Numbers are not names, and ImageNet's do not follow the order of the synsets: "
            "rename each folder to its class; data/README.md says how for ImageNet's val."
        )
    if len(missing) == count and extra:
        return "No class is in both: are these two parts of one data set?"
    return "Folder names must be the class names of the training set."


def _form(name: str, only: bool = False) -> str:
    """A name by its code points, and its normalisation form, NFC or NFD; the form `only`."""
    form = next((f for f in ("NFC", "NFD") if unicodedata.is_normalized(f, name)), "neither form")
    return form if only else f"{_by_code_points(name)} ({form})"


def _normal_form(name: str) -> str:
    """The Unicode normalization form of a name, NFC or NFD; empty where it has neither."""
    return next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)), "")


def fold_name(name: str) -> str:
    """Equal for names that a person may take for the same."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    folded = "".join(sign for sign in folded if not sign.isspace() and sign not in "_-")
    return str(int(folded)) if folded.isdecimal() else folded or name
