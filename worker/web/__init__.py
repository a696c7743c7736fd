"""The web side: the API of publishers, the pages of recipients and operators, and a local inbox."""
