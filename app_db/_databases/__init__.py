"""What app_db knows about each kind of database, and the engines that it builds for them."""
