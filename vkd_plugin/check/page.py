"""The page."""
from .facts import Facts
def print_page(facts: Facts) -> None:
    import pprint; pprint.pprint(facts, width=180)
