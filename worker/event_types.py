"""The data of each event type as a pydantic model: the fields that contract.md section 3 requires, and each type's own.

Every model forbids unknown fields and converts nothing. A field that is null counts as absent where it is optional.
The class docstring is the description in the JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from worker.event_fields import (
    ATTACHMENT_TYPES,
    Accounts,
    Address,
    Amount,
    Base64,
    Body,
    ContactProducts,
    Currency,
    Date,
    FileName,
    HolderKind,
    Identity,
    Instant,
    Line,
    LongLine,
    MediaType,
    Name,
    OptOutBy,
    Page,
    Products,
    Switch,
    Word,
    decoded,
    instant,
)


class Strict(BaseModel):
    """What all models share: unknown fields are refused, values are checked and never converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _fault(field: str, remedy: str) -> PydanticCustomError:
    """A fault that concerns several fields, told at one of them."""
    return PydanticCustomError("between_fields", "{remedy}", {"field": field, "remedy": remedy})


def _refuse_backwards(model: BaseModel, earlier: str, later: str) -> None:
    """Refuses a model whose `later` time is not after its `earlier` one."""
    start, end = getattr(model, earlier), getattr(model, later)
    if start is not None and end is not None and instant(end) <= instant(start):
        raise _fault(later, f'"{later}" is {end}, but must be after "{earlier}" ({start}).')


class Attachment(Strict):
    """A file that goes with the mail, linked (`url`) or enclosed (`content_base64`); `contact` gets it alone."""

    name: FileName
    media_type: MediaType
    url: Page | None = None
    content_base64: Base64 | None = None
    contact: Identity | None = None

    @model_validator(mode="after")
    def _is_what_it_says(self) -> Self:
        if (self.url is None) == (self.content_base64 is None):
            raise _fault(
                "url", f'Attachment "{self.name}" must have either "url" or "content_base64"; give one of them.'
            )
        endings, first_bytes = ATTACHMENT_TYPES[self.media_type]
        if not self.name.lower().endswith(endings):
            raise _fault(
                "name", f'"name" is "{self.name}", but a file of type {self.media_type} ends in {" or ".join(endings)}.'
            )
        content = b"" if self.content_base64 is None else decoded(self.content_base64) or b""
        if self.content_base64 is not None and not content.startswith(first_bytes):
            raise _fault(
                "content_base64",
                f'"content_base64" does not hold a file of type {self.media_type}; correct one of the two.',
            )
        if self.media_type.startswith("text/") and not _is_text(content):
            raise _fault(
                "content_base64", f'"content_base64" of "{self.name}" is not UTF-8 text; encode the file in UTF-8.'
            )
        return self


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


class Data(Strict):
    """What every event's data may carry."""

    products: Products | None = None
    attachments: Annotated[list[Attachment], Field(max_length=5)] | None = None
    not_before: Instant | None = None
    expires_at: Instant | None = None
    reference: Line | None = None

    @model_validator(mode="after")
    def _expires_after_it_begins(self) -> Self:
        _refuse_backwards(self, "not_before", "expires_at")
        return self


class ForAccount(Data):
    """Data of an event for one account."""

    account: Identity


class Broadcast(Data):
    """Data of an event for one account, several accounts or all of them: exactly one of the two fields is set."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["account"], "properties": {"account": {"type": "string"}}},
                {"required": ["accounts"], "properties": {"accounts": {"not": {"type": "null"}}}},
            ]
        }
    )

    account: Identity | None = None
    accounts: Accounts | None = None

    @model_validator(mode="after")
    def _names_its_audience_once(self) -> Self:
        if self.account is None and self.accounts is None:
            raise _fault(
                "account", 'The event names no account; give "account", or "accounts" with a list of ids or "all".'
            )
        if self.account is not None and self.accounts is not None:
            raise _fault("accounts", 'The event has both "account" and "accounts"; keep one of the two.')
        return self


class Announcement(Broadcast):
    """News about a product, for those who follow it."""

    title: Line
    body: Body
    summary: Line | None = None
    url: Page | None = None


class Webinar(Broadcast):
    """An invitation to an online event."""

    title: Line
    starts_at: Instant
    ends_at: Instant
    join_url: Page
    body: Body | None = None
    speakers: Annotated[list[Name], Field(max_length=20)] | None = None
    url: Page | None = None

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        _refuse_backwards(self, "starts_at", "ends_at")
        return self


class CorporateNews(Broadcast):
    """News about the vendor itself."""

    title: Line
    body: Body
    url: Page | None = None


class ServiceNotice(Broadcast):
    """Something about the running service that customers should know."""

    title: Line
    body: Body
    effective_at: Instant | None = None
    url: Page | None = None


class Outage(Broadcast):
    """An outage or what became of it. Never mailed: answered with the status page.

    `incident` is the incident's id or URL on the status page.
    """

    title: Line
    started_at: Instant
    incident: LongLine | None = None
    severity: Word | None = None
    components: Annotated[list[Name], Field(max_length=50)] | None = None
    body: Body | None = None
    updated_at: Instant | None = None
    resolved_at: Instant | None = None
    url: Page | None = None


class Maintenance(Broadcast):
    """Planned work on the service. Never mailed: answered with the status page.

    `incident` is the maintenance's id or URL on the status page.
    """

    title: Line
    starts_at: Instant
    ends_at: Instant
    incident: LongLine | None = None
    severity: Word | None = None
    components: Annotated[list[Name], Field(max_length=50)] | None = None
    body: Body | None = None
    url: Page | None = None

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        _refuse_backwards(self, "starts_at", "ends_at")
        return self


class FileFailure(ForAccount):
    """A customer's file that could not be processed."""

    file_name: Line
    failed_at: Instant
    reason: LongLine
    job: Name | None = None
    stage: Name | None = None
    environment: Word | None = None
    error_code: Word | None = None
    next_step: LongLine | None = None
    url: Page | None = None


