"""`vitface evaluate --bench ijbb|ijbc|tinyface`: faces that are not pairs, embedded in parts that are kept."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitface.data.formats.published import IJB
from vitface.errors import ConfigError, in_one_line, printable
from vitface.files import json_bytes, write_output

if TYPE_CHECKING:
    from vitface.data.formats.ijb_lists import Protocol
    from vitface.evaluation.benchmarks import Evaluation
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.plots import Chart
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint


def evaluate_faces(model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace) -> int:
    """Embeds the faces over all ranks, where that is still to be done; the first rank scores them and prints."""
    from vitface.data.formats.ijb_lists import read_faces, read_protocol
    from vitface.data.formats.tinyface_folder import TinyFace, read_tinyface
    from vitface.evaluation.benchmarks import Evaluation
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.ijb.results import keep_result
    from vitface.training.ranks.parallel import over_ranks
    from vitface.training.ranks.process_group import check_same, local_share, rank

    name, pooling = arguments.bench, arguments.pooling
    if arguments.routing or arguments.show_faces or arguments.degrade or arguments.degrade_probe:
        raise ConfigError(f"--routing, --show-faces and --degrade are for pairs of photos; {name} has none")
    faces = read_faces(name, arguments.data_dir) if name in IJB else read_tinyface(arguments.data_dir)
    about = f"{checkpoint.sha256 if checkpoint else 'frozen'} {arguments.gate} {faces.sha256()}"
    check_same({"model": about, "crops": len(faces.crops)})
    rows = StoredRows(faces, model, name not in IJB or "F1" in pooling, about)
    # its errors come before the hours
    protocol = None if rank() or isinstance(faces, TinyFace) else read_protocol(faces)
    numbers = rows.missing() if rank() == 0 else []
    if arguments.dry_run:
        return predict_faces(rows, numbers)
    rows.complete(numbers, local_share(arguments.num_workers), over_ranks, rank() == 0)
    if rank() != 0:
        return 0
    result, text, charts, alarms = _score(faces, protocol, rows, pooling)
    print(f"embeddings: {rows.folder}; delete it when you are done", file=sys.stderr)
    print(text)
    keep_in_run(checkpoint, arguments, lambda run, sha256: keep_result(run, name, result, sha256))
    evaluation, others = Evaluation({}, alarms, []), [(text, charts)]
    write_files(model, checkpoint, arguments, evaluation, lambda: {"benchmarks": {name: result}}, others=others)
    return 0


def _score(
    faces: Any, protocol: "Protocol | None", rows: "StoredRows", pooling: str
) -> "tuple[dict[str, Any], str, list[Chart], list[str]]":
    """(The result, as text, its charts, alarms); `protocol` is that of IJB's faces."""
    from vitface.evaluation.ijb.results import result_text, roc_of_templates
    from vitface.evaluation.ijb.scoring import evaluate_templates
    from vitface.evaluation.tinyface import search_result, search_text

    parts = map(rows.part, range(len(rows.files)))
    if protocol is None:
        result = search_result(faces, parts)
        return result, search_text(result), [], faces.alarms
    result = evaluate_templates(faces, protocol, parts, pooling)
    return result, result_text(faces.name, result), [roc_of_templates(faces.name, result)], protocol.alarms


def predict_faces(rows: "StoredRows", numbers: list[int]) -> int:
    """Prints how long the faces that have no embedding yet will take, from a measured batch."""
    from vitface.evaluation.ijb.embedding import PART
    from vitface.training.estimate import duration, seconds_per_image
    from vitface.training.ranks.process_group import all_gather

    images, total = min(len(numbers) * PART, len(rows.faces.crops)), len(rows.faces.crops)
    rate = sum(all_gather(1 / ((1 + rows.flip) * seconds_per_image(rows.model.model))))
    text = f"{images:,} of {total:,} faces to embed: about {duration(images / rate)}, at {rate:,.1f} faces/s"
    print(f"{text} before reading; nothing was evaluated")
    return 0


def write_files(
    model: "Recogniser",
    checkpoint: "Checkpoint | None",
    arguments: argparse.Namespace,
    evaluation: "Evaluation",
    data: Callable[[], Mapping[str, Any]],
    routing: Mapping[str, Any] | None = None,
    others: "Sequence[tuple[str, list[Chart]]]" = (),
) -> None:
    """Writes --json, with `data`, and --output, see `report_page`; prints what is odd and what failed."""
    if arguments.json:
        known = {"alarms": evaluation.alarms, "failures": evaluation.failures}
        write_output(arguments.json, json_bytes({**known, **data()}))
    if arguments.output:
        from vitface.evaluation.page import report_page

        title = str(checkpoint.path) if checkpoint else f"{model.config.backbone}, frozen"
        run, faces = checkpoint and checkpoint.run, arguments.show_faces
        page = report_page(title, model, evaluation, run, arguments.data_dir, faces, routing or {}, others)
        write_output(arguments.output, page.encode())
        print(f"wrote {arguments.output}")
    for text in evaluation.alarms:
        print(f"ALARM {in_one_line(text)}", file=sys.stderr)
    for text in evaluation.failures:
        print(f"error: {printable(text)}", file=sys.stderr)


def keep_in_run(
    checkpoint: "Checkpoint | None", arguments: argparse.Namespace, keep: Callable[[Path, str], None]
) -> None:
    """`keep` (run, SHA-256) what a run's best checkpoint gave; where the run cannot be written to, a warning."""
    if checkpoint is None or not checkpoint.run or not checkpoint.is_best or arguments.gate:
        return
    try:
        keep(checkpoint.run, checkpoint.sha256)
    except OSError as error:
        reason = f"{checkpoint.run} cannot be written to ({error.strerror})"
        print(f"warning: {reason}, so the scores were not kept there for --compare", file=sys.stderr)


def compare_faces(arguments: argparse.Namespace) -> int:
    """Prints a line per run, and mode of pooling, from the results that the runs kept."""
    from vitface.evaluation.ijb.results import comparison_text, kept_results

    name, runs = arguments.bench, list(dict.fromkeys(path.resolve() for path in arguments.compare))
    kept = {str(run): kept_results(run, name) for run in runs}
    print(comparison_text(name, kept))
    if arguments.json:
        write_output(arguments.json, json_bytes({"benchmark": name, "runs": kept}))
    return 0
