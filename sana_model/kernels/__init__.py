"""Exact, faster ways to compute what plain torch spells out; each file holds both."""
