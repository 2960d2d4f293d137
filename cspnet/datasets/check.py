"""Is this data set what you think it is? `quick` asks names and sizes only, `check` reads it all.

What training or an evaluation would refuse, replace or score wrongly is an error; what is seldom
meant, a warning; the rest are notes. docs/data.md lists them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from cspnet.datasets import findings as find
from cspnet.datasets.contents import of_contents
from cspnet.datasets.findings import Finding
from cspnet.errors import DataError
from cspnet.recipe.schema import DIGITS
from cspnet.sources import messages, roots, tar_set
from cspnet.sources.data_root import (
    Digits,
    Folder,
    Source,
    has_parts,
    open_location,
    require_data_folder,
    training_place,
    validation_place,
)
from cspnet.sources.parquet import ParquetSource
from cspnet.sources.tar_set import TarSource
from cspnet.text import printable

GIVE = f"Give a data root, a folder with one folder per class, or `{DIGITS}`"
SEVERITIES = ("error", "warning", "note")
SHOWN = 5  # examples of a finding before people


@dataclass(frozen=True)
class Part:
    """One of the folders of class folders that make up a data set."""

    name: str
    folder: str
    classes: dict[str, int]  # images of each

    def to_dict(self) -> dict:
        counts = self.classes.values()
        sizes = {"min": min(counts), "median": median(counts), "max": max(counts)}
        return {**asdict(self), "images": sum(counts), **sizes}

    def __str__(self) -> str:
        sizes = self.to_dict()
        return (
            f"{self.name}: {sizes['images']:,} images, {len(self.classes):,} classes of "
            f"{sizes['min']:,} to {sizes['max']:,}, median {sizes['median']:g}"
        )


@dataclass(frozen=True)
class Report:
    """What `check` found, the worst first."""

    data: str
    parts: list[Part]
    findings: list[Finding]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict:
        """For JSON: everything, with the names of all files."""
        counts = {f"{severity}s": self.count(severity) for severity in SEVERITIES}
        parts = [part.to_dict() for part in self.parts]
        return {"data": self.data, **counts, "parts": parts, "findings": _dicts(self.findings)}

    def lines(self) -> Iterator[tuple[str, str]]:
        """For people: lines, each with the severity of what it is about; some files as examples."""
        for part in self.parts:
            yield "", printable(str(part))
        for finding in self.findings:
            yield finding.severity, printable(f"{finding.severity}: {finding.message}")
            examples = finding.groups or [[file] for file in finding.files]
            for group in examples[:SHOWN]:
                yield "", "    " + " = ".join(map(printable, group))
            if len(examples) > SHOWN:
                yield "", f"    … and {len(examples) - SHOWN:,} more"
        counts = [
            f"{self.count(name)} {name}" + "s" * (self.count(name) != 1) for name in SEVERITIES
        ]
        yield "", ", ".join(counts)


def _dicts(findings: list[Finding]) -> list[dict]:
    """Findings without what they have nothing of."""
    return [{key: value for key, value in asdict(f).items() if value} for f in findings]


def check_dataset(
    data: str, workers: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Reads every file of a data root, of a single folder of class folders, or of `digits`.

    By `workers` processes; their number changes nothing in the report. `progress` is told how many
    files are done, and of how many. Raises DataError where the path is wrong.
    """
    sources, findings = _open(data)
    for name, source in sources.items():
        findings += find.of_classes(name, source)
        if isinstance(source, Folder):
            findings += find.of_strays(name, source)
    if {"train", "val"} <= sources.keys():
        findings += find.of_pair(data, sources["train"], sources["val"])
        findings += find.of_sharing(sources["train"], sources["val"])
    findings += of_contents(sources, workers, progress)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(data, [_part(*item) for item in sources.items()], findings)


def preflight(training: Source, validation: Source) -> list[str]:
    """Remarks on two open sources, by the names, sizes and places of their files alone."""
    findings = [
        *find.of_classes("train", training),
        *find.of_classes("val", validation),
        *find.of_sharing(training, validation),
    ]
    return [printable(finding.message) for finding in findings]


def _open(data: str) -> tuple[dict[str, Source], list[Finding]]:
    """The parts that can be opened, by name, and what keeps the others from it."""
    if data == DIGITS:
        return {"train": Digits(train=True), "val": Digits(train=False)}, []
    folder = require_data_folder(data, GIVE)
    if not has_parts(folder):
        single = open_location(tar_set.inside(folder) or folder, empty=True)
        if isinstance(single, Folder) and (not len(single) or roots.is_misplaced(folder)):
            raise DataError(messages.no_training_folder(folder))
        return {Path(os.path.abspath(folder)).name: single}, []
    sources: dict[str, Source] = {}
    findings = []
    for name, locate in (("train", training_place), ("val", validation_place)):
        try:
            sources[name] = open_location(locate(data), empty=True)
        except DataError as error:
            findings.append(Finding("layout", "error", str(error)))
    return sources, findings


def _part(name: str, source: Source) -> Part:
    folder = str(source.root) if isinstance(source, Folder) else DIGITS
    if isinstance(source, TarSource):
        folder = source.tars.where
    if isinstance(source, ParquetSource):
        folder = source.parquets.where
    counts = find.image_counts(source).tolist()
    return Part(name, folder, dict(zip(source.classes, counts, strict=True)))
