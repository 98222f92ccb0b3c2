"""The sessions of units of work, of threads and of coroutines, and the one that finds its connection."""
