"""The roof: loads a model, captures it, runs passes, lowers to a target, validates and reports."""
