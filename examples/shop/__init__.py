"""A shop with three databases: a small application to copy from.

models.py       what is stored, one declarative base a database
container.py    which databases there are, and how letters are sent
services.py     what the shop does: functions that ask for sessions
checkout.py     what happens when a customer buys

opening.py      what every application does when it starts
forms.py        what the web applications are asked for, and how they refuse
fastapi_app.py  the shop as a FastAPI application, with a page
flask_app.py    the same as a Flask application
pyramid_app.py  the same as a Pyramid application, which pyramid.ini starts
tasks.py        a Celery worker that sends the letters
__main__.py     `python -m shop fastapi`, `flask`, `pyramid` or `worker` starts one of them
"""
