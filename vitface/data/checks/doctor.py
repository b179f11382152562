"""Finds what is wrong with a data set: faults that have made published results wrong, such as swapped channels, another
alignment, shifted labels, pairs in another order, and people who are in both training and test."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitface.data.checks.check_faces import Embed, Faces, check_faces
from vitface.data.checks.check_images import MIN_IMAGES
from vitface.data.checks.check_pairs import Benchmark, check_benchmark, scan_benchmark
from vitface.data.checks.check_people import (
    TrainingSet,
    check_training,
    no_names_to_compare,
    people_in_benchmark,
    scan_training,
)
from vitface.data.checks.find_sets import find_sets
from vitface.data.checks.findings import Finding, correlation, finds
from vitface.data.checks.scan import dark_spots
from vitface.data.formats.ijb_lists import read_faces, read_protocol
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.pairs import VerificationSet, read_bin
from vitface.data.formats.published import PAIRS, benchmark_named, is_bin, is_home
from vitface.data.formats.samples import RecordSamples, load_samples
from vitface.errors import DataError, in_one_line

SHOWN = 5  # files of a finding
SAME_ALIGNMENT = 0.8  # correlation of two sets' dark spots; sets with the same alignment have 0.9


@dataclass(frozen=True)
class Report:
    """One set: its format, how much is in it, and what is wrong with it."""

    path: str
    format: str
    counts: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity != "note"]


def check(path: Path, against: list[Path], num_workers: int, embed: Embed | None = None) -> list[Report]:
    """Returns a report for each set at `path`, a set or a folder of sets, and for what was not checked there.

    Training sets are also compared with the benchmarks among them and those of `against`: .bin files, or published pair
    lists (.txt), whose names are compared; with a trained model's `embed` the faces are compared, too.
    """
    found = find_sets(path)
    lists = [file for file in against if not is_bin(file)]
    sources: dict[str, tuple[Callable[[], VerificationSet], str]] = {}
    for file in [*found.bins, *filter(is_bin, against)]:
        sources[str(file)] = functools.partial(read_bin, file), "" if benchmark_named(file.stem) else file.name
    for name, file, crops in found.pair_lists:
        home = "" if is_home(crops, name) else f"a folder {crops.name}"
        sources[f"{file} ({name})"] = functools.partial(read_pair_list, name, file, crops), home
    reports, benchmarks = [], []
    for where, (read, misnamed) in sources.items():
        try:
            benchmarks.append(scan_benchmark(read(), num_workers))
            reports.append(_benchmark_report(where, benchmarks[-1], misnamed))
        except DataError as error:
            reports.append(Report(where, "unreadable", {}, unreadable(error)))
    for folder in found.trainings:
        try:
            reports.append(_training_report(folder, benchmarks, lists, num_workers, embed))
        except DataError as error:
            reports.append(Report(str(folder), "unreadable", {}, unreadable(error)))
    reports += [_template_report(name, folder) for name, folder in found.ijb]
    reports += [Report(str(where), "not checked", {}, not_checked(why)) for where, why in found.unchecked.items()]
    return [*reports, *(Report(str(folder), "no set", {}, no_image(folder)) for folder in found.empty)]


def _benchmark_report(where: str, bench: Benchmark, misnamed: str) -> Report:
    pairs, same = len(bench.pairs.issame), int(bench.pairs.issame.sum())
    counts = {"pairs": pairs, "same": same, "different": pairs - same, "images": len(bench.scan)}
    return Report(where, "verification set", counts, [*check_benchmark(bench), *not_evaluated(misnamed)])


@finds("note", f"the names they know: {', '.join(PAIRS)}; rename it if it is one of these")
def not_evaluated(misnamed: str) -> str | None:
    return misnamed and f"training and evaluate --bench all do not look for {misnamed}; evaluate --bench FILE takes it"


def _template_report(name: str, folder: Path) -> Report:
    """Of IJB's lists, and of which crops there are; no crop is decoded."""
    try:
        faces = read_faces(name, folder)
        protocol = read_protocol(faces)
    except DataError as error:
        return Report(str(folder), "unreadable", {}, unreadable(error))
    counts = {"faces": len(faces.crops), "templates": len(faces.templates), "pairs": len(protocol.pairs)}
    odd = [finding for alarm in protocol.alarms for finding in odd_lists(alarm)]
    return Report(str(folder), f"{name}, 1:N too" if protocol.lists else f"{name}, 1:1 only", counts, odd)


