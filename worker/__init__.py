"""An event comes in, mail goes out.

The path, with the module that owns each step:

1. `events` checks what was published; `intake` accepts the fact once, durably, and answers.
2. A status-page category ends there: `statuspage` points to the incident, and nothing is mailed.
3. `fanout` reads accounts in pages and asks `subscriptions.audience` for a verdict on every contact.
4. `ledger` keeps verdicts, deliveries (one per event and mailbox), slices, flights: what is owed and what became of it.
5. `rescue` looks at the ledger and queues what is due (`feeding`), woken by whoever left something to do (`waking`),
   and frees what vanished workers held (`leases`, `heartbeat`); `actors` hand a slice to `delivery`.
6. `delivery` claims the slice, finds room in the limits (`paces`, `destinations`), checks again, and per mail: `mails`
   gathers, `renditions` writes it, out of what an event's mails share (`tracing` proves that they do) or in full
   (`rendering`, `filters`, `mime`), `relay` and `transaction` hand it over, several at a time, and `replies` says what
   an answer means; `settler` records what became of it within milliseconds, `schedule` says when it is tried again.
7. What needs a person is noted (`matters`), listed (`standing`), mailed to operators (`notices`) and decided
   (`decisions`, `restore`).

`app` builds the parts and passes them on, `processes` starts several workers, `cli` and `web` are the doors, `history`
reads what happened.
"""
