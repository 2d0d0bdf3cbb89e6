"""Input that tries to break the program: damaged and hostile files, texts and options, by a fixed seed."""
