"""Says whether an answer is right; knows two texts, the gold answer and the given one, and not where they come from.

Four kinds: numbers, mathematical expressions, options, and names. Rewards and evaluations use the same functions; none
raises, whatever the texts, and none reads more of an answer than its first 200 characters.
"""
