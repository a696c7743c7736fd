"""Templates as operators may write them: found, checked, their CSS inlined, compiled in a sandbox.

Promises: a template reaches nothing but the plain values it is given, cannot switch escaping off, load another file
than those in `_base/`, or ask for unbounded work in one expression. Jinja's own sandbox stops access to code, not the
use of memory (`'x'.center(10**9)`) nor unescaped output; the rest is refused here before a template is compiled.
Owns: where templates are found (the checkout, the wheel, an operator's folder that wins file by file), and the step
that inlines `_base/style.css` once per template, with the template's tags set aside while the CSS library parses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import BuiltinMethodType
from typing import Any, cast

import css_inline
from jinja2 import BaseLoader, Environment, StrictUndefined, Template, TemplateNotFound, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import TemplateModule
from jinja2.exceptions import TemplateSyntaxError
from jinja2.loaders import split_template_path
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

BASE = "_base/"
STYLE = "_base/style.css"

# What may be called on a value. None of them makes a long text out of a short one.
SAFE_METHODS = frozenset({"get", "items", "keys", "values", "startswith", "endswith", "lower", "upper", "strip"})
# What a template asks of `loop`; none of it is a method.
LOOP = frozenset({"first", "index", "index0", "last", "length", "revindex", "revindex0"})
# Jinja's filters that neither switch escaping off nor make a long text out of a short one.
SAFE_FILTERS = frozenset(
    {
        "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
        "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select",
        "selectattr", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper", "urlencode",
    }
)  # fmt: skip
FORBIDDEN = {
    nodes.ScopedEvalContextModifier: "autoescaping cannot be switched in a template",
    nodes.EvalContextModifier: "autoescaping cannot be switched in a template",
    nodes.Mul: "* is not available, because it can make a text of any size",
    nodes.Pow: "** is not available, because it can make a number of any size",
    nodes.Mod: "% is not available; use the tests 'odd', 'even' or 'divisibleby'",
}


class TemplateRefused(Exception):  # noqa: N818 - it says what happened, and RenderError is what callers see
    """A template that breaks the rules of this module; the message names the file, the line and the fault."""


def shipped_templates() -> Path:
    """The folder of the shipped templates: inside the package in a wheel, beside the packages in a checkout."""
    packaged = Path(__file__).parent / "templates"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "templates"


def environment(roots: tuple[Path, ...], *, filters: Mapping[str, Callable[..., object]]) -> Sandbox:
    """The Jinja environment over the folders in `roots` (the first that has a file wins), with our own `filters`."""
    made = Sandbox(_Loader(roots))
    made.filters = {name: made.filters[name] for name in SAFE_FILTERS} | dict(filters)
    return made


class _Compiled(Template):
    """A template whose imports and escapes are cheaper; both say what Jinja's own say."""

    @classmethod
    def from_code(cls, *args: Any, **kwargs: Any) -> Template:
        made = super().from_code(*args, **kwargs)
        made.root_render_func.__globals__["escape"] = escaped
        return made

    def _get_default_module(self, ctx: Context | None = None) -> TemplateModule:
        # There are no globals, so that all who import it share a module.
        return self._module or super()._get_default_module(ctx)


class _Code(CodeGenerator):
    """Asks a mapping for a value by `get` without a detour: templates do it of each field that may be absent."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:  # noqa: N802 - as in Jinja
        """A call. What it says of a mapping's own `get` is what the sandbox would say, which is asked of all others."""
        target = node.node
        plain = isinstance(target, nodes.Getattr) and target.attr == "get" and not (forward_caller or node.kwargs)
        # The arguments are written twice: calls among them would be four times, eight times ...
        calls = any(isinstance(one, nodes.Call) or one.find(nodes.Call) for one in node.args)
        if not plain or calls or node.dyn_args is not None or node.dyn_kwargs is not None:
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write("(found.get(")  # a name that Jinja uses nowhere; it is read before the arguments, which may set it
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(") if type(found := ")
        self.visit(cast("nodes.Getattr", target).node, frame)
        self.write(") is dict and 'get' not in found else environment.call(context, environment.getattr(found, 'get')")
        self.signature(node, frame)
        self.write("))")


