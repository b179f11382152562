"""`vitface evaluate --bench ijbb|ijbc`: templates of faces instead of pairs of images."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vitface.errors import ConfigError, in_one_line
from vitface.files import json_bytes, sha256_file, write_output

if TYPE_CHECKING:
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.plots import Chart
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint


def evaluate_ijb(model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace) -> int:
    """Embeds the faces over all ranks, where that is still to be done; the first rank scores them and prints."""
    from vitface.data.formats.ijb_lists import read_faces, read_protocol
    from vitface.evaluation.ijb.embedding import StoredRows
    from vitface.evaluation.ijb.results import result_text, roc_of_templates
    from vitface.evaluation.ijb.scoring import evaluate_templates
    from vitface.training.ranks.parallel import over_ranks
    from vitface.training.ranks.process_group import check_same, local_share, rank

    if arguments.routing or arguments.show_faces or arguments.degrade or arguments.degrade_probe:
        flags = "--routing, --show-faces and --degrade"
        raise ConfigError(f"{flags} are for pairs of photos; {arguments.bench} has templates of them")
    faces = read_faces(arguments.bench, arguments.data_dir)
    lists = sha256_file(faces.meta[f"{faces.name}_name_5pts_score.txt"])
    about = f"{checkpoint.sha256 if checkpoint else 'frozen'} {arguments.gate} {lists}"
    check_same({"model": about, "crops": len(faces.crops)})
    rows = StoredRows(faces, model, "F1" in arguments.pooling, about)
    protocol = read_protocol(faces) if rank() == 0 else None  # its errors come before the hours
    numbers = rows.missing() if rank() == 0 else []
    if arguments.dry_run:
        return predict_faces(rows, numbers)
    rows.complete(numbers, local_share(arguments.num_workers), over_ranks, rank() == 0)
    if protocol is None:
        return 0
    result = evaluate_templates(faces, protocol, map(rows.part, range(len(rows.files))), arguments.pooling)
    if result["auc"] < 0.55:
        protocol.alarms.append(f"{faces.name}: AUC {result['auc']:.4f} is chance level: the model or the crops are bad")
    print(f"embeddings: {rows.folder}, for other --pooling; delete it when you are done", file=sys.stderr)
    text, charts = result_text(faces.name, result), [roc_of_templates(faces.name, result)]
    write_result(result, text, charts, protocol.alarms, model, checkpoint, arguments)
    return 0


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


def write_result(
    entry: dict[str, Any],
    text: str,
    charts: "list[Chart]",
    alarms: list[str],
    model: "Recogniser",
    checkpoint: "Checkpoint | None",
    arguments: argparse.Namespace,
) -> None:
    """Prints a result, as text, and its alarms; keeps it, as `entry`, in the run; writes --json and --output."""
    from vitface.evaluation.benchmarks import Evaluation
    from vitface.evaluation.ijb.results import keep_result
    from vitface.evaluation.page import report_page

    print(text)
    run = checkpoint and checkpoint.run
    if checkpoint and run and checkpoint.is_best and not arguments.gate:
        try:
            keep_result(run, arguments.bench, entry, checkpoint.sha256)
        except OSError as error:
            print(f"warning: the result was not kept in {run} ({error.strerror})", file=sys.stderr)
    if arguments.json:
        data = {"alarms": alarms, "failures": [], "benchmarks": {arguments.bench: entry}}
        write_output(arguments.json, json_bytes(data))
    if arguments.output:
        title = str(checkpoint.path) if checkpoint else f"{model.config.backbone}, frozen"
        evaluation = Evaluation({}, alarms, [])
        page = report_page(title, model, evaluation, run, arguments.data_dir, False, {}, [(text, charts)])
        write_output(arguments.output, page.encode())
        print(f"wrote {arguments.output}")
    for alarm in alarms:
        print(f"ALARM {in_one_line(alarm)}", file=sys.stderr)


def compare_ijb(arguments: argparse.Namespace) -> int:
    """Prints a line per run and mode of pooling, from the results that the runs kept."""
    from vitface.evaluation.ijb.results import compared_rates, comparison_text, kept_results

    runs = list(dict.fromkeys(path.resolve() for path in arguments.compare))
    kept = {str(run): kept_results(run, arguments.bench, compared_rates) for run in runs}
    print(comparison_text(kept))
    if arguments.json:
        write_output(arguments.json, json_bytes({"benchmark": arguments.bench, "runs": kept}))
    return 0
