from __future__ import annotations

import csv
import re
import tomllib
from pathlib import Path

import pytest

from subscriptions.catalogue import Catalogue, CatalogueError, Grant, Receives, Role, load_catalogues
from tests.shared import shared

FIXTURES = Path(__file__).parent / "fixtures"
BUILT_IN = load_catalogues()

# ---------------------------------------------------------------- what the built-in catalogues say


def holders_line(role: Role) -> str:
    need = {
        "required": "required",
        "recommended": f"recommended>={role.recommended_min}",
        "optional": "optional",
        "conditional": f"conditional[{role.required_when}]",
    }[role.requirement]
    kinds = "+".join(kind for kind in ("person", "group") if kind in role.holder_kinds)
    most = "" if role.max is None else role.max
    return f"holders {role.min}-{most} {need} {kinds} support={role.works_with_support} scope={role.scope}"


def receives_line(entry: Receives) -> str:
    marks = "i" * (entry.basis == "inferred") + "o" * entry.opt_out + "p" * entry.product_preferences
    watched = f"({entry.when_unreachable})" if entry.when_unreachable else ""
    mode = "" if entry.mode == "direct" else f" {entry.mode}{watched}"
    return f"receives {entry.category} {marks or '-'}{mode}"


def grant_line(name: str, grant: Grant) -> str:
    marks = "i" * (grant.basis == "inferred") + "x" * grant.exclusive
    return f"{name} {grant.action} {marks or '-'}" + (f" [{grant.when}]" if grant.when else "")


def lines_of(catalogue: Catalogue) -> list[str]:
    lines = []
    for role in catalogue.roles.values():
        said = [holders_line(role)]
        said += [receives_line(entry) for entry in role.receives.values()]
        for name in ("may_do", "may_approve", "may_not"):
            said += [grant_line(name, grant) for grant in getattr(role, name).values()]
        lines += [f"{catalogue.key} {role.key} {line}" for line in said]
    return lines


def test_the_built_in_catalogues_say_what_the_rules_say():
    expected = (FIXTURES / "catalogues.txt").read_text(encoding="utf-8").splitlines()
    assert [line for catalogue in BUILT_IN.values() for line in lines_of(catalogue)] == [
        line for line in expected if not line.startswith("#")
    ]


@pytest.mark.parametrize("key", ["billtrust", "issuetrak"])
def test_a_catalogue_holds_every_entry_of_the_settled_rules_with_basis_and_source(key):
    draft = tomllib.loads(shared("rules", f"roles-{key}.toml").read_text(encoding="utf-8"))
    catalogue = BUILT_IN[key]
    head = dict(draft["catalogue"])
    del head["source_file"]  # the catalogue's own comment says what the line numbers mean
    assert {name: getattr(catalogue, name) for name in head} == head
    assert {
        accepted.category: (accepted.delivery, accepted.basis, list(accepted.source))
        for accepted in catalogue.categories.values()
    } == {entry["key"]: (entry["delivery"], entry["basis"], entry["source"]) for entry in draft["category"]}
    assert [
        {"action": a.action, "quorum": a.quorum, "basis": a.basis, "source": list(a.source)}
        for a in catalogue.approvals.values()
    ] == draft["approval"]
    assert [role_as_drafted(role) for role in catalogue.roles.values()] == [
        {**role, "title": re.sub(r" \(.*\)$", "", role["title"])}  # the remark in a title is a comment here
        for role in draft["role"]
    ]


def role_as_drafted(role: Role) -> dict[str, object]:
    drafted: dict[str, object] = {"key": role.key, "title": role.title, "min": role.min}
    for name in ("max", "requirement", "recommended_min", "required_when", "scope", "product"):
        if getattr(role, name) is not None:
            drafted[name] = getattr(role, name)
    drafted["holder_kinds"] = [kind for kind in ("person", "group") if kind in role.holder_kinds]
    drafted["works_with_support"] = role.works_with_support
    if role.support_limit is not None:
        drafted["support_limit"] = role.support_limit
    drafted["source"] = list(role.source)
    for entry in role.receives.values():
        watched = {"when_unreachable": entry.when_unreachable} if entry.when_unreachable else {}
        value = {"category": entry.category, "mode": entry.mode, **watched, "opt_out": entry.opt_out}
        value |= {"product_preferences": entry.product_preferences, "basis": entry.basis, "source": list(entry.source)}
        drafted.setdefault("receives", []).append(value)  # type: ignore[attr-defined]
    for name in ("may_do", "may_approve", "may_not"):
        for grant in getattr(role, name).values():
            value = {"action": grant.action, "basis": grant.basis, "source": list(grant.source)}
            value |= {"when": grant.when} if grant.when else {}
            value |= {"exclusive": True} if grant.exclusive else {}
            drafted.setdefault(name, []).append(value)  # type: ignore[attr-defined]
    return drafted


