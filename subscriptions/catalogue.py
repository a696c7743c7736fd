"""Role catalogues: which role receives which category, and who may request and approve which action.

A catalogue is a TOML file that operators read and edit; the vocabulary (categories and actions) is another.
This module promises that a loaded catalogue keeps every rule of section 3.3 of the rules: one that breaks a rule is
refused as a whole, with one sentence that names file, role and fault. It reads those files and owns nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeVar, get_args

Class = Literal["promotional", "informational", "operational", "transactional", "status", "approval", "security"]
Basis = Literal["stated", "inferred"]
Mode = Literal["direct", "copy", "esign", "fallback"]
Delivery = Literal["email", "esign", "status_page"]
Requirement = Literal["required", "recommended", "optional", "conditional"]
Scope = Literal["account", "product"]
Support = Literal["yes", "no", "limited", "chat_only"]
UnlistedCategory = Literal["reject"]  # S-40; the only policy there is, as for the next two
OverCardinality = Literal["earliest_wins"]  # S-41
DedupeBy = Literal["normalised_address"]  # S-21

OPT_OUT_CLASSES: Final = ("promotional", "informational")  # elsewhere only a copy may be opted out of (S-23)
HOLDER_KINDS: Final = ("person", "group")

_Choice = TypeVar("_Choice", bound=str)

_CLASSES: Final[tuple[Class, ...]] = get_args(Class)
_BASES: Final[tuple[Basis, ...]] = get_args(Basis)
_MODES: Final[tuple[Mode, ...]] = get_args(Mode)
_DELIVERIES: Final[tuple[Delivery, ...]] = get_args(Delivery)
_REQUIREMENTS: Final[tuple[Requirement, ...]] = get_args(Requirement)
_SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
_SUPPORTS: Final[tuple[Support, ...]] = get_args(Support)
_UNLISTED_CATEGORY: Final[tuple[UnlistedCategory, ...]] = get_args(UnlistedCategory)
_OVER_CARDINALITY: Final[tuple[OverCardinality, ...]] = get_args(OverCardinality)
_DEDUPE_BY: Final[tuple[DedupeBy, ...]] = get_args(DedupeBy)

_BUILT_IN: Final = Path(__file__).with_name("catalogues")
_KEY: Final = re.compile(r"[a-z][a-z0-9_]*")
_CONDITION: Final = re.compile(r"account\.uses:[A-Za-z0-9._-]{1,64}|[a-z][a-z0-9_]*")


class CatalogueError(Exception):
    """A catalogue or the vocabulary cannot be used: one sentence names the file, the role and the fault."""


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of news. Its class decides whether an opt-out may exist at all (S-23)."""

    key: str
    title: str
    class_: Class
    product_tagged: bool  # events of it may carry products, and product preferences may exist


