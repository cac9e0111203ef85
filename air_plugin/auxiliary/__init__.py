"""The auxiliary classifier: how it is built, refined and shown."""