@finds("warning", "get the lists again; evaluation goes on, with this ALARM")
def odd_lists(alarm: str) -> str:
    return alarm


def _training_report(
    path: Path, benchmarks: list[Benchmark], lists: list[Path], num_workers: int, embed: Embed | None
) -> Report:
    samples = load_samples(path)
    kind = "InsightFace RecordIO" if isinstance(samples, RecordSamples) else "folder per person"
    if isinstance(samples, PackedSamples):
        samples.verify()
        kind = "packed"
    data = scan_training(samples, num_workers)
    findings = [Finding("source", "note", note, "nothing, if you expect that") for note in samples.notes]
    findings += check_training(data)
    faces = Faces(data, embed) if embed else None
    for bench in benchmarks:
        findings += check_between(data, bench)
        findings += check_faces(faces, bench) if faces else []
    for file in lists:
        findings += people_in_benchmark(samples, file) + no_names_to_compare(samples, file)
    return Report(str(path), kind, {"images": len(samples), "people": len(samples.names)}, findings)


@finds("error", "fix what the message names, or get the set again")
def unreadable(error: DataError) -> str:
    return " ".join(str(error).split("\n"))


@finds("warning", "unpack it, put images into folders SET/PERSON/IMAGE.jpg (docs/data.md), or move it elsewhere")
def not_checked(why: str) -> str:
    return why


@finds("note", "nothing to do, unless you expected a set there")
def no_image(folder: Path) -> str:
    return f"no image and no set was found in {folder.name}"


def check_between(train: TrainingSet, bench: Benchmark) -> list[Finding]:
    return [*trained_on_test(train, bench), *different_alignment(train, bench)]


@finds("error", "remove these people from the training set; otherwise results on that benchmark are too good")
def trained_on_test(train: TrainingSet, bench: Benchmark) -> str | None:
    shared = np.isin(train.scan.digests, bench.scan.digests) & train.scan.comparable
    if shared.any():
        people = np.unique(train.samples.labels[shared])
        first = train.samples.names[people[0]]
        return f"{shared.sum()} training images, of {len(people)} people such as {first!r}, are in {bench.pairs.name}"


@finds("error", "align both with one template: vitface align SRC OUT")
def different_alignment(train: TrainingSet, bench: Benchmark) -> str | None:
    if min(train.scan.usable.sum(), bench.scan.usable.sum()) < MIN_IMAGES:
        return None
    similar = correlation(dark_spots(train.scan.mean_face), dark_spots(bench.scan.mean_face))
    if similar < SAME_ALIGNMENT:
        return f"the mean faces of training and {bench.pairs.name} are aligned differently (correlation {similar:.2f})"


def report_text(report: Report) -> str:
    """One line about the set, and below it what was found."""
    counts = ", ".join(f"{count:,} {what}" for what, count in report.counts.items())
    lines = [f"{report.path}: {report.format}{', ' if counts else ''}{counts}"]
    if not report.problems and report.counts:
        lines.append("  nothing wrong was found")
    for finding in report.findings:
        head = "note" if finding.severity == "note" else f"{finding.severity.upper()} {finding.name}"
        lines.append(f"  {head}: {in_one_line(finding.what)}")
        lines += [f"    {in_one_line(name)}" for name in finding.files[:SHOWN]]
        if finding.files[SHOWN:]:
            lines.append(f"    and {len(finding.files) - SHOWN:,} more, which --json lists")
        lines.append(f"    {finding.do}")
    return "\n".join(lines)
