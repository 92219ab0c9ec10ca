"""Which answers are worth learning: trajectory parser, rules, duplicates, mixing."""
