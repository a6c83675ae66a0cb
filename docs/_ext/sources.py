"""Directives that write tables from the sources: ``batchinv-options``, ``batchinv-markers``, ``batchinv-fixtures``."""

import ast
import inspect

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pytest_batchinv.plugin import fixtures, markers, options


class _Made(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        node = nodes.container()
        self.state.nested_parse(StringList(self.lines(), source=type(self).__name__), self.content_offset, node)
        return node.children

    def lines(self) -> list[str]:
        raise NotImplementedError


class Options(_Made):
    def lines(self) -> list[str]:
        found = []
        for option in options.OPTIONS:
            value = "" if option.form == "switch" else f" {option.metavar}"
            default = "" if option.default in (None, (), False) else f" Default: `{_text(option.default)}`."
            found += [f"`{option.flag}{value}`", f": {option.help}{default}", f"  Also `{option.ini}`, `{option.env}`.", ""]
        return found


class Markers(_Made):
    def lines(self) -> list[str]:
        return [line for text in markers.HELP for line in _term(*text.split(": ", 1))]


class Fixtures(_Made):
    def lines(self) -> list[str]:
        functions = [f for f in ast.parse(inspect.getsource(fixtures)).body if isinstance(f, ast.FunctionDef)]
        public = [f for f in functions if any("fixture" in ast.dump(d) for d in f.decorator_list)]
        return [line for f in public for line in _term(f.name, " ".join((ast.get_docstring(f) or "").split()))]


def _term(name: str, text: str) -> list[str]:
    return [f"`{name}`", f": {text}", ""]


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("batchinv-options", Options)
    app.add_directive("batchinv-markers", Markers)
    app.add_directive("batchinv-fixtures", Fixtures)
    return {"parallel_read_safe": True}
