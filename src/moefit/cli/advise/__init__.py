"""The commands `advise` and `law`."""
