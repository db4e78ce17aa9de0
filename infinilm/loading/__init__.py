"""Planning from headers, then moving bytes: what a backend's parameters are made of, and how they get there."""
