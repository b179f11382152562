"""Documents: jinja2 templates, each of which lies next to the module that fills it; Markdown tables and sections."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vitface.errors import ConfigError
from vitface.files import open_regular, replace_file


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a row may have fewer cells than `head`, the others are empty."""
    lines = [[*row, *[""] * (len(head) - len(row))] for row in (head, *rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


def put_between_markers(path: Path, title: str, text: str) -> None:
    """Replaces the generated section `title` of a document, or adds it at the end; the rest stays as it is."""
    before = ""
    if path.exists():
        with open_regular(path) as file:
            before = file.read().decode("utf-8", errors="surrogateescape")
    first, last = f"<!-- {title}: generated, do not edit -->\n", f"<!-- end of {title} -->\n"
    head, begun, rest = before.partition(first)
    if begun and last not in rest:
        raise ConfigError(f"{path} has the marker {first.strip()} without {last.strip()}; put it back or remove both")
    tail = rest.partition(last)[2]
    gap = "" if begun or not head else "\n"
    replace_file(
        path, f"{head}{gap}{first}\n## {title}\n\n{text}\n{last}{tail}".encode("utf-8", errors="surrogateescape")
    )


def render(template: str, **values: object) -> str:
    """Returns the filled template; `template` is its path in this package. In `.html.j2` every value is escaped.

    A name that the template uses and the caller does not pass raises `jinja2.UndefinedError`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
