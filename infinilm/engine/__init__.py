"""Requests in, tokens and text out: scheduling, paged cache accounting, sampling and detokenization."""