@dataclass(frozen=True, slots=True)
class Action:
    """Something a contact may do, request or approve."""

    key: str
    title: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The categories and actions that catalogues may name, by key, in file order."""

    categories: Mapping[str, Category]
    actions: Mapping[str, Action]


@dataclass(frozen=True, slots=True)
class Receives:
    """A category that a role receives, and how."""

    category: str
    mode: Mode
    when_unreachable: str | None  # the role that a fallback watches; set exactly for mode fallback
    opt_out: bool
    product_preferences: bool
    basis: Basis
    source: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """An action that a role may do, may approve or may not do."""

    action: str
    when: str | None  # `account.uses:PRODUCT`, or a name that the request's context has to hold
    exclusive: bool  # denies the action to every other role; only ever true under may_do
    basis: Basis
    source: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """A role: limits, what its holders receive and what they may do."""

    key: str
    title: str
    min: int
    max: int | None  # None = no limit
    requirement: Requirement
    recommended_min: int | None  # set exactly for requirement recommended
    required_when: str | None  # a condition; set exactly for requirement conditional
    scope: Scope
    product: str | None
    holder_kinds: frozenset[str]
    works_with_support: Support
    support_limit: str | None
    source: tuple[str, ...]
    receives: Mapping[str, Receives]  # by category
    may_do: Mapping[str, Grant]  # by action, as the next two
    may_approve: Mapping[str, Grant]
    may_not: Mapping[str, Grant]  # bounds this role, not the person, who may hold others (S-14)


@dataclass(frozen=True, slots=True)
class Approval:
    """An action that waits for approvers when the vendor's staff enter it."""

    action: str
    quorum: int
    basis: Basis
    source: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """A category that the catalogue has, and how it leaves."""

    category: str
    delivery: Delivery
    basis: Basis
    source: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """One vendor's roles, checked. `version` is a short hash of what it says (comments and layout do not count)."""

    key: str
    title: str
    public_page: str
    version: str
    vocabulary: Vocabulary = field(repr=False)
    categories: Mapping[str, Accepted] = field(repr=False)
    approvals: Mapping[str, Approval] = field(repr=False)
    roles: Mapping[str, Role] = field(repr=False)  # in file order
    unlisted_category: UnlistedCategory
    over_cardinality: OverCardinality
    dedupe_by: DedupeBy
    staff_requests_need_approval: bool
    body: str = field(repr=False)  # the TOML text


def load_catalogues(names: Sequence[str] = ("billtrust", "issuetrak")) -> Mapping[str, Catalogue]:
    """The catalogues of those names, by their keys. A name is a built-in one or the path of a TOML file.

    Raises CatalogueError at the first fault.
    """
    vocabulary, vocabulary_content = _load_vocabulary(_BUILT_IN / "vocabulary.toml")
    catalogues: dict[str, Catalogue] = {}
    for name in names:
        path, file = _find(name)
        body = _read(path, file)
        catalogue = _catalogue(_parse(body, file), body, file, vocabulary, vocabulary_content)
        if catalogue.key in catalogues:
            raise CatalogueError(
                f"{file}: the catalogue key '{catalogue.key}' is taken by another catalogue; rename one."
            )
        catalogues[catalogue.key] = catalogue
    return catalogues


# ---------------------------------------------------------------- files


def _find(name: str) -> tuple[Path, str]:
    """The path of a catalogue and the name that faults call it by."""
    if "/" in name or "\\" in name or name.endswith(".toml"):
        return Path(name), name
    path = _BUILT_IN / f"{name}.toml"
    built_in = sorted(found.stem for found in _BUILT_IN.glob("*.toml") if found.stem != "vocabulary")
    if name not in built_in:
        raise CatalogueError(
            f"There is no built-in catalogue '{name}': name one of {', '.join(built_in)}, or the path of a .toml file."
        )
    return path, path.name