class InvoiceLine(Strict):
    """One line of an invoice or quote."""

    description: Line
    amount: Amount
    quantity: Word | None = None


class Invoice(ForAccount):
    """An invoice that the customer has to pay."""

    number: Name
    amount: Amount
    currency: Currency
    due_on: Date
    issued_on: Date | None = None
    period: Name | None = None
    purchase_order: Name | None = None
    tax: Amount | None = None
    lines: Annotated[list[InvoiceLine], Field(max_length=200)] | None = None
    url: Page | None = None


class Statement(ForAccount):
    """The state of an account's balance at the end of a period."""

    period: Name
    balance: Amount
    currency: Currency
    number: Name | None = None
    opening_balance: Amount | None = None
    issued_on: Date | None = None
    url: Page | None = None


class Payment(ForAccount):
    """What the notices about payments share; `on` is the day that the notice is about."""

    amount: Amount
    currency: Currency
    on: Date
    invoice: Name | None = None
    method: Name | None = None
    url: Page | None = None


class PaymentDue(Payment):
    """A payment that is due soon."""


class PaymentFailed(Payment):
    """A payment that did not go through."""

    reason: LongLine | None = None
    retry_on: Date | None = None


class PaymentReceived(Payment):
    """A payment that arrived."""

    receipt: Name | None = None


class PaymentInformationChanged(ForAccount):
    """A change of how an account pays, told so that an unwanted one is noticed."""

    what: Line
    changed_at: Instant
    changed_by: Name | None = None
    url: Page | None = None


class BillingNotice(ForAccount):
    """A letter about billing."""

    title: Line
    body: Body
    invoice: Name | None = None
    url: Page | None = None


class Quote(ForAccount):
    """An offer that waits for a signature. The signing link reaches the signer alone."""

    number: Name
    title: Line
    amount: Amount
    currency: Currency
    expires_on: Date
    signing_url: Page
    body: Body | None = None
    issued_on: Date | None = None
    prepared_by: Name | None = None
    lines: Annotated[list[InvoiceLine], Field(max_length=200)] | None = None
    url: Page | None = None


class ContractRenewal(ForAccount):
    """A contract that is up for renewal. The signing link reaches the signer alone."""

    number: Name
    amount: Amount
    currency: Currency
    renews_on: Date
    signing_url: Page
    title: Line | None = None
    term: Name | None = None
    previous_amount: Amount | None = None
    sign_by: Date | None = None
    body: Body | None = None
    url: Page | None = None


class ContractAuthorisation(ForAccount):
    """A contract that waits for authorisation. The signing link reaches the signer alone."""

    number: Name
    title: Line
    signing_url: Page
    sign_by: Date | None = None
    body: Body | None = None
    url: Page | None = None


class Upgrade(Broadcast):
    """A new version of a product."""

    version: Word
    title: Line
    body: Body
    starts_at: Instant | None = None
    ends_at: Instant | None = None
    url: Page | None = None

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        _refuse_backwards(self, "starts_at", "ends_at")
        return self


class TechnicalNotice(Broadcast):
    """Something that technical contacts have to know or do."""

    title: Line
    body: Body
    ticket: Name | None = None
    act_by: Date | None = None
    url: Page | None = None


class Letter(ForAccount):
    """A letter to one account from sales, customer care or account management; `author` is who writes it."""

    title: Line
    body: Body
    author: Name | None = None
    url: Page | None = None


class SalesMessage(Letter):
    """A letter from sales."""


class CareMessage(Letter):
    """A letter from customer care."""

    ticket: Name | None = None


