"""How units of an isolated test share a connection, for a database that has much to say about it."""