def _read(path: Path, file: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise CatalogueError(f"{file}: line {line} is not UTF-8 text; save the file as UTF-8.") from None
    except OSError as error:
        raise CatalogueError(f"The catalogue file {file} cannot be read: {error.strerror or error}.") from None


def _parse(body: str, file: str) -> dict[str, object]:
    try:
        return tomllib.loads(body)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{file} is not valid TOML: {error}.") from None


# ---------------------------------------------------------------- reading tables strictly


class _Table:
    """A TOML table read strictly: an unknown key, a missing one or a wrong type is a fault at its place."""

    def __init__(self, values: object, *, file: str, place: str, required: str, optional: str = "") -> None:
        self.file = file
        self.place = place
        if not isinstance(values, dict):
            raise self.fault(f"must be a table, not {_kind(values)}")
        self.values: dict[str, object] = values
        known = (*required.split(), *optional.split())
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
                raise self.fault(f"has the unknown key '{key}' ({hint})")
        for key in required.split():
            if key not in values:
                raise self.fault(f"lacks the key '{key}'")

    def fault(self, message: str) -> CatalogueError:
        return CatalogueError(f"{self.file}: {self.place} {message}.")

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(f"has {key} = {_shown(value)}, but it must be a text that is not empty")
        return value

    def text_or_none(self, key: str) -> str | None:
        return self.text(key) if key in self.values else None

    def choice(self, key: str, choices: Sequence[_Choice], default: _Choice | None = None) -> _Choice:
        value = self.values.get(key, default)
        for choice in choices:
            if value == choice:
                return choice
        raise self.fault(f"has {key} = {_shown(value)}, but it must be {_either(choices)}")

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"has {key} = {_shown(value)}, but it must be true or false")
        return value

    def integer_or_none(self, key: str, *, least: int) -> int | None:
        if key not in self.values:
            return None
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fault(f"has {key} = {_shown(value)}, but it must be a whole number of at least {least}")
        return value

    def condition(self, key: str) -> str | None:
        value = self.text_or_none(key)
        if value is not None and not _CONDITION.fullmatch(value):
            raise self.fault(
                f"has the condition {key} = {_shown(value)}, but a condition is 'account.uses:PRODUCT' "
                "or one plain name such as 'self_service_unavailable'"
            )
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
            raise self.fault(f"has {key} = {_shown(value)}, but it must be a list of texts that is not empty")
        return tuple(value)

    def basis(self) -> Basis:
        return self.choice("basis", _BASES)

    def tables(self, key: str, *, required: str, optional: str, named_by: str) -> Iterator[tuple[str, _Table]]:
        """The inline tables of an array, each with its name; a name that comes twice is a fault."""
        values = self.values.get(key, [])
        if not isinstance(values, list):
            raise self.fault(f"has {key} = {_shown(values)}, but it must be an array of inline tables")
        seen: set[str] = set()
        for position, value in enumerate(values, start=1):
            name = value.get(named_by) if isinstance(value, dict) else None
            place = f"{self.place}: {key} entry {name if isinstance(name, str) else position}"
            table = _Table(value, file=self.file, place=place, required=required, optional=optional)
            name = table.text(named_by)
            if name in seen:
                raise self.fault(f"names {name} twice under {key}; keep one of the two")
            seen.add(name)
            yield name, table

    def named_tables(self, key: str, *, place: str, required: str, optional: str = "") -> Iterator[tuple[str, _Table]]:
        """The tables under a key, each with its name, in file order."""
        values = self.values.get(key, {})
        if not isinstance(values, dict):
            raise self.fault(f"has {key} = {_shown(values)}, but it must be a table of tables, such as [{key}.KEY]")
        for name, value in values.items():
            table = _Table(value, file=self.file, place=f"{place} {name}", required=required, optional=optional)
            if not _KEY.fullmatch(name):
                raise table.fault("has a bad key: keys are lower-case letters, digits and '_', a letter first")
            yield name, table


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _kind(value: object) -> str:
    return {str: "a text", list: "an array", bool: "true or false", int: "a number"}.get(type(value), "another value")


