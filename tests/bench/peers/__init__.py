"""What people would use instead, each written as people write it: the same text, the same relay, no ledger."""
