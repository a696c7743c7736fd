"""Who hears of what, and who may change that: rules, directory and the one write door. Never imports worker."""
