"""Says whether an answer is right.

Four kinds: numbers, mathematical expressions, options, and names. Rewards and evaluations use the same functions; none
raises, whatever the texts, and none reads more of an answer than its first 200 characters.
"""
