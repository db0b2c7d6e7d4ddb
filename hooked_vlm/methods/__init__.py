"""Published methods, on top of `patching`.

- `notice`, with `universal` and `functions`: which heads decide between two answers about an image.
- `causal_tracing`: where in a model an image's part in the answer passes, by noise and restoration.
"""
