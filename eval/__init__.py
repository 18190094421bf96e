"""Scorers, score files, comparisons and the report; imported as diffalign.eval."""
