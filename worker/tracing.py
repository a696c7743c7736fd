"""The proof that a template puts what differs by recipient into its output, and does nothing else with it.

A template is rendered once with *leaves* in place of the personal values. A leaf may be output, escaped, concatenated,
handed to macros, put into lists and mappings, and tested for truth (it stands for a text that is not empty). Its output
is a *mark*, which later gives way to the value; the mark holds an `&`, so that it tells how often it was escaped.
Whatever else a template does with a leaf, or with a text that holds a mark, raises `Computed`: a comparison, a filter,
a test, a loop over its letters, a slice, a method. Then nothing is proven, and the mails are rendered in full; or,
where that is asked for (`Holes`), nothing is proven of the block in which it happens, which leaves a mark of its own.

How it is made sure: the environment here compiles the same sources as the usual one, with each operand that an
expression looks at wrapped in a check (`_Checks`), and every filter, test, look-up and call checked when it is made.
What is neither known nor plain counts as a computation. The usual environment has none of this, and no slower for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any, Final, TypeVar, cast

from jinja2 import BaseLoader, Template, Undefined, nodes
from jinja2.compiler import CodeGenerator
from jinja2.environment import TemplateModule
from jinja2.runtime import BlockReference, Context, Macro
from jinja2.visitor import NodeTransformer

from worker.sandbox import Sandbox

N = TypeVar("N", bound=nodes.Node)

_OPEN: Final = "\ue000"
_CLOSE: Final = "\ue001"
# Names that no template can write.
USED: Final = "names used"
HOLES: Final = "blocks left out"
_CLEAN: Final = "a clean operand"
_SAID: Final = "what may be said"
_WHOLE: Final = "a container"
_ROWS: Final = "a container of containers"
_TEXT: Final = "a summand"

_PLAIN_KINDS: Final[tuple[type, ...]] = (str, int, float, bool, type(None))
_VIEWS: Final[tuple[type, ...]] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: Final[tuple[type, ...]] = (list, tuple, dict, GeneratorType, *_VIEWS)


class Computed(Exception):  # noqa: N818 - it says what happened, and no fault of anybody
    """A template does more with a personal value than saying it: it is rendered in full for each recipient."""


class Leaf:
    """Stands for a personal text that is not empty; `text` is what it puts into the output, with its mark."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return True

    def _computed(self, *_: object) -> Any:
        raise Computed("a template looks into a personal value")

    __repr__ = __format__ = __hash__ = __iter__ = __len__ = __contains__ = __getitem__ = _computed
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __index__ = _computed


def mark(nonce: str, place: int) -> str:
    """What stands for the value at a place. `nonce` is letters and digits that no data can know."""
    return f"{_OPEN}{nonce}&{place}{_CLOSE}"


def marked(text: str) -> bool:
    """Whether a text may hold a mark."""
    return _OPEN in text


