"""What servers are asked by `app-db check`: a file for each kind of database that has answers of its own."""
