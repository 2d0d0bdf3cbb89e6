"""Pages for people: one HTML file that holds all it shows and asks no server for anything."""