def test_the_vocabulary_holds_every_settled_category_and_action():
    draft = tomllib.loads(shared("rules", "vocabulary.toml").read_text(encoding="utf-8"))
    vocabulary = BUILT_IN["billtrust"].vocabulary
    assert [
        {"key": c.key, "title": c.title, "class": c.class_, "product_tagged": c.product_tagged}
        for c in vocabulary.categories.values()
    ] == draft["category"]
    assert [{"key": a.key, "title": a.title} for a in vocabulary.actions.values()] == draft["action"]


CELLS = {"receives": "direct", "copy": "copy", "esign": "esign", "fallback": "fallback"}


def test_each_cell_of_the_decision_matrix_stands_in_its_catalogue():
    with shared("rules", "receives.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == sum(len(c.roles) * len(c.vocabulary.categories) for c in BUILT_IN.values())
    for cell in cells:
        catalogue = BUILT_IN[cell["catalogue"]]
        accepted = catalogue.categories.get(cell["category"])
        entry = catalogue.roles[cell["role"]].receives.get(cell["category"])
        assert (accepted is None) == (cell["cell"] == "refused"), cell
        assert (accepted is not None and accepted.delivery == "status_page") == (cell["cell"] == "status_page"), cell
        assert (entry is not None) == (cell["cell"] in CELLS), cell
        if entry is not None:
            assert entry.mode == CELLS[cell["cell"]], cell
            assert entry.opt_out == (cell["opt_out"] == "yes"), cell
            assert entry.product_preferences == (cell["product_preferences"] == "yes"), cell
            assert (entry.basis, " ".join(entry.source)) == (cell["basis"], cell["source"]), cell
        elif cell["cell"] == "status_page":
            assert (accepted.basis, " ".join(accepted.source)) == (cell["basis"], cell["source"]), cell


def test_each_cell_of_the_authority_matrix_stands_in_its_catalogue():
    with shared("rules", "authority.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == sum(len(c.roles) * len(c.vocabulary.actions) for c in BUILT_IN.values())
    for cell in cells:
        role = BUILT_IN[cell["catalogue"]].roles[cell["role"]]
        do, approve = role.may_do.get(cell["action"]), role.may_approve.get(cell["action"])
        assert (do.basis if do else "") == cell["may_do_basis"], cell
        assert ("yes" if do else "no") == cell["may_do"], cell
        assert ((do.when if do else None) or "") == cell["condition"], cell
        assert ("yes" if approve else "no") == cell["may_approve"], cell
        assert (approve.basis if approve else "") == cell["may_approve_basis"], cell


# ---------------------------------------------------------------- a catalogue of the tests' own

VALID = (FIXTURES / "catalogue.toml").read_text(encoding="utf-8")


def load(tmp_path: Path, text: str) -> Catalogue:
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return load_catalogues([str(path)])["own"]


def test_an_operators_own_catalogue_is_read_whole(tmp_path):
    catalogue = load(tmp_path, VALID)
    assert catalogue.body == VALID
    assert list(catalogue.roles) == ["owner", "signer", "helper"]
    owner = catalogue.roles["owner"]
    assert owner.receives["quote"].when_unreachable == "signer"
    assert owner.receives["invoice"].mode == "copy"
    assert owner.receives["announcement"].mode == "direct"
    assert owner.may_do["account_change"].exclusive
    assert owner.may_not["issue_report"].source == ("T9",)
    assert catalogue.roles["helper"].required_when == "account.uses:chat"
    assert catalogue.roles["helper"].may_do["support_request"].when == "account.uses:chat"
    assert catalogue.categories["outage_incident"].delivery == "status_page"
    assert catalogue.approvals["contact_change"].quorum == 1


def test_the_version_changes_with_what_a_catalogue_says_and_not_with_its_comments(tmp_path):
    version = load(tmp_path, VALID).version
    assert re.fullmatch(r"[0-9a-f]{12}", version)
    assert load(tmp_path, VALID + "\n# a remark\n").version == version
    assert load(tmp_path, VALID.replace('title = "Owner"', 'title = "The owner"')).version != version


OWNER_TITLE = 'title = "Owner"'
ANNOUNCEMENT = '{ category = "announcement", opt_out = true, product_preferences = true, basis'

REFUSALS = [
    # (what is wrong, the text that is replaced, by what, what the sentence says)
    ("not TOML", OWNER_TITLE, 'title "Owner"', r"own\.toml is not valid TOML: .*line \d+"),
    ("a role twice", "[roles.signer]", "[roles.owner]", r"own\.toml is not valid TOML: .*owner.*line \d+"),
    ("a category twice", "quote = { delivery", "invoice = { delivery", r"not valid TOML: .*line \d+"),
    ("misspelt key of the file", "[approvals]", "[aprovals]", r"unknown key 'aprovals' \(did you mean 'approvals'\?\)"),
    ("misspelt key of the head", "over_cardinality", "over_cardinalty", r"\[catalogue\] has the unknown key"),
    ("misspelt key of a role", OWNER_TITLE, OWNER_TITLE + "\nmaxx = 3", r"role owner has the unknown key 'maxx'"),
    (
        "misspelt key of an entry",
        ANNOUNCEMENT,
        ANNOUNCEMENT.replace("opt_out", "optout"),
        r"owner: receives entry anno",
    ),
    (
        "key of another list",
        '"T7"] }',
        '"T7"], exclusive = true }',
        r"owner: may_approve entry contact_change has the unk",
    ),
    ("another schema", "schema_version = 1", "schema_version = 2", r"schema_version = 2"),
    ("a missing key", "public_page =", "# public_page =", r"\[catalogue\] lacks the key 'public_page'"),
    ("a key that is no key", 'key = "own"', 'key = "Own one"', r'key = "Own one"'),
    ("a role key that is no key", "[roles.signer]", "[roles.Signer]", r"role Signer has a bad key"),
    ("an unknown policy", '"earliest_wins"', '"latest_wins"', r"must be 'earliest_wins'"),
    ("a policy of a wrong type", "need_approval = true", 'need_approval = "yes"', r"must be true or false"),
    ("an empty title", OWNER_TITLE, 'title = ""', r"role owner has title"),
    ("a table that is none", "[categories]", "x = 1\n[categories]", r"unknown key 'x'"),
    (
        "an unknown category",
        "announcement = {",
        "announcment = {",
        r"unknown category 'announcment' \(did you mean 'ann",
    ),
    (
        "an unknown received one",
        'category = "announcement"',
        'category = "anouncement"',
        r"owner: receives entry anounce",
    ),
    (
        "an unknown action",
        '"account_change"',
        '"account_chnge"',
        r"owner: may_do .* unknown action 'account_chnge' \(did",
    ),
    ("an unknown forbidden action", '"issue_report"', '"issue_raport"', r"owner: may_not .* unknown action"),
    (
        "an unknown approval",
        "[approvals]",
        "[approvals]\nx = { quorum=1, basis='stated', source=['T1'] }",
        r"action 'x'",
    ),
    (
        "a status category received",
        'category = "announcement", opt_out = true, product_preferences = true',
        'category = "outage_incident"',
        r"owner: receives entry outage_incident is of class status",
    ),
    (
        "a status category mailed",
        'delivery = "status_page"',
        'delivery = "email"',
        r"category outage_incident is of class",
    ),
    (
        "a category only on the status page",
        'invoice = { delivery = "email"',
        'invoice = { delivery = "status_page"',
        r"category invoice is of class transactional",
    ),
    ("a category not accepted", "announcement = {", "webinar_invite = {", r"announcement is not among the catalogue's"),
    (
        "promotional without opt-out",
        '"satisfaction_survey", opt_out = true',
        '"satisfaction_survey"',
        r"is promotional",
    ),
    ("an opt-out of a duty", 'mode = "copy", ', "", r"invoice is transactional, so it cannot have opt_out"),
    (
        "an opt-out of security mail",
        '"contact_change_confirmation",',
        '"contact_change_confirmation", opt_out = true,',
        r"is security, so it cannot",
    ),
    (
        "an opt-out of approval mail",
        '"approval_request",',
        '"approval_request", opt_out = true,',
        r"is approval, so it",
    ),
    (
        "an opt-out of work",
        '"technical_correspondence",',
        '"technical_correspondence", opt_out = true,',
        r"is operational",
    ),
    (
        "preferences without products",
        '"satisfaction_survey", opt_out',
        ('"satisfaction_survey", product_preferences = true, opt_out'),
        r"satisfaction_survey has product_preferences = true",
    ),
    (
        "a received category twice",
        '"satisfaction_survey", opt_out = true',
        '"announcement", opt_out = true',
        r"names announcement twice under receives",
    ),
    (
        "an action twice",
        '{ action = "contact_change", basis = "stated", source = ["T5"] },',
        '{ action = "account_change", basis = "stated", source = ["T5"] },',
        r"names account_change twice under may_do",
    ),
    (
        "an unknown mode",
        'mode = "copy"',
        'mode = "carbon"',
        r"mode = \"carbon\", but it must be 'direct', 'copy', 'esign'",
    ),
    (
        "a copy of a signing link",
        'mode = "fallback", when_unreachable = "signer"',
        'mode = "copy"',
        r"a signing link is",
    ),
    (
        "a signature by mail",
        'quote = { delivery = "esign"',
        'quote = { delivery = "email"',
        r"signer: receives entry quote",
    ),
    (
        "a fallback for nobody",
        ', when_unreachable = "signer"',
        "",
        r"quote has mode 'fallback' but lacks when_unreachable",
    ),
    (
        "a fallback for an unknown role",
        'when_unreachable = "signer"',
        'when_unreachable = "singer"',
        r"fallback for the unknown role 'singer' \(did you mean 'signer'\?\)",
    ),
    (
        "a fallback for itself",
        'when_unreachable = "signer"',
        'when_unreachable = "owner"',
        r"a fallback for its own role",
    ),
    (
        "when_unreachable without fallback",
        'mode = "copy",',
        'mode = "copy", when_unreachable = "signer",',
        r"only a fall",
    ),
    (
        "a group that signs",
        'max = 1\nrequirement = "optional"\nscope = "account"\nholder_kinds = ["person"]',
        'max = 1\nrequirement = "optional"\nscope = "account"\nholder_kinds = ["person", "group"]',
        r"role signer receives quote for signature",
    ),
    (
        "an unknown holder kind",
        '["person", "group"]',
        '["person", "robot"]',
        r"role helper has the holder kind 'robot'",
    ),
    ("no holder kind", '["person", "group"]', "[]", r"role helper has holder_kinds = \[\]"),
    (
        "an exclusive action of two roles",
        'exclusive = true, basis = "stated", source = ["T4"]',
        'basis = "stated", source = ["T4"]',
        None,
    ),
    (
        "an exclusive action of two",
        '{ action = "support_request", when',
        '{ action = "account_change", basis = "stated", source = ["T1"] },\n  { action = "support_request", when',
        r"role owner: may_do entry account_change is exclusive, but role helper may do it too",
    ),
    ("may do and may not", '{ action = "issue_report"', '{ action = "account_change"', r"both may_do and may_not"),
    ("may approve and may not", '{ action = "issue_report"', '{ action = "quote_approval"', None),
    (
        "may approve and must not",
        "[roles.helper]",
        ('may_not = [{ action = "quote_approval", basis = "stated", source = ["T1"] }]\n[roles.helper]'),
        r"role signer has quote_approval under both may_approve and may_not",
    ),
    (
        "an approval nobody can give",
        "[approvals]",
        ("[approvals]\ndata_import = { quorum = 1, basis = 'stated', source = ['T1'] }"),
        r"approval data_import can be given by nobody",
    ),
    ("a quorum of two", "quorum = 1", "quorum = 2", r"approval contact_change has quorum = 2"),
    (
        "a required role of none",
        "min = 1\nmax = 3",
        "min = 0\nmax = 3",
        r"role owner has requirement = 'required' and min",
    ),
    (
        "a min without requirement",
        'min = 0\nmax = 1\nrequirement = "optional"',
        ('min = 1\nmax = 1\nrequirement = "optional"'),
        r"role signer has requirement = 'optional' and min = 1",
    ),
    ("max below min", "min = 1\nmax = 3", "min = 4\nmax = 3", r"role owner has max = 3, which is below min = 4"),
    ("max of zero", "max = 3", "max = 0", r"max = 0, but it must be a whole number of at least 1"),
    ("min of a wrong type", "min = 1\n", "min = true\n", r"min = true, but it must be a whole number"),
    ("recommended_min elsewhere", OWNER_TITLE, OWNER_TITLE + "\nrecommended_min = 2", r"recommended_min exactly if"),
    (
        "a condition for nothing",
        OWNER_TITLE,
        OWNER_TITLE + '\nrequired_when = "chat"',
        r"must have required_when exactly",
    ),
    ("conditional on nothing", 'required_when = "account.uses:chat"\n', "", r"role helper must have required_when"),
    (
        "a broken condition",
        'when = "account.uses:chat"',
        'when = "account.use:chat"',
        r"role helper.* has the condition",
    ),
    ("a broken condition of need", 'required_when = "account.uses:chat"', 'required_when = "uses chat"', r"condition"),
    ("a product without its scope", OWNER_TITLE, OWNER_TITLE + '\nproduct = "chat"', r"role owner has a product"),
    (
        "an entry without basis",
        'basis = "stated", source = ["T9"]',
        'source = ["T9"]',
        r"issue_report lacks the key 'basis'",
    ),
    ("an entry without source", 'basis = "stated", source = ["T9"]', 'basis = "stated"', r"lacks the key 'source'"),
    ("an empty source", 'source = ["T9"]', "source = []", r"issue_report has source = \[\]"),
    (
        "an unknown basis",
        'basis = "stated", source = ["T9"]',
        'basis = "guessed", source = ["T9"]',
        r"'stated' or 'infer",
    ),
    (
        "a category without basis",
        'invoice = { delivery = "email", basis = "stated"',
        'invoice = { delivery = "email"',
        r"category invoice lacks the key 'basis'",
    ),
    ("a role without source", 'source = ["T8"]', "# no source", r"role helper lacks the key 'source'"),
    ("a list that is none", "may_not = [", "may_not = 3\nx = [", r"role owner"),
    (
        "an entry that is no table",
        '{ action = "issue_report", basis = "stated", source = ["T9"] }',
        '"issue_report"',
        r"owner: may_not entry 1 must be a table",
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_a_catalogue_that_breaks_a_rule_is_refused_in_one_sentence(tmp_path, old, new, sentence):
    assert VALID.count(old) >= 1
    broken = VALID.replace(old, new, 1)
    if sentence is None:  # the neighbour of a refusal: allowed
        load(tmp_path, broken)
        return
    with pytest.raises(CatalogueError, match=sentence) as refused:
        load(tmp_path, broken)
    message = str(refused.value)
    assert "own.toml" in message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(CatalogueError, match=r"nowhere\.toml cannot be read: No such file"):
        load_catalogues([str(tmp_path / "nowhere.toml")])


def test_a_name_that_is_not_built_in_is_answered_with_those_that_are():
    with pytest.raises(CatalogueError, match=r"no built-in catalogue 'biltrust': name one of billtrust, issuetrak"):
        load_catalogues(["biltrust"])
    with pytest.raises(CatalogueError):
        load_catalogues(["vocabulary"])


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "own.toml"
    path.write_bytes(VALID.replace("Owner", "Öwner").encode("latin-1"))
    with pytest.raises(CatalogueError, match=r"own\.toml: line \d+ is not UTF-8"):
        load_catalogues([str(path)])


def test_two_catalogues_of_one_key_are_refused(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(VALID.replace('key = "own"', 'key = "billtrust"'), encoding="utf-8")
    with pytest.raises(CatalogueError, match=r"the catalogue key 'billtrust' is taken"):
        load_catalogues(["billtrust", str(path)])