def _either(choices: Sequence[str]) -> str:
    quoted = [f"'{choice}'" for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


# ---------------------------------------------------------------- the vocabulary


def _load_vocabulary(path: Path) -> tuple[Vocabulary, dict[str, object]]:
    """The vocabulary, and its content as parsed (part of every catalogue's version)."""
    file = path.name
    content = _parse(_read(path, file), file)
    top = _Table(content, file=file, place="the file", required="schema_version categories actions")
    _check_schema_version(top)
    categories = {
        key: Category(
            key=key,
            title=table.text("title"),
            class_=table.choice("class", _CLASSES),
            product_tagged=table.boolean("product_tagged", default=False),
        )
        for key, table in top.named_tables(
            "categories", place="category", required="title class", optional="product_tagged"
        )
    }
    titles = top.values["actions"]
    if not isinstance(titles, dict) or not all(isinstance(title, str) and title for title in titles.values()):
        raise top.fault("must have an [actions] table with a title for each action")
    actions = {key: Action(key=key, title=title) for key, title in titles.items()}
    return Vocabulary(categories=categories, actions=actions), content


def _check_schema_version(top: _Table) -> None:
    if top.values["schema_version"] != 1 or top.values["schema_version"] is True:
        raise top.fault(f"has schema_version = {_shown(top.values['schema_version'])}, but this version reads only 1")


# ---------------------------------------------------------------- one catalogue


def _catalogue(
    content: dict[str, object], body: str, file: str, vocabulary: Vocabulary, vocabulary_content: dict[str, object]
) -> Catalogue:
    top = _Table(
        content,
        file=file,
        place="the file",
        required="schema_version catalogue categories roles",
        optional="approvals",
    )
    _check_schema_version(top)
    head = _Table(
        content["catalogue"],
        file=file,
        place="[catalogue]",
        required="key title public_page unlisted_category over_cardinality dedupe_by staff_requests_need_approval",
    )
    key = head.text("key")
    if not _KEY.fullmatch(key):
        raise head.fault(f"has key = {_shown(key)}, but keys are lower-case letters, digits and '_', a letter first")
    categories = _accepted(top, vocabulary)
    roles = _roles(top, vocabulary, categories)
    approvals = _approvals(top, vocabulary)
    _check_fallbacks(roles, file)
    _check_exclusive(roles, file)
    _check_approvals(approvals, roles, file)
    return Catalogue(
        key=key,
        title=head.text("title"),
        public_page=head.text("public_page"),
        version=_version(content, vocabulary_content),
        vocabulary=vocabulary,
        categories=categories,
        approvals=approvals,
        roles=roles,
        unlisted_category=head.choice("unlisted_category", _UNLISTED_CATEGORY),
        over_cardinality=head.choice("over_cardinality", _OVER_CARDINALITY),
        dedupe_by=head.choice("dedupe_by", _DEDUPE_BY),
        staff_requests_need_approval=head.boolean("staff_requests_need_approval"),
        body=body,
    )


def _version(content: dict[str, object], vocabulary_content: dict[str, object]) -> str:
    """The hash keeps the order of keys: the order of roles is part of what a catalogue says."""
    said = json.dumps([content, vocabulary_content], ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _accepted(top: _Table, vocabulary: Vocabulary) -> dict[str, Accepted]:
    accepted: dict[str, Accepted] = {}
    for key, table in top.named_tables("categories", place="category", required="delivery basis source"):
        category = _known_category(key, table, vocabulary)
        delivery = table.choice("delivery", _DELIVERIES)
        if category.class_ == "status" and delivery != "status_page":
            raise table.fault(f"is of class status, so its delivery must be 'status_page', not '{delivery}' (S-39)")
        if category.class_ != "status" and delivery == "status_page":
            raise table.fault(f"is of class {category.class_}, so its delivery cannot be 'status_page'")
        accepted[key] = Accepted(category=key, delivery=delivery, basis=table.basis(), source=table.texts("source"))
    return accepted


def _approvals(top: _Table, vocabulary: Vocabulary) -> dict[str, Approval]:
    approvals: dict[str, Approval] = {}
    for key, table in top.named_tables("approvals", place="approval", required="quorum basis source"):
        _known_action(key, table, vocabulary)
        quorum = table.values["quorum"]
        if quorum != 1 or isinstance(quorum, bool):
            raise table.fault(f"has quorum = {_shown(quorum)}, but it must be 1: the first decision counts (S-36)")
        approvals[key] = Approval(action=key, quorum=1, basis=table.basis(), source=table.texts("source"))
    return approvals


def _roles(top: _Table, vocabulary: Vocabulary, categories: Mapping[str, Accepted]) -> dict[str, Role]:
    tables = top.named_tables(
        "roles",
        place="role",
        required="title min requirement scope holder_kinds works_with_support source",
        optional="max recommended_min required_when product support_limit receives may_do may_approve may_not",
    )
    roles = {key: _role(key, table, vocabulary, categories) for key, table in tables}
    if not roles:
        raise top.fault("names no role; add at least one [roles.KEY]")
    return roles


def _role(key: str, table: _Table, vocabulary: Vocabulary, categories: Mapping[str, Accepted]) -> Role:
    role = Role(
        key=key,
        title=table.text("title"),
        min=table.integer_or_none("min", least=0) or 0,
        max=table.integer_or_none("max", least=1),
        requirement=table.choice("requirement", _REQUIREMENTS),
        recommended_min=table.integer_or_none("recommended_min", least=1),
        required_when=table.condition("required_when"),
        scope=table.choice("scope", _SCOPES),
        product=table.text_or_none("product"),
        holder_kinds=frozenset(table.texts("holder_kinds")),
        works_with_support=table.choice("works_with_support", _SUPPORTS),
        support_limit=table.text_or_none("support_limit"),
        source=table.texts("source"),
        receives=_receives(table, vocabulary, categories),
        may_do=_grants(table, "may_do", vocabulary),
        may_approve=_grants(table, "may_approve", vocabulary),
        may_not=_grants(table, "may_not", vocabulary),
    )
    _check_limits(role, table)
    _check_holders(role, table)
    _check_prohibitions(role, table)
    return role


def _receives(table: _Table, vocabulary: Vocabulary, categories: Mapping[str, Accepted]) -> dict[str, Receives]:
    receives: dict[str, Receives] = {}
    entries = table.tables(
        "receives",
        named_by="category",
        required="category basis source",
        optional="mode when_unreachable opt_out product_preferences",
    )
    for key, entry in entries:
        category = _known_category(key, entry, vocabulary)
        received = Receives(
            category=key,
            mode=entry.choice("mode", _MODES, "direct"),
            when_unreachable=entry.text_or_none("when_unreachable"),
            opt_out=entry.boolean("opt_out", default=False),
            product_preferences=entry.boolean("product_preferences", default=False),
            basis=entry.basis(),
            source=entry.texts("source"),
        )
        _check_received(received, category, categories.get(key), entry)
        receives[key] = received
    return receives


def _grants(table: _Table, key: str, vocabulary: Vocabulary) -> dict[str, Grant]:
    grants: dict[str, Grant] = {}
    optional = {"may_do": "when exclusive", "may_approve": "when", "may_not": ""}[key]
    for action, entry in table.tables(key, named_by="action", required="action basis source", optional=optional):
        _known_action(action, entry, vocabulary)
        grants[action] = Grant(
            action=action,
            when=entry.condition("when"),
            exclusive=entry.boolean("exclusive", default=False),
            basis=entry.basis(),
            source=entry.texts("source"),
        )
    return grants


# ---------------------------------------------------------------- the rules (rules.md, section 3.3)


def _known_category(key: str, table: _Table, vocabulary: Vocabulary) -> Category:
    if key not in vocabulary.categories:
        raise table.fault(f"names the unknown category '{key}'{_meant(key, vocabulary.categories)}")
    return vocabulary.categories[key]


def _known_action(key: str, table: _Table, vocabulary: Vocabulary) -> None:
    if key not in vocabulary.actions:
        raise table.fault(f"names the unknown action '{key}'{_meant(key, vocabulary.actions)}")


def _meant(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _check_received(received: Receives, category: Category, accepted: Accepted | None, entry: _Table) -> None:
    """Class decides whether a role may receive a category, and whether an opt-out may exist."""
    if category.class_ == "status":
        raise entry.fault("is of class status, which is answered with the status page; no role receives it")
    if accepted is None:
        raise entry.fault(f"is not among the catalogue's categories; add [categories] {received.category} = {{...}}")
    if received.mode == "esign" and accepted.delivery != "esign":
        raise entry.fault("has mode 'esign', but the category's delivery is not 'esign'")
    if received.mode in {"direct", "copy"} and accepted.delivery == "esign":
        raise entry.fault(
            f"has mode '{received.mode}', but a signing link is the signer's alone; use 'esign' or 'fallback' (XC-08)"
        )
    if received.mode == "fallback" and received.when_unreachable is None:
        raise entry.fault("has mode 'fallback' but lacks when_unreachable, the role that it stands in for")
    if received.mode != "fallback" and received.when_unreachable is not None:
        raise entry.fault(f"has when_unreachable, which only a fallback has, but its mode is '{received.mode}'")
    if category.class_ == "promotional" and not received.opt_out:
        raise entry.fault("is promotional, so it must have opt_out = true")
    if received.opt_out and category.class_ not in OPT_OUT_CLASSES and received.mode != "copy":
        raise entry.fault(f"is {category.class_}, so it cannot have opt_out = true unless it is a copy (S-23)")
    if received.product_preferences and not category.product_tagged:
        raise entry.fault("has product_preferences = true, but events of this category carry no products (S-04)")


def _check_limits(role: Role, table: _Table) -> None:
    if role.max is not None and role.max < role.min:
        raise table.fault(f"has max = {role.max}, which is below min = {role.min}")
    if (role.requirement == "required") != (role.min > 0):
        raise table.fault(
            f"has requirement = '{role.requirement}' and min = {role.min}, but only and every required role has a min"
        )
    if (role.requirement == "recommended") != (role.recommended_min is not None):
        raise table.fault("must have recommended_min exactly if its requirement is 'recommended'")
    if (role.requirement == "conditional") != (role.required_when is not None):
        raise table.fault("must have required_when exactly if its requirement is 'conditional'")
    if role.max is not None and role.recommended_min is not None and role.max < role.recommended_min:
        raise table.fault(f"has max = {role.max}, which is below recommended_min = {role.recommended_min}")
    if role.product is not None and role.scope != "product":
        raise table.fault("has a product, so its scope must be 'product'")


def _check_holders(role: Role, table: _Table) -> None:
    for kind in role.holder_kinds:
        if kind not in HOLDER_KINDS:
            raise table.fault(f"has the holder kind '{kind}', but it must be {_either(HOLDER_KINDS)}")
    if "group" in role.holder_kinds:
        for received in role.receives.values():
            if received.mode == "esign":
                raise table.fault(
                    f'receives {received.category} for signature, so its holder_kinds must be ["person"] (S-34)'
                )


def _check_prohibitions(role: Role, table: _Table) -> None:
    for action in role.may_not:
        for granted, key in ((role.may_do, "may_do"), (role.may_approve, "may_approve")):
            if action in granted:
                raise table.fault(f"has {action} under both {key} and may_not; keep one of the two")


def _check_fallbacks(roles: Mapping[str, Role], file: str) -> None:
    for role in roles.values():
        for received in role.receives.values():
            watched = received.when_unreachable
            place = f"{file}: role {role.key}: receives entry {received.category}"
            if watched == role.key:
                raise CatalogueError(f"{place} is a fallback for its own role; name another in when_unreachable.")
            if watched is not None and watched not in roles:
                raise CatalogueError(f"{place} is a fallback for the unknown role '{watched}'{_meant(watched, roles)}.")


def _check_exclusive(roles: Mapping[str, Role], file: str) -> None:
    for role in roles.values():
        for grant in role.may_do.values():
            others = [other.key for other in roles.values() if other is not role and grant.action in other.may_do]
            if grant.exclusive and others:
                raise CatalogueError(
                    f"{file}: role {role.key}: may_do entry {grant.action} is exclusive, "
                    f"but role {others[0]} may do it too; take one of them out."
                )


def _check_approvals(approvals: Mapping[str, Approval], roles: Mapping[str, Role], file: str) -> None:
    for action in approvals:
        if not any(action in role.may_approve for role in roles.values()):
            raise CatalogueError(
                f"{file}: approval {action} can be given by nobody; let a role have it under may_approve."
            )
