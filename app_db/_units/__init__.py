"""Units of work: the manager, blocks and propagation, hooks, retry, the coordinator, branches, commit."""
