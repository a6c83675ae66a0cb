"""Which architectures of transformers hold which relations: ``python -m pytest_batchinv.architectures``.

Each causal architecture is built tiny from its own configuration, with seeded weights, and loaded as a user's model would be.
"""
