"""`pytest --hypothesis-profile=long`: many more examples of every property, drawn anew."""

from hypothesis import settings

settings.register_profile("long")
