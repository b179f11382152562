"""`vitface evaluate --bench tinyface`: small photos, each searched among many."""

import argparse
import sys
from typing import TYPE_CHECKING

from vitface.commands.evaluate_ijb import predict_faces
from vitface.errors import ConfigError, in_one_line
from vitface.files import json_bytes, write_output

if TYPE_CHECKING:
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint


def evaluate_tinyface(model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace) -> int:
    """Embeds the photos over all ranks, where that is still to be done; the first rank searches and prints."""
    from vitface.data.formats.tinyface_folder import read_tinyface
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.tinyface import keep_result, result_json, result_text, search_ranks
    from vitface.training.ranks.parallel import over_ranks
    from vitface.training.ranks.process_group import check_same, local_share, rank

    if arguments.routing or arguments.show_faces or arguments.degrade or arguments.degrade_probe:
        raise ConfigError("--routing, --show-faces and --degrade are for pairs of photos; TinyFace is a search")
    faces = read_tinyface(arguments.data_dir)
    about = f"{checkpoint.sha256 if checkpoint else 'frozen'} {arguments.gate} {faces.sha256()}"
    check_same({"model": about, "crops": len(faces.crops)})
    rows = StoredRows(faces, model, True, about)
    numbers = rows.missing() if rank() == 0 else []
    if arguments.dry_run:
        return predict_faces(rows, numbers)
    rows.complete(numbers, local_share(arguments.num_workers), over_ranks, rank() == 0)
    if rank() != 0:
        return 0
    entry = result_json(faces, search_ranks(faces, map(rows.part, range(len(rows.files)))))
    print(result_text(entry))
    if checkpoint and checkpoint.run and checkpoint.is_best and not arguments.gate:
        try:
            keep_result(checkpoint.run, entry, checkpoint.sha256)
        except OSError as error:
            print(f"warning: the result was not kept in {checkpoint.run} ({error.strerror})", file=sys.stderr)
    _write(entry, faces.alarms, model, checkpoint, arguments)
    return 0


def _write(
    entry: dict,
    alarms: list[str],
    model: "Recogniser",
    checkpoint: "Checkpoint | None",
    arguments: argparse.Namespace,
) -> None:
    """Writes --json and --output, and prints the alarms."""
    from vitface.evaluation.benchmarks import Evaluation
    from vitface.evaluation.page import report_page
    from vitface.evaluation.tinyface import result_text

    if arguments.json:
        data = {"alarms": alarms, "failures": [], "benchmarks": {"tinyface": entry}}
        write_output(arguments.json, json_bytes(data))
    if arguments.output:
        title = str(checkpoint.path) if checkpoint else f"{arguments.backbone}, frozen"
        evaluation = Evaluation({}, alarms, [])
        run = checkpoint and checkpoint.run
        page = report_page(title, model, evaluation, run, arguments.data_dir, False, {}, (), result_text(entry))
        write_output(arguments.output, page.encode())
        print(f"wrote {arguments.output}")
    for alarm in alarms:
        print(f"ALARM {in_one_line(alarm)}", file=sys.stderr)


def compare_tinyface(arguments: argparse.Namespace) -> int:
    """Prints a line per run, from the results that the runs kept."""
    from vitface.evaluation.tinyface import comparison_lines, kept_result

    runs = list(dict.fromkeys(path.resolve() for path in arguments.compare))
    kept = {str(run): kept_result(run) for run in runs}
    print("\n".join(comparison_lines(kept)))
    if arguments.json:
        write_output(arguments.json, json_bytes({"benchmark": "tinyface", "runs": kept}))
    return 0
