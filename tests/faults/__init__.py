"""Fault tests: what a fault of the field costs, measured from outside (reliability.md, table 1.5).

A generator writes its intent before each call (`witness`), the sink writes what it accepted, and an account is drawn
up at the end from these two and the ledger (`account`). `python -m tests.faults` runs every campaign: a module of
campaigns has `CAMPAIGNS`, names in the order in which they run, each with a function from `stage.Size` to the
`Account` of what it played; the function's docstring is the heading.
"""
