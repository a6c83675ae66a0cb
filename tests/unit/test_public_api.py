"""What others build on changes on purpose alone: every documented name with its signature, every option, marker and fixture.

``python tests/unit/test_public_api.py`` writes the snapshot anew. Then say in changes/ what changed, and keep an old name as an
alias with a deprecation.
"""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import FunctionType

from pytest_batchinv.letters import WORDS
from pytest_batchinv.plugin import fixtures, markers, options

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_api() -> str:
    lines = [*_documented(), *_plugin()]
    return "\n".join(lines) + "\n"


def _documented():
    """The objects of the reference, as docs/reference/api.md names them."""
    module = ""
    for kind, name in re.findall(
        r"^\.\. (module|autofunction|autoclass):: ([\w.]+)", (ROOT / "docs/reference/api.md").read_text(), re.M
    ):
        if kind == "module":
            module = name
            continue
        home, _, name = f"{module}.{name}".rpartition(".") if "." not in name else name.rpartition(".")
        thing = getattr(import_module(home), name)
        yield f"{home}.{name}{_signature(thing)}"
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            for method, value in sorted(vars(thing).items()):
                if isinstance(value, (FunctionType, classmethod)) and not method.startswith("_"):
                    yield f"{home}.{name}.{method}{_signature(getattr(thing, method))}"


def _signature(thing) -> str:
    """Names and defaults. Annotations are left out: they are the checker's."""
    parameters = inspect.signature(thing).parameters.values()
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return re.sub(r" at 0x\w+", "", str(inspect.Signature(shown)))


def _plugin():
    for option in options.OPTIONS:
        yield f"{option.flag} {option.ini} {option.env}"
    yield from (text.partition(":")[0] for text in markers.HELP)
    tree = ast.parse(inspect.getsource(fixtures))
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef)]
    yield from (f"fixture {f.name}" for f in functions if any("fixture" in ast.dump(d) for d in f.decorator_list))
    yield from (f"relation {letter}" for letter in WORDS)


def test_the_public_api_is_the_one_of_the_snapshot():
    assert public_api() == SNAPSHOT.read_text(), (
        f"where this is meant: python {Path(__file__).relative_to(ROOT)}, and a line in changes/"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
