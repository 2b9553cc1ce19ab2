"""One file a kind of vision transformer; `families` says which reads what."""