def escaped(value: Any) -> str:
    """The value with HTML's five signs escaped, to be joined with other pieces of a template's output."""
    kind = type(value)
    text: str = value
    if kind is Markup:
        return text
    if kind is str and not ("&" in text or "<" in text or ">" in text or "'" in text or '"' in text):
        return text
    return escape(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which `data.items` is the event's field `items`, and a missing field is named in plain words.

    What `refuse` allows is answered without asking the sandbox again: that halves the time that a mail takes.
    """

    template_class = _Compiled
    code_generator_class: type[CodeGenerator] = _Code

    def __init__(self, loader: BaseLoader | None) -> None:
        super().__init__(
            loader=loader,
            undefined=StrictUndefined,
            autoescape=lambda name: bool(name and name.endswith(".html")),
            auto_reload=False,
            cache_size=-1,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.globals.clear()
        self._loaded: dict[str | Template, Template] = {}

    def get_template(
        self,
        name: str | Template,
        parent: str | None = None,
        globals: MutableMapping[str, Any] | None = None,  # noqa: A002 - as in Jinja
    ) -> Template:
        """The template. They never change while a process runs, and a mail asks for 14."""
        return self._loaded.get(name) or super().get_template(name, parent, globals)

    def _load_template(self, name: str, globals: MutableMapping[str, Any] | None) -> Template:  # noqa: A002 - as in Jinja
        template = self._loaded[name] = super()._load_template(name, globals)
        return template

    def context(self, name: str, values: dict[str, object]) -> Context:
        """What a rendering of a template goes by; `values` are what it sees. Jinja's own would copy them first."""
        return self.context_class(self, values, name, self.get_template(name).blocks)

    def pieces(self, context: Context) -> Iterator[str]:
        """The output of a context's template piece by piece."""
        # Jinja's generate() would add a step to each piece, and rewrite tracebacks that nobody is shown.
        return self.get_template(cast("str", context.name)).root_render_func(context)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`."""
        kind = type(obj)
        if kind is dict:
            if attribute in obj:
                return obj[attribute]
            if attribute not in SAFE_METHODS:
                return self.undefined(hint=f"the data has no field '{attribute}'")
            return getattr(obj, attribute)
        if kind is TemplateModule and attribute in (found := obj.__dict__) and not attribute.startswith("_"):
            return found[attribute]
        if kind is LoopContext and attribute in LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: object) -> Any:
        """`obj[argument]`."""
        if type(obj) is dict and argument not in obj:
            return self.undefined(hint=f"the data has no field '{argument}'")
        return super().getitem(obj, argument)

    def call(
        __self,  # noqa: N805 - as in Jinja
        __context: Context,
        __obj: object,
        *args: object,
        _block_vars: object = None,
        _loop_vars: object = None,
        **kwargs: object,
    ) -> object:
        """`obj(...)`: a macro, or one of SAFE_METHODS. Where it stands is for functions that ask: there are none."""
        if type(__obj) is Macro:
            simple = not (kwargs or __obj.caller or __obj.catch_varargs or __obj.catch_kwargs)
            if not simple or len(args) != len(__obj.arguments):
                return __obj(__context.eval_ctx, *args, **kwargs)
            made = __obj._func(*args)  # noqa: SLF001 - what Jinja does, after a look at all that a call may be
            return str.__new__(Markup, made) if __context.eval_ctx.autoescape else made
        if type(__obj) is BuiltinMethodType and __obj.__name__ in SAFE_METHODS:
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _Loader(BaseLoader):
    """Reads a template, refuses what this module forbids, and inlines the style sheet into `.html` files.

    What it made is kept, for two environments compile it: here, and in `worker.tracing`.
    """

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self._roots = roots
        self._style: str | None = None
        self._made: dict[str, str] = {}

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, None]:
        source = self._made.get(template)
        if source is None:
            source = self._made[template] = self._make(environment, template)
        return source, template, None

    def _make(self, environment: Environment, template: str) -> str:
        source = self._read(template)
        refuse(environment, template, source)
        if template.endswith(".html") and "<" in source:
            if self._style is None:
                self._style = self._read(STYLE)
            source = inline(source, self._style)
        return source

    def _read(self, template: str) -> str:
        # Sentences that both parts of a mail share are written once, as `_base/words.txt`; imported as `words.html`
        # the same source is compiled with escaping.
        candidates = [template]
        if template.startswith(BASE) and template.endswith(".html"):
            candidates.append(template.removesuffix(".html") + ".txt")
        for candidate in candidates:
            for root in self._roots:
                path = root.joinpath(*split_template_path(candidate))
                if path.is_file():
                    return path.read_text(encoding="utf-8")
        raise TemplateNotFound(template)


def refuse(environment: Environment, name: str, source: str) -> None:
    """Raises TemplateRefused where the template does what no template may do (reliability.md A7, A9)."""
    try:
        tree = environment.parse(source, name)
    except TemplateSyntaxError as error:
        raise TemplateRefused(f"{name}, line {error.lineno}: {error.message}") from None
    for line, fault in _faults(tree, name):
        raise TemplateRefused(f"{name}, line {line}: {fault}")


def _faults(tree: nodes.Template, name: str) -> Iterator[tuple[int, str]]:
    for kind, fault in FORBIDDEN.items():
        for node in tree.find_all(kind):
            yield node.lineno, fault
    yield from _foreign_files(tree, suffix=name[name.rfind(".") :])
    if not name.startswith(BASE):
        for macro in tree.find_all((nodes.Macro, nodes.CallBlock)):
            yield macro.lineno, "macros stand in _base/ only; import them from there"
    yield from _unbounded_calls(tree)


def _foreign_files(tree: nodes.Template, *, suffix: str) -> Iterator[tuple[int, str]]:
    references: list[nodes.Import | nodes.FromImport | nodes.Extends] = [
        *tree.find_all(nodes.Import),
        *tree.find_all(nodes.FromImport),
        *tree.find_all(nodes.Extends),
    ]
    for node in references:
        target = node.template
        name = target.value if isinstance(target, nodes.Const) else None
        # A macro of a .txt file escapes nothing, so an .html file that called it would show data unescaped.
        if not (isinstance(name, str) and name.startswith(BASE) and name.endswith(suffix)):
            yield node.lineno, f'only {suffix} files named in quotes under "{BASE}" can be extended or imported'
        elif isinstance(node, nodes.Import | nodes.FromImport) and node.with_context:
            yield node.lineno, "import macros without context, and pass them what they need"
    for include in tree.find_all(nodes.Include):
        yield include.lineno, "include is not available; extend a layout or import macros"


def _unbounded_calls(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    modules = {node.target for node in tree.find_all(nodes.Import)}
    macros: dict[str, int] = {"super": 0, "caller": 0}  # name -> line from which it may be called
    for imported in tree.find_all(nodes.FromImport):
        macros |= {alias if isinstance(alias, str) else alias[1]: 0 for alias in imported.names}
    macros |= {macro.name: _last_line(macro) + 1 for macro in tree.find_all(nodes.Macro)}
    reassigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    for call in tree.find_all(nodes.Call):
        match call.node:
            case nodes.Name(name=name) if name in macros and name not in reassigned:
                if call.lineno < macros[name]:
                    yield call.lineno, f"the macro {name} is used before its end; macros cannot call themselves"
            case nodes.Getattr(node=nodes.Name(name=name)) if name in modules and name not in reassigned:
                pass
            case nodes.Getattr(attr=attribute) if attribute in SAFE_METHODS:
                pass
            case nodes.Getattr(attr=attribute):
                yield call.lineno, f"{attribute}() is not available; what may be called: {_listed(SAFE_METHODS)}"
            case nodes.Name(name=name):
                yield call.lineno, f"{name}() is not available in a template"
            case _:
                yield call.lineno, "only macros and a few methods of values may be called"


def _last_line(node: nodes.Node) -> int:
    return max(child.lineno or 0 for child in (node, *node.find_all(nodes.Node)))


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


# --- CSS -------------------------------------------------------------------------------------------------------------

_TAG = re.compile(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", re.DOTALL)
_MARKUP = re.compile(r"(<!--.*?-->|<[^>]*>)", re.DOTALL)
_SET_ASIDE = re.compile(r'(?:<!--|&lt;!--)?jinja(\d+)x(?:--&gt;|-->|="")?')


def inline(source: str, style: str) -> str:
    """The template with the rules of `style` written into its elements; at-rules go to the head of a whole page.

    Template tags are set aside as comments (as words within a tag or a comment), for the parser would otherwise move
    them out of tables. Where rows are repeated, the template writes its `<tbody>` itself.
    """
    tags: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        tags.append(match.group())
        return f"jinja{len(tags) - 1}x"

    plain = _TAG.sub(set_aside, source)
    pieces = _MARKUP.split(plain)
    pieces[::2] = [re.sub(r"jinja\d+x", r"<!--\g<0>-->", text) for text in pieces[::2]]
    page = "".join(pieces)
    if "<html" in page:
        done = css_inline.CSSInliner(keep_at_rules=True, load_remote_stylesheets=False, extra_css=style).inline(page)
    else:
        done = inline_fragment(page, style)
    # Typographic signs become references, so that a mail in English stays plain ASCII and needs no encoding.
    ascii_only = done.encode("ascii", "xmlcharrefreplace").decode()
    return _SET_ASIDE.sub(lambda match: tags[int(match.group(1))], ascii_only)


def inline_fragment(html: str, style: str) -> str:
    """A piece of HTML with the rules of `style` written into its elements; nothing is fetched."""
    return css_inline.CSSInliner(load_remote_stylesheets=False).inline_fragment(html, style)
