"""What app_db does on the drivers' own connections."""
