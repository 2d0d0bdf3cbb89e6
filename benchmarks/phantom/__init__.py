"""Synthetic chest CTs with the 18 findings of CT-RATE: a small world in which the whole chain can be judged."""
