"""Two-phase commit: xids, prepare and commit, decision logs, recovery."""
