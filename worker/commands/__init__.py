"""The commands, one module for each group; `worker.cli` joins them. Heavy libraries are imported inside them."""
