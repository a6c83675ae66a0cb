"""What explains a finding, and what ran in a subject. It runs after the search, once, guarded: it can change no verdict."""
