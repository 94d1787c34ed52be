"""The forms that `loram export` writes an adapter in, one file per form, and what they share."""
