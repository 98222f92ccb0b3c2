"""Everything about an application's databases that can be known before its first unit of work."""
