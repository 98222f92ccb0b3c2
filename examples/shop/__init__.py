"""A shop with three databases: a small application to copy from.

models.py     what is stored, one declarative base a database
container.py  which databases there are
services.py   what the shop does: functions that ask for sessions
"""
