"""`vitface evaluate --bench tinyface`: small photos, each searched among many."""

import argparse
from typing import TYPE_CHECKING

from vitface.commands.evaluate_ijb import predict_faces, write_result
from vitface.errors import ConfigError
from vitface.files import json_bytes, write_output

if TYPE_CHECKING:
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint


def evaluate_tinyface(model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace) -> int:
    """Embeds the photos over all ranks, where that is still to be done; the first rank searches and prints."""
    from vitface.data.formats.tinyface_folder import read_tinyface
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.tinyface import result_json, result_text, search_ranks
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
    write_result(entry, result_text(entry), [], faces.alarms, model, checkpoint, arguments)
    return 0


def compare_tinyface(arguments: argparse.Namespace) -> int:
    """Prints a line per run, from the results that the runs kept."""
    from vitface.evaluation.ijb.results import kept_results
    from vitface.evaluation.tinyface import comparison_lines, rates

    runs = list(dict.fromkeys(path.resolve() for path in arguments.compare))
    kept = {str(run): next(iter(kept_results(run, "tinyface", rates).values())) for run in runs}
    print("\n".join(comparison_lines(kept)))
    if arguments.json:
        write_output(arguments.json, json_bytes({"benchmark": "tinyface", "runs": kept}))
    return 0
