"""Web frameworks, task queues and command lines: a unit of work for each request, job and command.

One rule says whether a response commits. `app_db.integrations.asgi` and `app_db.integrations.wsgi` apply it to any application,
and a module for each framework puts that into the framework's own words.
"""

from app_db.integrations._requests import RequestOptions
from app_db.integrations._rule import CommitRule, commit_rule

__all__ = ["CommitRule", "RequestOptions", "commit_rule"]
