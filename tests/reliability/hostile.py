"""The part "Hostile surroundings" of docs/reliability.md as data: what surrounds the project, what happens, which test.

`python tests/reliability/hostile.py` prints the part, with the number of cases that pytest collects of each test.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]


class Hostile(NamedTuple):
    given: str
    outcome: str
    file: str  # below tests/
    tests: str  # the names of its tests that do this, without test_


FOLDERS, CONTENTS, SURROUNDINGS = (f"reliability/test_hostile_{x}.py" for x in ("folders", "contents", "surroundings"))
RUNS, GALLERY, COMMANDS = (f"reliability/test_hostile_{x}.py" for x in ("runs", "gallery", "commands"))
PUBLISH, FETCH, FOREIGN = "exchange/test_publish.py", "weights/test_fetch.py", "weights/test_foreign_files.py"
ROWS = [
    Hostile(
        "a lock that is a link, a pipe or a folder",
        "refused, nothing is written",
        FOLDERS,
        "a_lock_that_is_a_link_is_refused a_lock_that_is_no_file_is_refused_at_once",
    ),
    Hostile(
        "a link under a name that a command writes",
        "replaced by the file; what it led to stays as it was",
        FOLDERS,
        "a_replaced_file_is_a_file_and_what_it_was_a_link_to_is_as_it_was a_new_file_is_not_written_through_a_link "
        "a_new_folder_is_not_written_through_a_link "
        "what_a_user_names_may_be_a_pipe_and_is_not_written_through_a_link",
    ),
    Hostile(
        "modules named `tqdm`, `numpy`, `torch`, ... in the current folder",
        "not run",
        FOLDERS,
        "no_module_of_the_current_folder_is_run",
    ),
    Hostile(
        "a repository that is public already",
        "asked for; an upload needs `--public`",
        PUBLISH,
        "a_repository_that_is_public_already_is_asked_for",
    ),
    Hostile(
        "`runs/mine` where no such run is",
        "an error; only `hf://owner/name` asks the Hub",
        PUBLISH,
        "a_folder_that_is_not_there_is_not_asked_for what_is_no_repository_is_not_asked_for",
    ),
    Hostile(
        "an `align.csv` that names crops outside its folder",
        "none is deleted",
        FOLDERS,
        "a_report_of_crops_elsewhere_deletes_nothing",
    ),
    Hostile(
        "a disk that fills while a crop is written",
        "an error; no cut crop is left",
        FOLDERS,
        "a_crop_on_a_full_disk_is_not_there",
    ),
    Hostile(
        "three processes that keep scores in one run",
        "none is lost, none is torn",
        FOLDERS,
        "three_writers_of_one_file_lose_nothing",
    ),
    Hostile(
        "names, paths and tags on a model card, in every form",
        "found, and not uploaded; said where nothing could be checked",
        PUBLISH,
        "names_are_found_in_every_form paths_are_found_in_every_form tags_that_load_something_are_found "
        "where_the_people_are_not_known_it_is_said",
    ),
    Hostile(
        "JSON that is nested without end, has numbers without end, NaN, or is none",
        "named error",
        CONTENTS,
        "what_is_no_json a_file_without_end",
    ),
    Hostile(
        "a model whose embedding is NaN or 0",
        'an error, not "different people"',
        CONTENTS,
        "nan_and_zero_are_no_verdict",
    ),
    Hostile(
        "settings that no model can have, or that ask for more than the file can fill",
        "named error before anything is built",
        "reliability/test_bad_input.py",
        "settings_no_model_can_have_are_named",
    ),
    Hostile(
        "thresholds that are no cosines, of rates that are none",
        "named error",
        CONTENTS,
        "thresholds_are_cosines_or_damaged thresholds_of_a_gallery",
    ),
    Hostile(
        "packed folders with other types, shapes, counts, and no shard",
        "named error",
        CONTENTS,
        "packed_folders_say_what_they_hold",
    ),
    Hostile(
        "galleries with other types, widths, names and parts",
        "named error",
        GALLERY,
        "settings_of_a_wrong_type settings_that_are_none parts_that_are_none origins_that_lead_nowhere "
        "another_width_than_the_model",
    ),
    Hostile(
        "one row of two million numbers",
        "memory of the size of the file",
        GALLERY,
        "one_row_of_two_million_numbers",
    ),
    Hostile(
        "scores with other types, shapes, folds and names",
        "named error",
        RUNS,
        "scores_that_are_none scores_of_other_bytes",
    ),
    Hostile(
        "a pipe, a folder or a device in place of a file",
        "refused at once",
        CONTENTS,
        "a_pipe_in_a_files_place_is_not_waited_for",
    ),
    Hostile(
        "a device such as `/dev/null` as the place to write, for root",
        "written to or refused, never replaced",
        FOLDERS,
        "a_device_is_written_to_or_refused_and_never_replaced",
    ),
    Hostile(
        "a JPEG of thousands of scans or segments",
        "refused before it is decoded",
        "data/test_images.py",
        "jpegs_with_more_scans_or_segments_than_a_photo_are_not_decoded",
    ),
    Hostile(
        "small files that ask for hours or for all memory",
        "bounded by the size of the file (see the table above)",
        "reliability/test_bounded.py",
        "what_reading_takes",
    ),
    Hostile(
        "names that no file can have, in lists and as domains",
        "named error",
        CONTENTS,
        "a_name_that_no_file_has names_are_numbered_in_memory_of_their_own_length",
    ),
    Hostile(
        "a `.pth` that makes a bytearray, is compressed, or runs code",
        "not opened",
        FOREIGN,
        "a_pickle_that_asks_for_any_memory_is_not_opened an_archive_that_is_compressed_is_not_opened "
        "a_pickle_with_code_is_refused_and_not_run",
    ),
    Hostile(
        "tensors that are sparse, nested, empty or without values",
        "named error",
        FOREIGN,
        "tensors_that_are_no_plain_ones_are_named a_header_without_end_is_not_read",
    ),
    Hostile(
        "a server with lengths, redirects and ranges that cannot be",
        "named error, the part stays usable",
        FETCH,
        "lengths_that_cannot_be redirects_that_lead_nowhere another_range_than_asked_for_is_not_appended",
    ),
    Hostile(
        "a server that sends without end, a byte now and then, or nothing",
        "given up after a deadline",
        FETCH,
        "a_body_without_end a_body_that_drips a_server_that_falls_silent_is_given_up",
    ),
    Hostile(
        "tables with cells without end, bytes that are no text, numbers that no photo has",
        "the line is named",
        CONTENTS,
        "tables_that_are_none landmarks_are_pixels",
    ),
    Hostile(
        "photos whose names have line ends, quotes and formulas",
        "aligned once; no cell is a formula",
        CONTENTS,
        "photos_of_any_name_are_aligned_once a_table_holds_any_text_and_no_formula",
    ),
    Hostile(
        "a damaged log of a run",
        "its rows are left out, with a note; the run resumes",
        RUNS,
        "a_log_that_is_damaged a_log_in_a_pipes_place a_log_of_other_lines_resumes",
    ),
    Hostile(
        "counters and settings of other types in a run",
        "named error",
        RUNS,
        "counters_of_other_types counters_that_cannot_be settings_of_other_types",
    ),
    Hostile(
        "every flag of every command at its extremes: negative, huge, NaN, empty, `hpu`",
        "one line before anything starts",
        "reliability/test_hostile_arguments.py",
        "numbers paths_and_texts what_is_said numbers_in_python",
    ),
    Hostile(
        "a pair list of one line, in place of each list",
        "named error",
        CONTENTS,
        "a_list_of_one_line",
    ),
    Hostile(
        "a study whose run was trained again",
        "judged again",
        COMMANDS,
        "a_study_judges_a_run_that_was_trained_again",
    ),
    Hostile(
        "a user without a home",
        "what needs none runs; else `set VITFACE_HOME`",
        SURROUNDINGS,
        "a_user_without_a_home",
    ),
    Hostile(
        "a damaged detector",
        "named error",
        "compatibility/test_verify_photos.py",
        "a_damaged_detector",
    ),
    Hostile(
        "`/dev/shm` of 64 kB; workers that are killed, or cannot start",
        "images go through pipes; one named error",
        "compatibility/test_workers.py",
        "a_small_dev_shm a_worker_that_dies a_worker_that_dies_in_the_middle_of_a_result no_process_can_start",
    ),
    Hostile(
        "a file that is cut while it is in use",
        "named error",
        GALLERY,
        "a_part_that_is_cut_while_it_is_mapped a_part_that_is_replaced_while_it_is_mapped",
    ),
    Hostile(
        "escapes, line ends and directions of writing in names",
        "printed as text, in one line",
        SURROUNDINGS,
        "what_is_printed_moves_no_cursor names_are_shown_in_one_line a_name_in_a_gallery_is_no_line_and_no_formula",
    ),
    Hostile(
        "the same in what every command and other libraries print",
        "escaped in one place; a bar still moves",
        "reliability/test_hostile_names.py",
        "names_do_not_steer_the_terminal what_other_libraries_print_is_escaped_too a_bar_still_moves_the_cursor",
    ),
    Hostile(
        "exchanged people, domain labels, pixels of packed images, names and sizes of others",
        "resume refuses them, and takes the same ones",
        "reliability/test_resuming.py",
        "exchanged_people_pixels_and_domain_labels_are_other_data exchanged_photos_are_other_files",
    ),
    Hostile(
        "an exported ONNX file",
        "no path of the exporter is in it",
        "compatibility/test_onnx_layout.py",
        "the_lowest_ir_version",
    ),
    Hostile(
        "Ctrl-C while a command is imported; a lost terminal",
        "`stopped`; the run is saved as after SIGTERM",
        SURROUNDINGS,
        "ctrl_c_while_a_command_is_imported a_lost_terminal_stops_a_run_as_sigterm_does",
    ),
    Hostile(
        "a closed output, a pipe into `head`, a terminal without the character",
        "no traceback",
        SURROUNDINGS,
        "nobody_reads_any_more a_stream_that_is_closed a_terminal_that_lacks_a_character_gets_its_number",
    ),
    Hostile(
        "a lock that is deleted while a run runs",
        "it still locks",
        COMMANDS,
        "a_lock_that_is_deleted_still_locks",
    ),
    Hostile(
        "what tells of people, under the usual umask",
        "for its owner alone",
        FOLDERS,
        "what_tells_of_people_is_for_its_owner_alone",
    ),
    Hostile(
        "folders with blanks and `$( )` in suggested commands",
        "quoted",
        COMMANDS,
        "a_suggested_command_is_words every_suggested_command_is_quoted",
    ),
    Hostile(
        "secrets of many makers, and variables that hold one",
        "found, in linear time",
        "reliability/test_secrets.py",
        "secrets_of_other_makers variables_that_hold_secrets",
    ),
    Hostile(
        "a disk without locks, links, or fsync of folders; a run that may only be read",
        "a note; evaluation works",
        "compatibility/test_runs.py",
        "a_disk_without_locks a_disk_without_links a_disk_without_fsync_of_folders a_read_only_run",
    ),
    Hostile(
        "somebody's folder as the place to write",
        "nothing is mixed into it",
        "compatibility/test_strangers_folders.py",
        "nothing_is_mixed_with_other_files a_part_of_somebody a_benchmark_is_not_replaced",
    ),
]


def ids(row: Hostile) -> list[str]:
    """The tests of a row, FILE::TEST."""
    return [f"{row.file}::test_{name}" for name in row.tests.split()]


def missing() -> list[str]:
    """The tests of the table that are nowhere."""
    every = [test.split("::") for row in ROWS for test in ids(row)]
    return [name for file, name in every if f"\ndef {name}(" not in (TESTS / file).read_text(encoding="utf-8")]


def counts() -> Counter[str]:
    """How many cases pytest collects of each test, the slow ones included."""
    every = [str(TESTS / test) for row in ROWS for test in ids(row)]
    options = ["-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(TESTS.parent), *every]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    return Counter(re.findall(r"^tests/([^\[\n]+?)(?:\[.*)?$", done.stdout, re.MULTILINE))


def part(found: Counter[str]) -> str:
    """The Markdown table."""
    lines = ["| given | what happens | cases |", "|---|---|---|"]
    lines += [f"| {row.given} | {row.outcome} | {sum(found[test] for test in ids(row))} |" for row in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(part(counts()))
