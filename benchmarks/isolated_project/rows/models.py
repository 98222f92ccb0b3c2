"""The model of Django's tests."""

from django.db import models


class Row(models.Model):
    """A row with nothing but an id."""
