"""Text from jinja2 templates, each of which lies next to the module that fills it."""

from pathlib import Path


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
