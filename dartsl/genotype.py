"""The genotype: which two operations each node of the two cells takes, and what a cell hands on.

A genotype is plain data (section 2.4 of arXiv:1806.09055). Nodes are numbered as in the official
code: 0 and 1 are a cell's inputs (the outputs of the cell before the last and of the last cell),
2 is the first intermediate node.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import yaml

from dartsl.errors import UserError, unknown
from dartsl.files import whole_file

Edge = tuple[str, int]

GENOTYPE_FILE = "genotype.yaml"
"""What a search calls its result."""

_FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
_TARGET = "dartsl.genotype.Genotype"
# A call in the official notation; at a line's start perhaps with the name that it is given.
_CALL = re.compile(r"(?:^[ \t]*(?:(\w+)[ \t]*=[ \t]*)+)?Genotype[ \t]*\(", re.MULTILINE)
# What stands behind a # that is no number's ("epoch #3"), and quoted text, in which there is none.
_COMMENT = re.compile(r"""('[^'\n]*'|"[^"\n]*")|(?:^|(?<=[\s,()[\]]))#(?!\d)[^\n]*""", re.MULTILINE)
_YAML = re.compile(r"^\s*[{\"']*normal[\"']*\s*:", re.MULTILINE)
_MAX_TEXT = 100_000  # characters; the largest published genotype has under 1,000


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell.

    Attributes:
        normal: (primitive, source) pairs of the normal cell, two per intermediate node, in the
            order of their publication.
        normal_concat: the nodes whose concatenation is the normal cell's output.
        reduce: the same for the reduction cell.
        reduce_concat: the same for the reduction cell.

    Raises:
        UserError: where an edge or a concatenation names a node that does not exist.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for cell in ("normal", "reduce"):
            edges = _checked_edges(cell, getattr(self, cell))
            concat = _checked_concat(cell, getattr(self, f"{cell}_concat"), len(edges) // 2)
            object.__setattr__(self, cell, edges)
            object.__setattr__(self, f"{cell}_concat", concat)

    @property
    def primitives(self) -> frozenset[str]:
        """Names of the primitives that occur in either cell."""
        return frozenset(primitive for primitive, _ in self.normal + self.reduce)

    def distance(self, other: "Genotype") -> int:
        """How many edges of this genotype the other one has not; a node's two have no order."""
        return (self._edges() - other._edges()).total()

    def _edges(self) -> Counter[tuple[str, int, str, int]]:
        """The edges of both cells, each with its cell and node."""
        return Counter(
            (cell, index // 2, *edge)
            for cell in ("normal", "reduce")
            for index, edge in enumerate(getattr(self, cell))
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a genotype from text: the official code's notation, or the project's yaml.

        The official notation may stand anywhere in a line of a log, e.g.
        `genotype = Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)`.
        Of several the last one counts, as in the log of a search, which writes one every epoch;
        but where they have names of their own, as in the official `genotypes.py`, none is chosen.
        Comments do not count. Only literals and `range` are understood; nothing is ever evaluated.

        Raises:
            UserError: where the text holds no genotype, or different ones of several names.
        """
        bare = _COMMENT.sub(lambda found: found[1] or "", text)
        if _CALL.search(bare) or _YAML.search(bare):  # or else a comment is all that there is
            text = bare
        starts = {call[1]: call.end() for call in _CALL.finditer(text)}  # the last of each name
        named = {
            name: cls._read(f"Genotype({text[start : start + _MAX_TEXT]}", _read_call)
            for name, start in starts.items()
        }
        different = len(set(named.values()))
        if different > 1:
            names = ", ".join(name or "one without a name" for name in named)
            raise UserError(
                f"There are {different} different genotypes ({_shorten(names)}); give a file with "
                "the one that is meant."
            )
        if named:
            return next(iter(named.values()))
        if len(text) > _MAX_TEXT:  # a log may have more
            raise UserError(f"A genotype is at most {_MAX_TEXT:,} characters, not {len(text):,}.")
        return cls._read(text, yaml.safe_load)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a genotype from a file: the yaml that `save` writes, or the official notation.

        Raises:
            UserError: where the file is missing, holds no genotype, or several; see `parse`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"Cannot read the genotype file {str(path)!r}: {reason}.") from error
        try:
            return cls.parse(text)
        except UserError as error:
            raise UserError(f"Genotype file {str(path)!r}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the genotype as yaml; a file in `conf/genotype/` becomes a choice of the group."""
        with whole_file(path) as part:  # a search killed here leaves that of the epoch before
            part.write_text(self.yaml(), encoding="utf-8")

    def yaml(self) -> str:
        """The project's yaml, which `parse` reads."""
        fields = {
            name: [list(entry) if isinstance(entry, tuple) else entry for entry in value]
            for name, value in asdict(self).items()
        }
        return yaml.safe_dump(
            {"_target_": _TARGET, **fields}, sort_keys=False, default_flow_style=None
        )

    def notation(self) -> str:
        """The official code's notation, which `parse` reads too."""
        fields = (f"{name}={list(getattr(self, name))!r}" for name in _FIELDS)
        return f"Genotype({', '.join(fields)})"

    @classmethod
    def _read(cls, text: str, read: Callable[[str], Any]) -> Self:
        try:
            fields = read(text)
        except Exception:  # a dozen kinds; PyYAML adds AttributeError and others for odd tags
            fields = None
        if not isinstance(fields, Mapping):
            raise UserError(
                f"No genotype in {_shorten(text)}: expected yaml or the official notation, "
                "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), ...)."
            )
        return cls._from_fields(fields)

    @classmethod
    def _from_fields(cls, fields: Mapping[Any, Any]) -> Self:
        missing = [name for name in _FIELDS if name not in fields]
        surplus = [str(name) for name in fields if name not in (*_FIELDS, "_target_")]
        if missing or surplus or fields.get("_target_", _TARGET) != _TARGET:
            found = ", ".join(map(str, fields)) or "none"
            raise UserError(f"A genotype has the fields {', '.join(_FIELDS)}; found: {found}.")
        return cls(**{name: fields[name] for name in _FIELDS})


def published(name: str) -> Genotype:
    """A published cell by name, e.g. "darts_v2": the files of `conf/genotype/`.

    Raises:
        UserError: where no cell of this name is shipped.
    """
    package = Path(__file__).parent
    # A wheel carries the cells inside the package, a checkout beside it.
    folder = next(
        (path for root in (package, package.parent) if (path := root / "conf/genotype").is_dir()),
        package,
    )
    # from_file and its like are ways to find a genotype, not cells.
    cells = {path.stem: path for path in folder.glob("*.yaml") if _is_cell(path)}
    if name not in cells:
        raise unknown("genotype", name, cells)
    return Genotype.load(cells[name])


def _is_cell(path: Path) -> bool:
    return f"_target_: {_TARGET}\n" in path.read_text(encoding="utf-8")


def _checked_edges(cell: str, edges: Iterable[Any]) -> tuple[Edge, ...]:
    """Normalise to a tuple of (primitive, source) and check every source against its node."""
    pairs = _as_tuple(f"{cell} cell", edges)
    checked: list[Edge] = []
    for index, pair in enumerate(pairs):
        entry = () if isinstance(pair, str) else _as_tuple(f"{cell} cell", pair)
        if len(entry) != 2 or not isinstance(entry[0], str) or not is_whole_number(entry[1]):
            raise UserError(f"The {cell} cell holds {pair!r} where a [primitive, source] belongs.")
        node = index // 2 + 2
        if not 0 <= entry[1] < node:
            raise UserError(
                f"In the {cell} cell, node {node} takes {entry[0]!r} from node {entry[1]}; "
                f"its sources are 0 to {node - 1}."
            )
        checked.append((str(entry[0]), int(entry[1])))  # of numpy, too
    if not checked or len(checked) % 2:
        raise UserError(f"The {cell} cell has {len(checked)} edges; each node takes exactly two.")
    return tuple(checked)


def _checked_concat(cell: str, concat: Iterable[Any], num_nodes: int) -> tuple[int, ...]:
    nodes = _as_tuple(f"{cell}_concat", concat)
    valid = range(2, num_nodes + 2)
    if not nodes or any(not is_whole_number(node) or node not in valid for node in nodes):
        raise UserError(
            f"{cell}_concat is {list(nodes)!r}; it lists intermediate nodes, 2 to {num_nodes + 1}."
        )
    if len(set(nodes)) != len(nodes):
        raise UserError(f"{cell}_concat names a node twice: {list(nodes)!r}.")
    return tuple(map(int, nodes))


def count_skips(edges: Iterable[Edge]) -> int:
    """How many edges of a cell are skip connections."""
    return sum(primitive == "skip_connect" for primitive, _ in edges)


def is_whole_number(value: Any) -> bool:
    """Whether a value is an integer, of numpy too, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_tuple(what: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UserError(f"The {what} of a genotype is a list, not {_shorten(repr(value))}.")
    return tuple(value)


def _read_call(text: str) -> dict[str, Any]:
    """Fields of the one call `Genotype(...)` that `text` begins with."""
    call = ast.parse(_up_to_closing(text), mode="eval").body
    if not isinstance(call, ast.Call) or len(call.args) > len(_FIELDS):
        raise ValueError("not a call of Genotype")
    fields = dict(zip(_FIELDS, map(_literal, call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in fields:
            raise ValueError("not plain keyword arguments")
        fields[keyword.arg] = _literal(keyword.value)
    return fields


def _literal(node: ast.expr) -> Any:
    """A literal, a `range` of whole numbers up to 100, or the `list` or `tuple` of either."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        given = [_literal(argument) for argument in node.args]
        if node.func.id == "range" and all(is_whole_number(n) and abs(n) <= 100 for n in given):
            return list(range(*given))
        if node.func.id in ("list", "tuple") and len(given) == 1:
            return list(given[0])
    return ast.literal_eval(node)  # which refuses all other calls


def _up_to_closing(text: str) -> str:
    """The text up to the parenthesis that closes the first one; no name holds a parenthesis."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return text[: index + 1]
    raise ValueError("a parenthesis is not closed")


def _shorten(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 3] + "...")