class AccountMessage(Letter):
    """A letter from the account manager."""


class MarketingMessage(Broadcast):
    """Marketing, for those who have not opted out of it."""

    title: Line
    body: Body
    summary: Line | None = None
    url: Page | None = None


class Survey(Broadcast):
    """A survey on how satisfied customers are."""

    title: Line
    survey_url: Page
    closes_on: Date
    body: Body | None = None
    duration: Word | None = None


class Campaign(Broadcast):
    """A campaign of the electronic solutions programme."""

    title: Line
    body: Body
    summary: Line | None = None
    url: Page | None = None


class ContactsChanged(ForAccount):
    """The confirmation of a change of contacts."""

    summary: LongLine
    changes: Annotated[list[Line], Field(max_length=100)] | None = None
    changed_by: Name | None = None
    changed_at: Instant | None = None
    url: Page | None = None


class AddRole(Strict):
    """A contact is given a role."""

    change: Literal["add_role"]
    role: Identity
    contact: Identity


class RemoveRole(Strict):
    """A role is taken from a contact."""

    change: Literal["remove_role"]
    role: Identity
    contact: Identity


class ReplaceRole(Strict):
    """A role passes from one contact to another, in one step."""

    change: Literal["replace_role"]
    role: Identity
    from_: Annotated[Identity, Field(alias="from")]
    to: Identity


class OptOut(Strict):
    """An opt-out recorded with a new contact."""

    role: Identity
    category: Identity
    by: OptOutBy | None = None
    at: Instant | None = None


class NewContact(Strict):
    """A contact as in a directory document (contract.md section 4)."""

    id: Identity
    email: Address
    name: Line | None = None
    kind: HolderKind | None = None
    roles: Annotated[list[Identity], Field(max_length=100)] | None = None
    products: ContactProducts | None = None
    opt_outs: Annotated[list[OptOut], Field(max_length=1000)] | None = None
    locale: Word | None = None
    timezone: Word | None = None
    unreachable: Switch | None = None


class AddContact(Strict):
    """A contact joins the account."""

    change: Literal["add_contact"]
    contact: NewContact


class RemoveContact(Strict):
    """A contact leaves the account."""

    change: Literal["remove_contact"]
    contact: Identity


class ChangeAddress(Strict):
    """A contact gets another address."""

    change: Literal["change_address"]
    contact: Identity
    email: Address


class ContactFields(Strict):
    """What `update_contact` may set: one or more of these."""

    name: Line | None = None
    kind: HolderKind | None = None
    locale: Word | None = None
    timezone: Word | None = None

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if not self.model_fields_set:
            raise _fault("", '"fields" is empty; give one or more of name, kind, locale and timezone.')
        return self


class UpdateContact(Strict):
    """Other facts about a contact change."""

    change: Literal["update_contact"]
    contact: Identity
    fields: ContactFields


class SetProducts(Strict):
    """A contact hears of these products only; null means all."""

    change: Literal["set_products"]
    contact: Identity
    products: ContactProducts


class SetOptOut(Strict):
    """An opt-out is set or lifted."""

    change: Literal["set_opt_out"]
    contact: Identity
    role: Identity
    category: Identity
    opted_out: Switch


# The complete list of rules.md 5.3, point 10.
Change = Annotated[
    AddRole
    | RemoveRole
    | ReplaceRole
    | AddContact
    | RemoveContact
    | ChangeAddress
    | UpdateContact
    | SetProducts
    | SetOptOut,
    Field(discriminator="change"),
]


CONTACT_CHANGES = frozenset(
    kind.model_fields["change"].annotation.__args__[0] for kind in get_args(get_args(Change)[0])
)
"""The words of the list above."""

CONTACT_ACTIONS = frozenset({"contact_change", "payment_approver_change", "payment_contact_change"})
"""The actions that change contacts: their `change` has one of these forms (rules.md 5.3, points 9 and 10)."""


class ActionRequest(ForAccount):
    """Somebody asks for an action that roles govern.

    `requested_by` is a contact's id or "staff", `approved_by` a contact's id, `acted_by` the person behind a group
    inbox, `change` what is to change about the contacts, `context` the names that conditions of the catalogue use.
    """

    action: Identity
    requested_by: Identity
    approved_by: Identity | None = None
    acted_by: Line | None = None
    change: Change | None = None
    context: Annotated[list[Identity], Field(max_length=50)] | None = None

    @field_validator("change", mode="wrap")
    @classmethod
    def _checked_where_it_is_of_contacts(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        """What another action changes (a routing, a template) is the publisher's own word: any object is taken."""
        governs_contacts = info.data.get("action") in CONTACT_ACTIONS
        if not isinstance(value, dict) or governs_contacts or value.get("change") in CONTACT_CHANGES:
            return check(value)
        return value