def split(text: str, nonce: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The text around its marks, and the marks: (place, how often it was escaped)."""
    pieces = re.split(f"{_OPEN}{nonce}&((?:amp;)*)([0-9]+){_CLOSE}", text)
    marks = [
        (int(place), len(escapes) // len("amp;")) for escapes, place in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    return pieces[::3], marks


def holds_leaf(value: object) -> bool:
    """Whether a value is or holds a leaf or a mark, or is of a kind of which that is not known."""
    if isinstance(value, str):
        return _OPEN in value
    if isinstance(value, (*_PLAIN_KINDS, Undefined)):
        return False
    if isinstance(value, list | tuple):
        return any(map(holds_leaf, value))
    if isinstance(value, dict):
        return any(holds_leaf(key) or holds_leaf(item) for key, item in value.items())
    return True


def _is_leaf(value: object) -> bool:
    return isinstance(value, Leaf) or (isinstance(value, str) and _OPEN in value)


# ---------------------------------------------------------------- checks of operands


def _clean(value: object) -> object:
    """An operand that is looked at: it must hold nothing personal."""
    if holds_leaf(value):
        raise Computed("a template computes on a personal value")
    return value


def _said(value: object) -> object:
    """What is put into the output: a text, a number or a leaf; containers would show how Python writes their items."""
    if type(value) is Leaf or isinstance(value, _PLAIN_KINDS):
        return value
    return _clean(value)


def _whole(value: object) -> object:
    """What is walked through or taken apart: a container, whose items are not looked at by that."""
    if isinstance(value, _CONTAINERS) or not holds_leaf(value):
        return value
    raise Computed("a template takes a personal value apart")


def _rows(value: object) -> object:
    """What is walked through by several names at once: each item is taken apart."""
    if isinstance(_whole(value), GeneratorType):
        raise Computed("a template takes apart what it makes on the way")
    for item in cast("Iterable[object]", value):
        _whole(item)
    return value


def _summand(value: object) -> object:
    """What is added: texts that hold marks are joined by it, and lists too."""
    if isinstance(value, Leaf):
        return str(value)
    return value if isinstance(value, str | list) else _clean(value)


_CONSTANTS: Final = (nodes.TemplateData, nodes.Const)


class _Checks(NodeTransformer):
    """Wraps each operand that a template looks at; refuses the kinds of nodes that are not known here."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if type(node) not in _KNOWN:
            raise Computed(f"a template has a {type(node).__name__}, of which nothing is known")
        return super().generic_visit(node, *args, **kwargs)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802 - as in Jinja
        self.generic_visit(node)
        node.expr = _wrapped(node.expr, _CLEAN)
        for operand in node.ops:
            operand.expr = _wrapped(operand.expr, _CLEAN)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.left, node.right = _wrapped(node.left, _TEXT), _wrapped(node.right, _TEXT)
        return node

    def _arithmetic(self, node: nodes.BinExpr) -> nodes.Node:
        self.generic_visit(node)
        node.left, node.right = _wrapped(node.left, _CLEAN), _wrapped(node.right, _CLEAN)
        return node

    visit_Sub = visit_Div = visit_FloorDiv = _arithmetic  # noqa: N815

    def _sign(self, node: nodes.UnaryExpr) -> nodes.Node:
        self.generic_visit(node)
        node.node = _wrapped(node.node, _CLEAN)
        return node

    visit_Neg = visit_Pos = _sign  # noqa: N815

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _wrapped(node.key, _CLEAN)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # compiled without asking the environment
            node.node = _wrapped(node.node, _WHOLE)
        return node

    def visit_Slice(self, node: nodes.Slice) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.start, node.stop, node.step = (
            part if part is None else _wrapped(part, _CLEAN) for part in (node.start, node.stop, node.step)
        )
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _wrapped(cast("nodes.Expr", node.iter), _taken_apart(node.target, one=_WHOLE, several=_ROWS))
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.node = _wrapped(cast("nodes.Expr", node.node), _taken_apart(node.target, one=None, several=_WHOLE))
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.values = [
            _wrapped(value, _taken_apart(target, one=None, several=_WHOLE))
            for target, value in zip(node.targets, node.values, strict=True)
        ]
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _wrapped(node.dyn_args, _WHOLE)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _wrapped(node.dyn_kwargs, _WHOLE)
        return node

    def _outputs(self, node: nodes.Output | nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [one if isinstance(one, _CONSTANTS) else _wrapped(one, _SAID) for one in node.nodes]
        return node

    visit_Output = visit_Concat = _outputs  # noqa: N815


_KNOWN: Final = frozenset(
    {
        nodes.Add, nodes.And, nodes.Assign, nodes.AssignBlock, nodes.Block, nodes.Call, nodes.CallBlock,
        nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const, nodes.Dict, nodes.Div, nodes.Extends, nodes.Filter,
        nodes.FilterBlock, nodes.FloorDiv, nodes.For, nodes.FromImport, nodes.Getattr, nodes.Getitem, nodes.If,
        nodes.Import, nodes.Keyword, nodes.List, nodes.Macro, nodes.Name, nodes.Neg, nodes.Not, nodes.Operand,
        nodes.Or, nodes.Output, nodes.Pair, nodes.Pos, nodes.Slice, nodes.Sub, nodes.Template, nodes.TemplateData,
        nodes.Test, nodes.Tuple, nodes.With,
    }
)  # fmt: skip


def _taken_apart(target: nodes.Node, *, one: str | None, several: str) -> str | None:
    """The check for what is given to a name, or to several at once."""
    if not isinstance(target, nodes.Tuple):
        return one
    if any(isinstance(item, nodes.Tuple) for item in target.items):
        raise Computed("a template takes values apart in two steps")
    return several


def _wrapped(node: nodes.Expr, check: str | None) -> nodes.Expr:
    if check is None:
        return node
    made = nodes.Filter(node, check, [], [], None, None)
    made.set_lineno(node.lineno)
    made.environment = node.environment
    return made


# ---------------------------------------------------------------- the environment


FIRST_HOLE: Final = 1_000_000_000
#: The places of blocks begin behind those of values.


class Holes:
    """The blocks of a template in which it computes: each leaves a mark, and is rendered for each recipient.

    A block can be left out, for what it sets is seen in it alone, and what it sees is what the template was given and
    what is set at the template's top: that must be the same for all. A template is given it by the name HOLES.
    """

    def __init__(self, nonce: str) -> None:
        self.names: list[str] = []  # by place
        self._nonce = nonce
        self._top: Context | None = None
        self._seen: list[dict[str, Any]] = []  # what was set at the top, for each block

    def watch(self, context: Context) -> None:
        """Look at the blocks of a context; the first one is that of the whole template."""
        self._top = self._top or context
        context.blocks = _Blocks(context.blocks, self)

    def leave(self, name: str, context: Context) -> str:
        """The mark of a block. Raises Computed where the block cannot be left out."""
        plain = all(type(value) is TemplateModule or not holds_leaf(value) for value in context.vars.values())
        if context is not self._top or name in self.names or not plain:
            raise Computed("a block computes on what it is given where it stands")
        self.names.append(name)
        self._seen.append(dict(context.vars))
        return mark(self._nonce, FIRST_HOLE + len(self.names) - 1)

    @property
    def settled(self) -> bool:
        """Whether what is set at the template's top is at the end what it was for each block that was left out."""
        top = self._top.vars if self._top is not None else {}
        return all(seen.keys() == top.keys() and all(top[name] is seen[name] for name in top) for seen in self._seen)


class _Block:
    """A block that is left out where it computes."""

    def __init__(self, name: str, function: Callable[[Context], Iterator[str]], holes: Holes) -> None:
        self._name = name
        self._function = function
        self._holes = holes

    def __call__(self, context: Context) -> Iterator[str]:
        try:
            return iter(list(self._function(context)))
        except Computed:
            return iter([self._holes.leave(self._name, context)])

    def __eq__(self, other: object) -> bool:
        return other == self._function  # Jinja looks up the block in which `super` stands

    __hash__ = None  # type: ignore[assignment]


class _Blocks(dict[str, Any]):
    """A context's blocks by name: those that stand in for each other, the last one first."""

    def __init__(self, blocks: Mapping[str, Any], holes: Holes) -> None:
        super().__init__(blocks)
        self._holes = holes

    def __getitem__(self, name: str) -> Any:
        first, *others = super().__getitem__(name)
        return [_Block(name, first, self._holes), *others]


class _Watched(Context):
    """Notes which of the given names a template asks for, and leaves out blocks where it may."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        if HOLES in parent:
            parent[HOLES].watch(self)

    def resolve_or_missing(self, key: str) -> Any:
        used = self.parent.get(USED)
        if used is not None:
            used.add(key)
        return super().resolve_or_missing(key)


class _Tracing(Sandbox):
    """The sandbox of `worker.sandbox`, in which nothing computes on a leaf."""

    context_class = _Watched
    code_generator_class = CodeGenerator  # Jinja's own: it asks `call` each time

    def __init__(self, loader: BaseLoader | None) -> None:
        super().__init__(loader)
        self._refused: dict[str, str] = {}  # templates that are not compiled again for each kind of mail

    def _load_template(self, name: str, globals: MutableMapping[str, Any] | None) -> Template:  # noqa: A002 - as in Jinja
        if name in self._refused:
            raise Computed(self._refused[name])
        try:
            return super()._load_template(name, globals)
        except Computed as refusal:
            self._refused[name] = str(refusal)
            raise

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        # Not before: the rules of `refuse` look at the tree as the template's author wrote it.
        return super()._generate(cast("nodes.Template", _Checks().visit(source)), *args, **kwargs)

    def getattr(self, obj: object, attribute: str) -> object:
        if _is_leaf(obj):
            raise Computed("a template asks for a part of a personal value")
        return super().getattr(obj, attribute)

    def getitem(self, obj: object, argument: object) -> object:
        if _is_leaf(obj) or holds_leaf(argument):
            raise Computed("a template asks for a part of a personal value")
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:  # noqa: N805 - as in Jinja
        if not isinstance(__obj, Macro | BlockReference):
            # A method of a plain value; `get` looks at its key, and hands back its other argument as it is.
            seen = args[:1] if getattr(__obj, "__name__", "") == "get" and not kwargs else args
            if type(__obj) is not BuiltinMethodType or any(map(holds_leaf, (*seen, *kwargs.values()))):
                raise Computed("a template calls a method with a personal value")
        return super().call(__context, __obj, *args, **kwargs)


def tracing(usual: Sandbox) -> Sandbox:
    """An environment that compiles what `usual` compiles, and raises Computed where a template computes on a leaf."""
    made = _Tracing(usual.loader)
    made.filters = {name: _guarded(name, function, _FILTERS) for name, function in usual.filters.items()}
    made.filters["join"] = _join(made.filters["join"])
    made.filters["link"] = _link(made.filters["link"])
    made.filters |= {_CLEAN: _clean, _SAID: _said, _WHOLE: _whole, _ROWS: _rows, _TEXT: _summand}
    made.tests = {name: _guarded(name, function, _TESTS) for name, function in usual.tests.items()}
    return made


Passing = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]
#: Whether a filter or test, given these values, looks at none that is personal.


def _guarded(name: str, function: Any, passings: Mapping[str, Passing]) -> Any:
    """A filter or test that may look at nothing personal, but for the ways in `passings`."""
    passing = passings.get(name)
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's own context stands before the value

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = args[first:]
        if passing is not None and passing(given, kwargs):
            return function(*args, **kwargs)
        if any(map(holds_leaf, given)) or any(map(holds_leaf, kwargs.values())):
            raise Computed(f"a template uses {name!r} on a personal value")
        return function(*args, **kwargs)

    return guarded


def _of_container(given: tuple[Any, ...], others: Mapping[str, Any]) -> bool:
    """Counting items, or taking one of them, does not look at any."""
    return len(given) == 1 and not others and isinstance(given[0], _CONTAINERS)


def _of_each(given: tuple[Any, ...], others: Mapping[str, Any]) -> bool:
    """What is done to each item is done by another filter or test, or by a look-up; these check for themselves."""
    named = not any(map(holds_leaf, (*given[1:], *others.values())))
    return named and isinstance(given[0], _CONTAINERS)


def _of_texts(given: tuple[Any, ...], others: Mapping[str, Any]) -> bool:
    """`join` of texts and leaves, between which stands something plain."""
    items, *between = given
    return not others and isinstance(items, list) and all(map(_sayable, items)) and not any(map(holds_leaf, between))


def _of_one(given: tuple[Any, ...], others: Mapping[str, Any]) -> bool:
    """Escaping a leaf, or writing it as a text, is saying it."""
    return len(given) == 1 and not others and _sayable(given[0])


def _sayable(value: object) -> bool:
    return type(value) is Leaf or isinstance(value, _PLAIN_KINDS)


def _whether_there(_given: tuple[Any, ...], _others: Mapping[str, Any]) -> bool:
    """What asks only whether a value is there, or whether it is empty."""
    return True


_FILTERS: Final[Mapping[str, Passing]] = {
    **dict.fromkeys(("count", "length", "first", "last", "list"), _of_container),
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr"), _of_each),
    **dict.fromkeys(("e", "escape", "string"), _of_one),
    **dict.fromkeys(("d", "default"), _whether_there),
    "join": _of_texts,
}
_TESTS: Final[Mapping[str, Passing]] = dict.fromkeys(("defined", "undefined", "none"), _whether_there)


def _join(guarded: Callable[..., Any]) -> Callable[..., Any]:
    """`join` behind a `map`, which makes its items on the way."""

    @wraps(guarded)
    def joined(context: Any, items: Any, *args: Any, **kwargs: Any) -> Any:
        return guarded(context, list(items) if isinstance(items, GeneratorType) else items, *args, **kwargs)

    return joined


def _link(guarded: Callable[..., Any]) -> Callable[..., Any]:
    """`link` of one of our own links: what it looks at stands before the mark, and it hands the link back as it is."""

    @wraps(guarded)
    def link(url: Any) -> Any:
        if type(url) is not Leaf:
            return guarded(url)
        guarded(str(url).partition(_OPEN)[0])
        return url

    return link
