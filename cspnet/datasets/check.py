"""Check a data set: before a run by names and sizes only, or by reading every file.

Errors are what training or an evaluation would refuse, replace or score incorrectly. Warnings are
probably unintended. The rest are notes. docs/data.md lists all findings.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from cspnet.datasets.contents import content_findings
from cspnet.datasets.findings import (
    Finding,
    class_findings,
    class_name_findings,
    ignored_file_findings,
    image_counts,
    overlap_findings,
)
from cspnet.errors import DataError
from cspnet.recipe.schema import DIGITS
from cspnet.sources import messages, roots
from cspnet.sources.data_root import DataRoot, open_location
from cspnet.sources.folder import Digits, Folder
from cspnet.sources.parquet import ParquetSource
from cspnet.sources.protocol import Source
from cspnet.sources.tar_set import TarSet, TarSource
from cspnet.text import printable

SEVERITIES = ("error", "warning", "note")
MAX_EXAMPLES = 5  # files shown per finding in the text report
_HINT = f"Give a data root, a folder with one folder per class, or `{DIGITS}`"


@dataclass(frozen=True)
class SplitSummary:
    """Sizes of one split of a data set."""

    name: str
    folder: str
    classes: dict[str, int]  # images per class

    def to_dict(self) -> dict:
        counts = self.classes.values()
        sizes = {"min": min(counts), "median": median(counts), "max": max(counts)}
        return {**asdict(self), "images": sum(counts), **sizes}

    def __str__(self) -> str:
        sizes = self.to_dict()
        return (
            f"{self.name}: {sizes['images']:,} images, {len(self.classes):,} classes of "
            f"{sizes['min']:,} to {sizes['max']:,} images (median {sizes['median']:g})"
        )


@dataclass(frozen=True)
class CheckReport:
    """The findings of `check`, most severe first."""

    data: str
    splits: list[SplitSummary]
    findings: list[Finding]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict:
        """The full report for JSON, with the names of all files."""
        counts = {f"{severity}s": self.count(severity) for severity in SEVERITIES}
        splits = [split.to_dict() for split in self.splits]
        findings = [
            {key: value for key, value in asdict(finding).items() if value}
            for finding in self.findings
        ]
        return {"data": self.data, **counts, "parts": splits, "findings": findings}

    def lines(self) -> Iterator[tuple[str, str]]:
        """The report as text: (severity, line) pairs, with up to MAX_EXAMPLES files per finding."""
        for split in self.splits:
            yield "", printable(str(split))
        for finding in self.findings:
            yield finding.severity, printable(f"{finding.severity}: {finding.message}")
            examples = finding.groups or [[file] for file in finding.files]
            for group in examples[:MAX_EXAMPLES]:
                yield "", "    " + " = ".join(map(printable, group))
            if len(examples) > MAX_EXAMPLES:
                yield "", f"    … and {len(examples) - MAX_EXAMPLES:,} more"
        counts = [
            f"{self.count(name)} {name}" + "s" * (self.count(name) != 1) for name in SEVERITIES
        ]
        yield "", ", ".join(counts)


def check_dataset(
    data: str, workers: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Read and check every file of a data root, a single folder of class folders, or `digits`.

    The report does not depend on the number of `workers` (processes). `progress` is called with the
    number of files done and their total. Raises DataError if the path is wrong.
    """
    sources, findings = _open(data)
    for name, source in sources.items():
        findings += class_findings(name, source)
        if isinstance(source, Folder):
            findings += ignored_file_findings(name, source)
    if {"train", "val"} <= sources.keys():
        findings += class_name_findings(data, sources["train"], sources["val"])
        findings += overlap_findings(sources["train"], sources["val"])
    findings += content_findings(sources, workers, progress)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(data, [_summarize(*item) for item in sources.items()], findings)


def preflight(training: Source, validation: Source) -> list[str]:
    """Messages about two open sources, from the names, sizes and paths of their files alone."""
    findings = [
        *class_findings("train", training),
        *class_findings("val", validation),
        *overlap_findings(training, validation),
    ]
    return [printable(finding.message) for finding in findings]


def _open(data: str) -> tuple[dict[str, Source], list[Finding]]:
    """The splits that can be opened, by name, and findings about the others."""
    if data == DIGITS:
        return {"train": Digits(train=True), "val": Digits(train=False)}, []
    root = DataRoot(data, _HINT)
    if not root.has_splits:
        folder = root.folder
        single = open_location(TarSet.in_folder(folder) or folder, allow_empty=True)
        if isinstance(single, Folder) and (not len(single) or roots.is_misplaced(folder)):
            raise DataError(messages.no_training_folder(folder))
        return {Path(os.path.abspath(folder)).name: single}, []
    sources: dict[str, Source] = {}
    findings = []
    for name in ("train", "val"):
        try:
            location = root.train if name == "train" else root.val
            sources[name] = open_location(location, allow_empty=True)
        except DataError as error:
            findings.append(Finding("layout", "error", str(error)))
    return sources, findings


def _summarize(name: str, source: Source) -> SplitSummary:
    folder = str(source.root) if isinstance(source, Folder) else DIGITS
    if isinstance(source, TarSource):
        folder = source.tars.where
    if isinstance(source, ParquetSource):
        folder = source.parquets.where
    counts = image_counts(source).tolist()
    return SplitSummary(name, folder, dict(zip(source.classes, counts, strict=True)))
