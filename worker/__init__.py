"""An event comes in, mail goes out.

The path, with the module that owns each step:

1. `events` checks what was published; `intake` accepts the fact once, durably, and answers.
2. A status-page category ends there: `statuspage` points to the incident, and nothing is mailed.
3. `fanout` reads accounts in pages and asks `subscriptions.audience` for a verdict on every contact.
4. `ledger` keeps verdicts, deliveries (one per event and mailbox), slices, flights: what is owed and what became of it.
5. `rescue` looks at the ledger and queues what is due; `actors` hand a slice to `delivery`.
6. `delivery` claims the slice, checks again, and per mail: `mails` gathers, `rendering` and `mime` make the bytes,
   `relay` hands them over; what became of it is settled within milliseconds.

`app` builds the parts and passes them on, `cli` and `web` are the doors, `history` reads what happened.
"""
